"""How to serve: paths, limits and times."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from typing import Final

from exporter.web.listeners import Address, TcpAddress
from exporter.web.peer_credentials import TrustedPeers

VCPUS_PATH: Final = "/api/v1/vcpus"
DRILL_PATH: Final = "/-/drill"
DRILL_HEADER: Final = "X-Kvm-Notify-Drill"
STATUS_PATH: Final = "/-/status"
HEALTHY_PATH: Final = "/-/healthy"
READY_PATH: Final = "/-/ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusLimits:
    """What the status page may cost.

    The host is read for it at most every ``snapshot_seconds``, and is waited for ``snapshot_wait_seconds``. What is
    known is put together every ``view_seconds`` at most, and more seldom, up to ``max_view_seconds``, where that would
    take more than ``view_share`` of a CPU. While a vCPU takes notify exits the host is read every ``sample_seconds``.
    Searches have ``search_share`` of a CPU, of which they may save up ``search_burst_seconds``; ``searches`` may be
    under way at once, and ``answers`` kept.
    """

    snapshot_seconds: float = 2.0
    snapshot_wait_seconds: float = 0.5
    view_seconds: float = 0.5
    max_view_seconds: float = 2.0
    view_share: float = 0.05
    sample_seconds: float = 5.0
    search_share: float = 0.05
    search_burst_seconds: float = 0.5
    searches: int = 8
    answers: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How to serve.

    ``addresses`` are where to listen, ``telemetry_path`` where the metrics are, ``max_requests`` how many documents may
    be under way at once (0: any number), ``exporter_metrics`` whether the process_* and python_* metrics of the agent
    itself are among them, ``host_name`` how the status page calls this machine, ``trusted_peers`` who at the Unix
    socket sees details. ``optional_addresses`` are listened on where that can be, ``passed_sockets`` listen
    already; a host that ``is_simulated`` has no secrets. Raises ValueError for a path that cannot be served.
    """

    addresses: tuple[Address, ...] = (TcpAddress("", 9750),)
    telemetry_path: str = "/metrics"
    max_requests: int = 40
    exporter_metrics: bool = True
    host_name: str = ""
    trusted_peers: TrustedPeers = field(default_factory=lambda: TrustedPeers(os.geteuid()))
    optional_addresses: tuple[Address, ...] = ()
    passed_sockets: tuple[socket.socket, ...] = ()
    is_simulated: bool = False
    write_seconds: float = 30.0
    # Once for requests under way, and once for the snapshot that is: the agent is to end within 2 s.
    drain_seconds: float = 0.75
    status: StatusLimits = field(default_factory=StatusLimits)

    def __post_init__(self) -> None:
        check_telemetry_path(self.telemetry_path)


def check_telemetry_path(path: str) -> str:
    """Return a path at which the metrics may be; raises ValueError for another."""
    if not path.startswith("/") or not path.isprintable() or any(char in path for char in "{}?#%\\ "):
        raise ValueError(f"telemetry path {path!r}: want a plain path such as /metrics")
    if path in (HEALTHY_PATH, READY_PATH, VCPUS_PATH, DRILL_PATH, STATUS_PATH):
        raise ValueError(f"telemetry path {path!r} is taken by the agent itself")
    return path
