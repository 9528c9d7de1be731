"""Readers from before the patches, which know nothing of them and relocate against vmlinux alone, read as they did."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.lab.inside.kvm_readers import read_vcpu_statistics
from tests.live import GuestProcess

pytestmark = pytest.mark.usefixtures("injector")

ARCHIVE = Path(__file__).parents[3] / "fixtures/before_patches/kvm.tar.xz"
# What an agent of then did at a snapshot, and, by BPF, for a verdict.
READ = """
import json, sys
from pathlib import Path
from kvm.counters.bpf import BpfSource
from kvm.counters.stats_fd import StatsFdSource
from kvm.discovery.vm_discovery import Discovery

def fail(*trouble):
    raise SystemExit(str(trouble))

wanted, pid = ("exits", "notify_window_exits"), int(sys.argv[1])
bpf, stats_fd = BpfSource(wanted), StatsFdSource(wanted, fail)
bpf.open()
stats_fd.open()
held = [vm for vm in Discovery(Path("/proc"), fail).find_vms() if vm.key.pid == pid]
read = {"bpf": bpf.read(), "stats_fd": stats_fd.read(held)}
print(json.dumps({
    "method": bpf.method,
    "counters": {
        source: [{"ids": vm.vcpu_ids, "tids": vm.tids, "counts": dict(vm.per_vcpu), "window": vm.notify_window_cycles}
                 for key, vm in found.items() if key.pid == pid]
        for source, found in read.items()
    },
    "states": [
        {"tid": state.tid, "registers": dict(state.registers), "statistics": dict(state.statistics)}
        for key, vm in read["bpf"].items() if key.pid == pid
        for state in (bpf.read_vcpu(key, vcpu_id) for vcpu_id in vm.vcpu_ids)
    ],
}))
"""


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the readers of before are."""
    path = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        for member in archive.getmembers():
            if (file := archive.extractfile(member)) is not None:
                (path / member.name).parent.mkdir(parents=True, exist_ok=True)
                (path / member.name).write_bytes(file.read())
    return path


def read_as_before(before: Path, guest: GuestProcess) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", READ, str(guest.pid)], cwd=before, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_counters_threads_and_windows_are_read_right(before: Path, fresh: GuestProcess) -> None:
    fresh.notify(0, exits=321)
    fresh.wait_for("done")
    found = read_as_before(before, fresh)
    assert found["method"] == "list"
    own = [read_vcpu_statistics(fresh, vcpu) for vcpu in fresh.vcpus]
    expected = {name: [counts[name] for counts in own] for name in ("exits", "notify_window_exits")}
    assert expected["notify_window_exits"] == [321, 0]
    by_bpf, by_stats_fd = (found["counters"][source] for source in ("bpf", "stats_fd"))
    assert [vm["counts"] for vm in (*by_bpf, *by_stats_fd)] == [expected, expected]
    assert [vm["ids"] for vm in (*by_bpf, *by_stats_fd)] == [[vcpu.vcpu_id for vcpu in fresh.vcpus]] * 2
    assert by_bpf[0]["tids"] == [vcpu.tid for vcpu in fresh.vcpus]
    assert by_bpf[0]["window"] == 0  # nobody has armed it


def test_registers_and_all_statistics_of_a_vcpu_are_read_right(before: Path, fresh: GuestProcess) -> None:
    fresh.notify(0, exits=5, qualification=0x1234, vectoring=0x5678)
    done = fresh.wait_for("done")
    state, other = read_as_before(before, fresh)["states"]
    assert {name: state["registers"][name] for name in state["registers"]} == {
        name: done["registers"][name] for name in state["registers"]
    }
    assert (state["registers"]["r8"], state["registers"]["r9"]) == (0x1234, 0x5678)
    own = read_vcpu_statistics(fresh, fresh.vcpus[0])
    assert {name: values[0] for name, values in state["statistics"].items()} == own
    assert [state["tid"], other["tid"]] == [vcpu.tid for vcpu in fresh.vcpus]
