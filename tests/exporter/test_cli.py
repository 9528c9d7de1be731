"""Flags as an operator types them, and files that are written whole."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.cli import build_parser, parse_command_line
from exporter.commands.once import write_whole
from exporter.flag_values import choose_collectors
from exporter.prometheus.selection import DEFAULT_COLLECTORS
from exporter.prometheus.vm_series import VcpuSeries, VmLabels
from tests.agents import ROOT, open_agent, run_agent
from tests.waiting import wait_until


def test_without_a_command_the_program_serves() -> None:
    arguments = parse_command_line(["--web.listen-address=:9751", "--web.listen-address", "[::1]:9751"])
    assert arguments.command == "serve"
    assert [str(address) for address in arguments.listen_addresses] == [":9751", "[::1]:9751"]
    assert parse_command_line([]).command == "serve"
    assert parse_command_line(["once", "--format=json"]).format == "json"


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ([], set(DEFAULT_COLLECTORS)),
        (["--collector.stats"], {*DEFAULT_COLLECTORS, "stats"}),
        (["--collector.disable-defaults", "--collector.stats"], {"stats"}),
        (["--no-collector.vcpu"], {"host", "vm", "exporter"}),
        (["--collector.disable-defaults", "--collector.vm"], {"vm"}),
        (["--collector.disable-defaults"], set()),
    ],
)
def test_collectors_are_switched_as_node_exporters_are(words: list[str], chosen: set[str]) -> None:
    assert choose_collectors(parse_command_line(words)) == chosen


def test_flags_are_what_they_say() -> None:
    arguments = parse_command_line(
        ["--vcpu-series=active", "--vm.include=^web", "--collector.source=debugfs,stats_fd", "--web.max-requests=3"]
    )
    assert arguments.vm_labels is VmLabels.FULL
    assert parse_command_line(["once", "--web.labels=ids", "--output=a.prom"]).vm_labels is VmLabels.IDS
    assert arguments.vcpu_series is VcpuSeries.ACTIVE
    assert arguments.vm_include.matches("web1")
    assert arguments.sources == ("debugfs", "stats_fd")
    assert arguments.max_requests == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--collector.source=qmp"], "is wanted"),
        (["--web.max-requests=-1"], "from 0 on"),
        (["--web.max-requests=1e3"], "from 0 on"),
        (["--collector.source=bpf,bpf"], "without repetition"),
        (["--vm.include=("], "no regular expression"),
        (["--web.listen-address=here"], "want host:port"),
        (["--vcpu-series=some"], "invalid"),
        (["--web.labels=none"], "invalid"),
        (["once", "--output=metrics.txt"], "reads *.prom only"),
        (["once", "--output=a.prom", "--format=json"], "not allowed with"),
        (["--web.listen-addres=:1"], "unrecognized"),
        (["explode"], "invalid choice: 'explode' (choose from 'serve', 'once', 'top', "),
        (["--path.procfs=/tmp"], "the mount point of a procfs is wanted"),
    ],
)
def test_a_wrong_flag_is_explained_and_ends_the_program(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_command_line(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_every_command_has_help_and_every_flag_a_text() -> None:
    parser = build_parser()
    for command in ("serve", "once", "check", "demo"):
        assert command in parser.format_help()
        text = run_agent(command, "--help")
        assert "--log.level" in text
    assert run_agent("--version").startswith("kvm-notify-exporter ")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "kvm.prom"
    path.write_text("old\n")
    write_whole(path, "new\n")
    assert path.read_text() == "new\n"
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half\ud800")
    assert path.read_text() == "new\n"
    assert os.listdir(tmp_path) == ["kvm.prom"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order(number: signal.Signals) -> None:
    with open_agent(command="demo") as agent:
        agent.process.send_signal(number)
        assert agent.process.wait(30) == 0
    assert not any("Traceback" in line for line in agent.log)


def test_an_address_in_use_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = subprocess.run(
            [sys.executable, "-m", "exporter", "demo", f"--web.listen-address=127.0.0.1:{port}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "in use" in run.stderr.lower()


def test_the_log_can_be_json() -> None:
    words = [sys.executable, "-m", "exporter", "serve", "--log.format=json", "--web.listen-address=192.0.2.1:1"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    documents = [json.loads(line) for line in run.stderr.splitlines()]
    assert documents[-1]["msg"] == "cannot go on"
    assert documents[-1]["level"] == "ERROR"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("word", ["--version", "--help", "check"])
def test_output_that_nobody_reads_is_no_error(word: str, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [sys.executable, "-m", "exporter", word],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["once"],
        ["check"],
        ["drill", "--vm=x", "--url=unix:/nowhere/a"],
        ["once", "--from-agent=unix:/nowhere/a"],
    ],
)
def test_commands_that_serve_nothing_import_no_server(words: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "exporter", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "exporter.cli" in run.stderr
    assert "aiohttp" not in run.stderr


# Whatever stands for one of these is closed by the shell that starts the program.
@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-"])
def test_a_closed_stderr_stops_nothing(closed: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = f"exec {sys.executable} -m exporter demo --web.listen-address=127.0.0.1:{port} {closed}"
    with subprocess.Popen(["sh", "-c", command], cwd=ROOT) as process:
        try:
            wait_until(lambda: is_open(port), "it listens", 60)
            # Nothing that a library writes to stderr may reach a client.
            assert os.readlink(f"/proc/{process.pid}/fd/2") == os.devnull
        finally:
            process.terminate()
        assert process.wait(30) == 0


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("--version", ">&-"),
        ("--help", ">&- <&-"),
        ("once --collector.source=debugfs", ">&-"),
        ("once --collector.source=debugfs", ">/dev/full"),
    ],
)
def test_output_that_cannot_be_written_is_an_error_of_one_line(words: str, where: str) -> None:
    run = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m exporter {words} {where}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    errors = [line for line in run.stderr.splitlines() if "level=WARN" not in line]  # those are about VMs of this host
    assert len(errors) == 1, run.stderr
    assert "Bad file descriptor" in run.stderr or "No space left" in run.stderr


def test_no_stream_at_all_leaves_the_exit_code() -> None:
    command = f"exec {sys.executable} -m exporter --version <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=ROOT, check=False).returncode == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["serve", "--web.telemetry-path=metrics"], "want a plain path such as /metrics"),
        (["serve", "--web.telemetry-path=/api/v1/vcpus"], "is taken by the agent itself"),
        (["serve", "--web.config.file="], "the path of a file is wanted"),
        (["once", "--from-agent", "--stats"], "one of them"),
        (["once", "--stats", "--format=prometheus"], "a table or JSON"),
        (["once", "--from-agent", "--format=prometheus"], "a table or JSON"),
    ],
)
def test_wrong_flags_end_it_with_2_so_that_nobody_starts_it_again(words: list[str], text: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "exporter", *words], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert (run.returncode, text in run.stderr) == (2, True), run.stderr


@pytest.mark.parametrize("closed", ["<&-", "<&- >/dev/null"])
def test_top_without_stdin_prints_once(closed: str) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m exporter top --interval=0.1 {closed}"
    run = subprocess.run(["sh", "-c", command], cwd=ROOT, check=False, capture_output=True, text=True)
    assert "Traceback" not in run.stderr
