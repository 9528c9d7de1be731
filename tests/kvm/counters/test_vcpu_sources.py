"""Which source reads single vCPUs, and of which vCPUs KVM itself tells."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvm.counters.vcpu_sources import VcpuSources
from kvm.errors import SourceUnavailable
from kvm.model import VcpuState, VmKey

KEY = VmKey(1, 2, 3)


@dataclass
class Source:
    name: str
    is_open: bool = True
    tells_rips: bool = True

    def read_vcpu(self, key: VmKey, vcpu_id: int) -> VcpuState | None:
        return VcpuState(vcpu_id, key.pid, {self.name: 1}, frozenset(), {}) if vcpu_id == 7 else None


def test_the_best_open_source_reads_alone() -> None:
    bpf, stats_fd = Source("bpf"), Source("stats_fd")
    sources = VcpuSources([bpf, stats_fd])
    for is_open, expected in ((True, "bpf"), (False, "stats_fd")):
        bpf.is_open = is_open
        state = sources.read_vcpu(KEY, 7)
        assert state is not None
        assert set(state.registers) == {expected}
        assert sources.rip_sources == {expected}
    assert sources.read_vcpu(KEY, 8) is None


def test_what_the_other_source_could_tell_of_vcpus_that_it_does_not_count_is_not_claimed() -> None:
    sources = VcpuSources([Source("bpf", tells_rips=False), Source("stats_fd")])
    assert sources.rip_sources == frozenset()


def test_where_none_is_open_that_is_said() -> None:
    for sources in (VcpuSources([]), VcpuSources([Source("bpf", is_open=False)])):
        assert sources.rip_sources == frozenset()
        with pytest.raises(SourceUnavailable):
            sources.read_vcpu(KEY, 7)
