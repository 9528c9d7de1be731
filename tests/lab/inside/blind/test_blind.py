"""Ways to be blind that take a real Debian kernel: perf_event_paranoid 3, and debugfs that is open."""

from __future__ import annotations

from pathlib import Path

from tests.blind.scene import Scene
from tests.blind.ways import Way, without
from tests.lab.inside.blind.check import Record, check_way

PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")


def test_debugfs_alone_reads_every_vm(scene: Scene, record_testsuite_property: Record) -> None:
    way = Way(name="debugfs only, no lockdown", sources="debugfs")
    check_way(way, scene, record_testsuite_property)


def test_where_perf_events_take_cap_sys_admin_that_is_said(scene: Scene, record_testsuite_property: Record) -> None:
    assert int(PARANOID.read_text()) >= 3  # Debian's default, and Debian's patch
    way = Way(name="perf_event_paranoid=3, no CAP_SYS_ADMIN", held=without("CAP_SYS_ADMIN"))
    answers = check_way(way, scene, record_testsuite_property)
    assert "kernel.perf_event_paranoid is 3 or more" in answers.api["problem"]
    assert "kernel.perf_event_paranoid is 3 or more" in answers.check.text
    assert "kvm_host_vcpus_no_forward_progress" not in answers.families
