"""Reads single vCPUs, by the source that reads the host: BPF where it works, else stats fds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvm.errors import SourceUnavailable
from kvm.model import VcpuState, VmKey


class VcpuSource(Protocol):
    """A counter source that reads single vCPUs, too.

    ``tells_rips`` is whether they come with KVM's own word for where their notify exits were (``kvm/patches``).
    """

    name: str

    @property
    def is_open(self) -> bool: ...  # noqa: D102
    @property
    def tells_rips(self) -> bool: ...  # noqa: D102
    def read_vcpu(self, key: VmKey, vcpu_id: int) -> VcpuState | None: ...  # noqa: D102


class VcpuSources:
    """These sources as one; the best comes first, and reads alone while it is open."""

    def __init__(self, sources: Sequence[VcpuSource]) -> None:
        self._sources = tuple(sources)

    @property
    def rip_sources(self) -> frozenset[str]:
        """The names of sources whose vCPUs KVM itself tells of: of vCPUs that another one counts it tells nothing."""
        source = self._find_open()
        return frozenset({source.name} if source is not None and source.tells_rips else ())

    def read_vcpu(self, key: VmKey, vcpu_id: int) -> VcpuState | None:
        """Read one vCPU of the newest snapshot, None if it is gone or that source does not have it.

        Raises SourceUnavailable.
        """
        source = self._find_open()
        if source is None:
            raise SourceUnavailable("no source that reads single vCPUs is open")
        return source.read_vcpu(key, vcpu_id)

    def _find_open(self) -> VcpuSource | None:
        return next((source for source in self._sources if source.is_open), None)
