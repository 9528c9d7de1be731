"""What the lab understands of what it reads: apt's sources, package names, modules, reports. No kernel is booted."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.lab.apt import LabError, Mirror, parse_mirror, render_sources
from tests.lab.boot import Limits, Listener, Run, RunLost
from tests.lab.debian import parse_numbers
from tests.lab.inside.perf_reader import Field, parse_format
from tests.lab.modules import parse_depends
from tests.lab.plan import (
    BOOTS,
    NOT_AGAIN,
    Boot,
    Outcome,
    choose_boots,
    find_failed,
    find_kernel_warnings,
    find_slowest,
    parse_figures,
    parse_junit,
    read_series,
)

ROOT = Path(__file__).parents[2]
DEB822 = """Types: deb
# http://snapshot.example/archive
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/archive.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/archive.gpg
"""


def test_the_mirror_is_the_one_of_the_system() -> None:
    mirror = parse_mirror(DEB822)
    assert mirror == Mirror(
        "http://mirror.example/debian", "http://mirror.example/debian-security", "/usr/share/keyrings/archive.gpg"
    )
    assert render_sources(mirror, "trixie").splitlines() == [
        "deb [signed-by=/usr/share/keyrings/archive.gpg] http://mirror.example/debian trixie main",
        "deb [signed-by=/usr/share/keyrings/archive.gpg] http://mirror.example/debian trixie-updates main",
        "deb [signed-by=/usr/share/keyrings/archive.gpg] http://mirror.example/debian-security trixie-security main",
        "deb [signed-by=/usr/share/keyrings/archive.gpg] http://mirror.example/debian trixie-backports main",
    ]
    assert render_sources(mirror, "forky", is_released=False).splitlines() == [
        "deb [signed-by=/usr/share/keyrings/archive.gpg] http://mirror.example/debian forky main",
    ]


def test_a_system_without_a_mirror_is_an_error() -> None:
    with pytest.raises(LabError, match="no archive with a URIs: line"):
        parse_mirror("# nothing here\n")


def test_the_newest_kernel_is_the_one_with_the_highest_numbers() -> None:
    names = ["linux-image-6.12.9+deb12-cloud-amd64", "linux-image-6.12.117+deb12-cloud-amd64"]
    names += ["linux-image-6.12.90+deb12.1-cloud-amd64", "linux-image-6.12.90+deb12-cloud-amd64"]
    assert max(names, key=parse_numbers) == "linux-image-6.12.117+deb12-cloud-amd64"


def test_a_module_names_those_it_needs() -> None:
    assert parse_depends(b"ELF\0license=GPL\0depends=kvm,ccp\0name=kvm_amd\0") == ["kvm", "ccp"]
    assert parse_depends(b"ELF\0depends=\0name=irqbypass\0") == []
    with pytest.raises(LabError, match=r"without depends="):
        parse_depends(b"ELF")


def test_fields_of_a_record_are_where_the_format_says() -> None:
    text = "\tfield:unsigned int exit_reason;\toffset:8;\tsize:4;\tsigned:0;\n"
    text += "\tfield:char comm[16];\toffset:12;\tsize:16;\tsigned:1;\n"
    assert parse_format(text) == {"exit_reason": Field(8, 4, False), "comm": Field(12, 16, True)}


def test_counts_come_from_the_junit_file() -> None:
    xml = b'<testsuites><testsuite tests="5" failures="1" errors="1" skipped="2"/></testsuites>'
    assert parse_junit(xml) == (5, 2, 2)


def test_figures_come_from_the_junit_file() -> None:
    properties = (
        b'<properties><property name="figure" value="3 &lt; 4"/><property name="other" value="5"/></properties>'
    )
    assert parse_figures(b"<testsuites><testsuite>" + properties + b"</testsuite></testsuites>") == ("3 < 4",)


def test_the_slowest_tests_of_a_junit_file_are_named() -> None:
    cases = "".join(f'<testcase name="test_{number}" time="{number}.4"/>' for number in range(9))
    line = find_slowest(f"<testsuites><testsuite>{cases}</testsuite></testsuites>".encode())
    assert line == "slowest: test_8 8 s, test_7 7 s, test_6 6 s, test_5 5 s, test_4 4 s"


def test_what_a_kernel_complains_of_is_found() -> None:
    console = "[ 1.0] mtrr: inconsistent settings\r\n[ 2.0] WARNING: CPU: 0 PID: 1 at kernel/kprobes.c\r\n"
    assert find_kernel_warnings(console) == ("[ 2.0] WARNING: CPU: 0 PID: 1 at kernel/kprobes.c",)


@pytest.mark.parametrize(
    ("environment", "series"),
    [({}, ["6.12"]), ({"LAB_KERNELS": "6.1,7"}, ["6.1", "7"]), ({"LAB_KERNELS": "all"}, ["6.1", "6.12", "7"])],
)
def test_kernels_are_chosen_by_the_environment(environment: dict[str, str], series: list[str]) -> None:
    assert read_series(environment) == series


class Ends:
    """A listener, and the ends that a machine would speak into."""

    def __init__(self) -> None:
        console, self.console = socket.socketpair()
        report, self.report = socket.socketpair()
        self.sockets = (console, self.console, report, self.report)
        self.listener = Listener(console, report)


@pytest.fixture
def ends() -> Iterator[Ends]:
    opened = Ends()
    yield opened
    for end in opened.sockets:
        end.close()


def test_a_report_may_come_in_any_pieces(ends: Ends) -> None:
    events: list[dict[str, object]] = [{"event": "hello", "release": "6.12", "lockdown": "[none]"}]
    events += [{"event": "output", "text": "a"}, {"event": "output", "text": "b"}]
    events += [{"event": "file", "name": "/f", "base64": base64.b64encode(b"\0").decode()}]
    events += [{"event": "exit", "status": 3}]
    stream = "".join(json.dumps(event) + "\n" for event in events).encode()
    ends.report.sendall(stream[:40])
    ends.report.sendall(stream[40:])
    ends.listener.listen(Limits())
    run = ends.listener.run
    assert (run.release, run.output, run.files, run.exit_status) == ("6.12", "ab", {"/f": b"\0"}, 3)


def test_a_panic_is_seen_when_its_line_is_complete(ends: Ends) -> None:
    ends.console.sendall(b"[    1.0] Kernel panic - not sync")
    ends.console.sendall(b"ing: VFS: Unable to mount root\r\n[    1.1] CPU: 0\r\n")
    with pytest.raises(RunLost, match="Kernel panic - not syncing: VFS: Unable to mount root"):
        ends.listener.listen(Limits())


def test_silence_has_a_limit(ends: Ends) -> None:
    with pytest.raises(RunLost, match="said nothing for 0 s"):
        ends.listener.listen(Limits(silence_seconds=0.0))


def test_the_end_of_both_channels_is_the_end_of_the_machine(ends: Ends) -> None:
    ends.console.close()
    ends.report.close()
    with pytest.raises(RunLost, match="ended before its job was done"):
        ends.listener.listen(Limits())


def test_what_is_the_same_on_each_kernel_is_tried_on_one() -> None:
    for booted, once in ((["6.1", "6.12", "7"], "6.12"), (["6.1", "7"], "6.1"), (["7"], "7")):
        everything = [(series, boot) for series in booted for boot in BOOTS]
        assert choose_boots(booted, is_whole=True) == everything
        assert choose_boots(booted, is_whole=False) == [
            (series, boot if series == once else replace(boot, arguments=NOT_AGAIN))
            for series, boot in everything
            if series == once or boot.name != "blind"
        ]


@pytest.mark.slow
@pytest.mark.parametrize("boot", BOOTS, ids=lambda boot: boot.name)
def test_every_kernel_has_tests_in_each_boot(boot: Boot) -> None:
    def collect(*arguments: str) -> set[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", *boot.tests, *arguments]
        environment = {**os.environ, "KVM_LAB_INSIDE": "1"}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), run.stdout
        return {line for line in run.stdout.splitlines() if "::" in line}

    everything, always, once = collect(), collect(*NOT_AGAIN), collect("-m", "one_kernel")
    assert everything == always | once
    assert bool(once) is (boot.name in ("verdicts", "integrity"))
    assert {line.partition("/test_")[0] for line in everything} == {line.partition("/test_")[0] for line in always}
    assert {line.partition("::")[0].rpartition("/")[2] for line in once} <= {"test_blind.py", "test_verdicts.py"}


REPORT = b"""<testsuites><testsuite tests="3" failures="1" errors="1" skipped="0">
<testcase classname="tests.lab.inside.none.test_injector" name="test_a[x-1]"><failure message="m">t</failure></testcase>
<testcase classname="tests.lab.inside.none.test_injector" name="test_b"><error message="m">t</error></testcase>
<testcase classname="tests.lab.inside.none.test_blind" name="test_c"/></testsuite></testsuites>"""


def test_what_failed_is_found_as_pytest_takes_it() -> None:
    path = "tests/lab/inside/none/test_injector.py"
    assert find_failed(REPORT) == (f"{path}::test_a[x-1]", f"{path}::test_b")
    assert parse_junit(REPORT) == (3, 2, 0)


def make_outcome(failed: int = 0, *, skipped: int = 0, warnings: tuple[str, ...] = (), tests: int = 9) -> Outcome:
    run = Run(release="6.12", exit_status=int(failed > 0))
    names = tuple(f"test_{number}" for number in range(failed))
    return Outcome(BOOTS[0], run, tests, failed, skipped, warnings, failed_tests=names)


def test_what_fails_twice_or_not_by_chance_has_failed() -> None:
    assert make_outcome().passed
    assert not make_outcome(1).passed
    assert replace(make_outcome(1), again=make_outcome(tests=1)).passed
    assert replace(make_outcome(2), again=make_outcome(tests=2)).passed
    assert not replace(make_outcome(2), again=make_outcome(1, tests=2)).passed
    assert not replace(make_outcome(2), again=make_outcome(tests=1)).passed, "one was not run again"
    assert not replace(make_outcome(3), again=make_outcome(tests=3)).passed
    for outcome in (make_outcome(), make_outcome(3), make_outcome(1, skipped=1), make_outcome(1, warnings=("BUG: x",))):
        assert not outcome.may_be_tried_again
