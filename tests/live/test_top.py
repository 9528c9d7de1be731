"""``top`` and ``once --stats`` as somebody uses them: real guests, a real terminal, every key."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live import GuestProcess, open_guest_process
from tests.tmux import Terminal, needs_tmux, open_terminal

ROOT = Path(__file__).parent.parent.parent
PROGRAM = [sys.executable, "-m", "exporter"]
# Other tests' guests may run beside ours: only these have this in their names.
MARK = uuid.uuid4().hex[:6]


@pytest.fixture
def busy() -> Iterator[GuestProcess]:
    with open_guest_process(vcpus=2, name=f"{MARK}-busy", stats_fds=True, vm_stats_fd=True) as guest:
        guest.send("loop")
        yield guest
        guest.stop()


@pytest.fixture
def idle() -> Iterator[GuestProcess]:
    with open_guest_process(vcpus=3, name=f"{MARK}-idle", stats_fds=True, port_writes=5) as guest:
        yield guest


@pytest.fixture
def terminal(busy: GuestProcess, idle: GuestProcess) -> Iterator[Terminal]:
    """A terminal that shows both guests, and no other."""
    with open_terminal() as terminal:
        terminal.start(f"cd {ROOT}; {' '.join(PROGRAM)} top --interval=0.2 2>/dev/null")
        terminal.wait_for(lambda shown: shown[-1].startswith("q leave  ? help"), "the table")
        terminal.press("/")
        terminal.type(MARK)
        terminal.press("Enter")
        terminal.wait_for(lambda shown: len(find_rows(shown)) == 2, "both guests")
        yield terminal
        if terminal.read_lines()[-1].startswith("q leave"):
            terminal.press("q")
            assert terminal.wait_for_end()[0] == 0


def find_rows(shown: list[str]) -> list[list[str]]:
    """The rows below the header, without the mark of the selected one."""
    head = next((number for number, line in enumerate(shown) if re.match(r"  (VM|VCPU|STATISTIC) ", line)), len(shown))
    return [line[2:].split() for line in shown[head + 1 : -1] if line]


def read_number(cell: str) -> float:
    """A number of a cell, -1 where there is none: not known, or not yet drawn."""
    digits = cell.replace(",", "").rstrip("%")
    return float(digits) if re.fullmatch(r"[0-9.]+", digits) else -1


def name_rows(shown: list[str]) -> list[str]:
    return [row[0].removeprefix(f"{MARK}-") for row in find_rows(shown)]


def read_busy(shown: list[str], title: str) -> float:
    """What the busy guest has in the column that sorts, -1 where it has none."""
    ends = [line.index(f"*{title}") + len(title) + 1 for line in shown if f" *{title}" in line]
    lines = [line for line in shown if f"{MARK}-busy" in line]
    return read_number(lines[0][: ends[0]].split()[-1]) if ends and lines else -1


@needs_tmux
def test_it_sorts_by_exits_by_notify_exits_and_by_any_statistic(terminal: Terminal) -> None:
    terminal.press("e")
    shown = terminal.wait_for(
        lambda shown: read_busy(shown, "exits") > 100 and name_rows(shown)[:1] == ["busy"], "exits"
    )
    assert "by vcpu/exits per second" in shown[1]
    terminal.press("n")
    shown = terminal.wait_for(lambda shown: "by vcpu/notify_window_exits" in shown[1], "notify exits")
    terminal.press("s")
    terminal.type("insn_emulation")
    shown = terminal.wait_for(lambda shown: shown[-1].startswith("sort by: insn_emulation|"), "the question")
    assert "vcpu/insn_emulation" in shown[-1]
    terminal.press("Enter")
    shown = terminal.wait_for(lambda shown: any("*insn_emulation" in line for line in shown), "the column")
    assert sorted(name_rows(shown)) == ["busy", "idle"]


@needs_tmux
def test_it_searches_as_one_types(terminal: Terminal) -> None:
    terminal.press("/")
    terminal.type("-idle")
    terminal.wait_for(lambda shown: name_rows(shown) == ["idle"] and shown[-1] == f"search: {MARK}-idle|", "idle")
    terminal.press("BSpace", "BSpace", "BSpace", "BSpace")
    terminal.type("BUSY")
    terminal.wait_for(lambda shown: name_rows(shown) == ["busy"], "busy")
    terminal.type("x")
    terminal.wait_for(lambda shown: "nothing matches; esc shows all" in shown, "nothing")


@needs_tmux
def test_it_freezes_and_goes_on(terminal: Terminal) -> None:
    terminal.press("e")
    terminal.wait_for(lambda shown: name_rows(shown)[:1] == ["busy"], "exits")
    terminal.press("f")
    frozen = terminal.wait_for(lambda shown: "FROZEN" in shown[0], "frozen")
    terminal.press("?", "x")  # time enough, and a reading or more, while something else is drawn
    terminal.wait_for(lambda shown: shown[-1] == frozen[-1], "the table")
    assert find_rows(terminal.read_lines()) == find_rows(frozen)
    terminal.press("f")
    terminal.wait_for(
        lambda shown: "FROZEN" not in shown[0] and find_rows(shown) != find_rows(frozen) and len(find_rows(shown)) == 2,
        "it goes on",
    )


@needs_tmux
def test_it_drills_down_to_a_vcpus_statistics_and_back(terminal: Terminal, busy: GuestProcess) -> None:
    terminal.press("e")
    terminal.wait_for(lambda shown: name_rows(shown)[:1] == ["busy"] and shown[-1].startswith("q"), "exits")
    terminal.press("Enter")
    wanted = sorted([str(vcpu.index), str(vcpu.tid)] for vcpu in busy.vcpus)
    shown = terminal.wait_for(lambda shown: sorted(row[:2] for row in find_rows(shown)) == wanted, "its vCPUs")
    assert shown[1].startswith(f"vCPUs of {MARK}-busy by")
    terminal.press("Enter")
    terminal.wait_for(
        lambda shown: (
            shown[1].startswith("statistics of vCPU")
            and any(row[0] == "exits" and read_number(row[-1]) > 100 for row in find_rows(shown))
        ),
        "its exits per second",
    )
    terminal.press("Escape")
    terminal.wait_for(lambda shown: shown[1].startswith(f"vCPUs of {MARK}-busy"), "back")
    terminal.press("Escape")
    terminal.wait_for(lambda shown: shown[1].startswith("VMs by"), "all the way")
    terminal.press("v")
    terminal.wait_for(lambda shown: shown[1].startswith("vCPUs by"), "all vCPUs")


@needs_tmux
def test_a_vm_that_dies_disappears_and_what_was_opened_says_so(
    terminal: Terminal, busy: GuestProcess, idle: GuestProcess
) -> None:
    terminal.press("e")
    terminal.wait_for(lambda shown: name_rows(shown)[:1] == ["busy"], "exits")
    terminal.press("Down", "Enter")
    terminal.wait_for(lambda shown: shown[1].startswith(f"vCPUs of {MARK}-idle"), "its vCPUs")
    idle.process.kill()
    idle.process.wait()
    terminal.wait_for(lambda shown: "it has ended; esc goes back" in shown, "it says so")
    terminal.press("Escape", "/")
    terminal.type(MARK)
    terminal.press("Enter")
    terminal.wait_for(lambda shown: name_rows(shown) == ["busy"], "it has disappeared")


@needs_tmux
def test_it_follows_the_size_of_the_terminal(terminal: Terminal) -> None:
    terminal.resize(40, 10)
    shown = terminal.wait_for(
        lambda shown: len(shown) == 10 and shown[-1] == "q leave  ? help  esc back  / search", "40x10"
    )
    assert sorted(row[0][:6] for row in find_rows(shown)) == [MARK, MARK]
    assert any(line.endswith("*notify_window_exits") for line in shown)
    terminal.resize(120, 30)
    terminal.wait_for(lambda shown: len(shown) == 30 and len(find_rows(shown)) == 2 and "a all" in shown[-1], "120x30")


def test_a_pipe_gets_the_table_once(busy: GuestProcess) -> None:
    run = subprocess.run([*PROGRAM, "top", "--interval=0.5"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1)  # 1: others' VMs may be hidden
    (row,) = [line for line in run.stdout.splitlines() if f"{MARK}-busy" in line]
    assert read_number(row.split()[3]) > 100
    assert "\x1b" not in run.stdout


@pytest.mark.parametrize("level", ["vm", "vcpu"])
def test_once_prints_all_statistics_with_their_rates(level: str, busy: GuestProcess) -> None:
    words = [*PROGRAM, "once", "--stats", f"--collector.stats.level={level}"]
    run = subprocess.run([*words, "--format=json"], cwd=ROOT, capture_output=True, text=True, check=False)
    (vm,) = [vm for vm in json.loads(run.stdout)["vms"] if vm["name"] == f"{MARK}-busy"]
    found = {statistic["statistic"]: statistic for statistic in vm["statistics"]}
    exits = found["vcpu/exits"]
    rows = exits["vcpus"] if level == "vcpu" else [exits]
    assert len(rows) == (2 if level == "vcpu" else 1)
    assert all(row["value"] > row["per_second"] > 100 for row in rows)
    assert any("upper_bounds" in statistic for statistic in found.values())
    assert any(key.startswith("vm/") for key in found)
    table = subprocess.run(
        [*words, "--collector.stats.include=^vcpu/exits$"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    of_busy = [line.split() for line in table.stdout.splitlines() if f"{MARK}-busy" in line]
    assert [row[3] for row in of_busy] == ["vcpu/exits"] * len(rows)
    assert all(read_number(row[5]) > 100 for row in of_busy)
