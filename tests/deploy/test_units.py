"""The units say what each line is for, systemd understands all of it, and their sandbox is as tight as was measured."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.cli import parse_command_line
from kvm import abi
from tests.deploy.unit_file import FULL, NO_ADMIN, SOCKET, SYSTEMD, UNITS, parse_unit, read_unit, read_values

# What `systemd-analyze security` of systemd 252 gives at most: 0 is locked in, 10 is wide open.
SCORES = {FULL: 2.9, NO_ADMIN: 2.6}
# These break the agent; the unit's last comment says how.
BREAKING = tuple("ProtectKernelTunables ProcSubset PrivateUsers PrivateNetwork PrivateDevices".split())
TARGETS = ("sysinit", "basic", "multi-user", "network", "shutdown", "local-fs", "swap", "timers", "sockets", "paths")

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


def test_both_units_are_there() -> None:
    assert {FULL, NO_ADMIN} == set(UNITS)


@pytest.mark.parametrize("unit", [*UNITS, SOCKET])
def test_each_line_says_what_breaks_without_it(unit: str) -> None:
    bare = [setting.name for setting in read_unit(unit) if setting.section != "Unit" and not setting.comment]
    assert bare == []
    comments = [setting.comment for setting in read_unit(unit) if setting.comment]
    assert len(set(comments)) == len(comments)


@pytest.mark.parametrize("unit", UNITS)
def test_what_breaks_the_agent_is_named_and_not_set(unit: str) -> None:
    text = (SYSTEMD / unit).read_text()
    assert [name for name in BREAKING if f"{name}=" not in text] == []
    assert {setting.name for setting in parse_unit(text)} & set(BREAKING) == set()


def test_the_units_differ_in_one_capability() -> None:
    def read_shared(unit: str) -> list[tuple[str, str]]:
        own = ("Description", "Conflicts")
        found = [setting for setting in read_unit(unit) if setting.name not in own]
        extra = (" CAP_SYS_ADMIN", f" {FULL}")
        return [(setting.name, setting.value.replace(extra[0], "").replace(extra[1], "")) for setting in found]

    assert read_shared(FULL) == read_shared(NO_ADMIN)
    assert "CAP_SYS_ADMIN" not in read_values(NO_ADMIN, "CapabilityBoundingSet")
    assert FULL in read_values(NO_ADMIN, "After"), "who stops has stopped before the other starts"
    assert (read_values(FULL, "Conflicts"), read_values(NO_ADMIN, "Conflicts")) == ([NO_ADMIN], [FULL])


@pytest.mark.parametrize("unit", UNITS)
def test_what_is_bounded_is_held(unit: str) -> None:
    assert read_values(unit, "CapabilityBoundingSet") == read_values(unit, "AmbientCapabilities")


@pytest.mark.parametrize("unit", UNITS)
def test_the_flags_of_exec_start_exist(unit: str) -> None:
    program, *words = read_values(unit, "ExecStart")
    assert program == "/usr/bin/kvm-notify-exporter"
    assert words.pop() == "$ARGS"
    assert parse_command_line(words).command == "serve"


def test_the_flags_of_the_defaults_exist() -> None:
    lines = (SYSTEMD / "kvm-notify-exporter.default").read_text().splitlines()
    found = [match[1] for line in lines if (match := re.fullmatch(r'#?ARGS="(.*)"', line))]
    assert len(found) == 2, "an example and what is in force"
    for flags in found:
        assert parse_command_line(["serve", *shlex.split(flags)])


def test_a_flag_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_command_line(["serve", "--web.listen-adress=:9750"])


def verify(unit: str, root: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Let systemd judge the text of a unit, in a root with our program in it, and with a shell."""
    units = root / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    (root / "usr/bin").mkdir()
    for program in ("kvm-notify-exporter", "sh"):
        shutil.copy("/bin/true", root / "usr/bin" / program)
    for target in TARGETS:
        shutil.copy(f"/usr/lib/systemd/system/{target}.target", units)
    if unit == SOCKET:
        shutil.copy(SYSTEMD / FULL, units)  # what it starts
    (units / unit).write_text(text)
    words = ["systemd-analyze", "verify", "--man=no", f"--root={root}", unit]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@needs_systemd
@pytest.mark.parametrize("unit", [*UNITS, SOCKET])
def test_systemd_understands_every_line(unit: str, tmp_path: Path) -> None:
    done = verify(unit, tmp_path, (SYSTEMD / unit).read_text())
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_what_systemd_does_not_understand_is_noticed(tmp_path: Path) -> None:
    text = (SYSTEMD / FULL).read_text().replace("=bpf ", "=bfp ").replace("UMask", "Umusk")
    said = verify(FULL, tmp_path, text).stderr
    assert "ignoring: bfp" in said
    assert "Unknown key 'Umusk'" in said


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_how_tight_the_sandbox_is(unit: str, tell: Callable[[str], None]) -> None:
    words = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(SYSTEMD / unit)]
    report = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    level = re.search(r"Overall exposure level for \S+: (\d+\.\d)", report)
    assert level is not None, report
    tell(f"systemd-analyze security {unit}: {level[1]}")
    assert float(level[1]) <= SCORES[unit]


@pytest.mark.skipif(not shutil.which("systemd-sysusers"), reason="systemd-sysusers is not installed")
def test_sysusers_makes_what_the_units_name(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    words = ["systemd-sysusers", f"--root={tmp_path}", "-"]
    text = (SYSTEMD / "kvm-notify-exporter.sysusers").read_text()
    subprocess.run(words, input=text, capture_output=True, text=True, check=True)
    users = [line.split(":") for line in (tmp_path / "etc/passwd").read_text().splitlines()]
    groups = {line.split(":")[0]: line.split(":")[3] for line in (tmp_path / "etc/group").read_text().splitlines()}
    (user,) = read_values(FULL, "User")
    assert [(name, shell) for name, *_, shell in users] == [(user, "/usr/sbin/nologin")]
    assert set(groups) == {*read_values(FULL, "Group"), *read_values(FULL, "SupplementaryGroups")}
    assert user in groups["kvm"].split(",")


def test_the_sysctl_is_what_tracing_without_cap_sys_admin_takes() -> None:
    lines = (SYSTEMD / "60-kvm-notify-exporter.conf").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["kernel.perf_event_paranoid = 2"]
    assert "/sysctl.d/60-kvm-notify-exporter.conf" in (SYSTEMD / NO_ADMIN).read_text()


def expand(name: str) -> set[str]:
    """The system calls of a set, and of the sets in it."""
    if not name.startswith("@"):
        return {name}
    words = ["systemd-analyze", "syscall-filter", "--no-pager", name]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    members = {line.strip() for line in lines if line.startswith("    ") and not line.strip().startswith("#")}
    return {call for member in members for call in expand(member)}


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_the_filter_lets_through_what_the_agent_calls_by_itself(unit: str) -> None:
    allowed = set[str]()
    for setting in read_unit(unit):
        if setting.name == "SystemCallFilter":
            calls = {call for name in setting.value.removeprefix("~").split() for call in expand(name)}
            allowed = allowed - calls if setting.value.startswith("~") else allowed | calls
    called = {name.removeprefix("SYS_") for name in vars(abi) if name.startswith("SYS_")} | {"bpf", "prlimit64"}
    # A private instance of tracefs is for hosts where none is mounted; systemd mounts it.
    assert called - allowed == {"fsopen", "fsconfig", "fsmount"}
    assert not allowed & {"mount", "init_module", "reboot", "ptrace", "setuid"}
