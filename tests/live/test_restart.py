"""What outlives the real agent: the host's total, as a Prometheus sees it over ends of every kind."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from exporter.history.kept_total import VERSION, read_boot_id
from tests.agents import open_agent
from tests.blind.ways import PROC_SUBSET

SOURCE = "--collector.source=stats_fd,debugfs,bpf"
COUNTED = 4711


def write_total(path: Path, total: int, boot_id: str | None) -> None:
    path.write_text(json.dumps({"version": VERSION, "boot_id": boot_id, "notify_window_exits_total": total}))


def read_total(path: Path) -> int | None:
    total: int | None = json.loads(path.read_text())["notify_window_exits_total"]
    return total


@pytest.mark.parametrize(
    ("number", "after"), [(signal.SIGTERM, COUNTED), (signal.SIGINT, COUNTED), (signal.SIGKILL, 0)]
)
def test_the_total_goes_on_after_an_end_in_order(number: signal.Signals, after: int, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_total(path, COUNTED, read_boot_id(Path("/proc")))
    for total in (COUNTED, after):
        with open_agent(SOURCE, f"--state.file={path}") as agent:
            assert agent.samples("kvm_host_notify_window_exits_total") == {(): total}
            assert agent.samples("kvm_exporter_state_file_success") == {(): 1}
            assert read_total(path) is None, "another agent must not take it as well"
            agent.process.send_signal(number)
            agent.process.wait(30)
    assert read_total(path) == (after if number != signal.SIGKILL else None)


def test_a_boot_begins_anew_and_a_broken_file_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_total(path, COUNTED, "another boot")
    with open_agent(SOURCE, f"--state.file={path}") as agent:
        assert agent.samples("kvm_host_notify_window_exits_total") == {(): 0}
        assert agent.samples("kvm_exporter_state_file_success") == {(): 1}
    path.write_text("nonsense")
    with open_agent(SOURCE, f"--state.file={path}") as agent:
        assert agent.samples("kvm_host_notify_window_exits_total") == {(): 0}
        assert agent.samples("kvm_exporter_state_file_success") == {(): 0}
    assert any("the total of notify exits begins at 0" in line for line in agent.log)


def test_an_agent_that_cannot_know_the_boot_serves_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_total(path, COUNTED, read_boot_id(Path("/proc")))
    hide = ("unshare", "--mount", "sh", "-c", f'{PROC_SUBSET} && exec "$@"', "sh")
    with open_agent(f"--state.file={path}", prefix=hide) as agent:
        assert agent.samples("kvm_exporter_state_file_success") == {(): 0}
    assert any("the total of notify exits begins at 0" in line and "ProcSubset=pid" in line for line in agent.log)
    assert read_total(path) is None


def test_without_a_file_nothing_is_kept_and_nothing_said_of_it() -> None:
    with open_agent(SOURCE, "--state.file=") as agent:
        assert "kvm_exporter_state_file_success" not in agent.scrape()
