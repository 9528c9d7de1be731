"""Reads single vCPUs, their registers and counters, where that works; where not, says once why."""

from __future__ import annotations

import logging
from collections.abc import Callable

from exporter.monitor.trace_budget import VcpuKey
from exporter.monitor.trace_session import Reading
from kvm.model import SourceUnavailable, VmKey

log = logging.getLogger(__name__)


class SingleReads:
    """What reads a vCPU; ``left_out`` while that does not work. ``read_vcpu`` is None where nothing can."""

    def __init__(self, read_vcpu: Callable[[VmKey, int], Reading | None] | None) -> None:
        self.left_out = read_vcpu is None
        self._read_vcpu = read_vcpu
        self._problem = ""

    def try_again(self) -> None:
        """Let the next read be tried, whatever has become of the last ones."""
        self.left_out = self._read_vcpu is None

    def read(self, key: VcpuKey) -> Reading | None:
        """Read one vCPU, None where it is gone or cannot be read; in a worker thread."""
        if self._read_vcpu is None or self.left_out:
            return None
        try:
            return self._read_vcpu(key.vm, key.vcpu_id)
        except SourceUnavailable as err:
            self.left_out = True
            if str(err) != self._problem:
                self._problem = str(err)
                fields = {"why": err.reason, "remedy": err.remedy}
                log.warning("registers cannot be read: a long REP will look like a stall", extra={"fields": fields})
            return None
