"""Tells the service manager how the agent does: sd_notify(3), a datagram of assignments to the socket NOTIFY_SOCKET.

Written here and not taken from a library: it is one datagram, and what there is for Python leaves the variables to be
inherited by children, waits where the socket is full, or needs a compiler.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import MutableMapping
from types import TracebackType
from typing import Final, Self

from exporter.logs.rate_limit import RateLimitedLog

log = logging.getLogger(__name__)

MAX_STATUS: Final = 300


class ServiceManager:
    """Whoever listens at NOTIFY_SOCKET; nobody, and nothing is sent, where the address is "".

    ``watchdog_seconds`` is how long it waits for a sign of life, None where it does not ask for any.
    """

    def __init__(self, address: str = "", watchdog_seconds: float | None = None) -> None:
        self.watchdog_seconds = watchdog_seconds
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        self._rate_limited_log = RateLimitedLog()
        if self._socket:
            self._socket.setblocking(False)

    @property
    def listens(self) -> bool:
        """Whether there is anybody to tell."""
        return self._socket is not None

    def tell(self, **assignments: str | int) -> bool:
        """Send assignments, as READY=1, and tell whether that was done; what cannot be sent is logged."""
        if self._socket is None:
            return False
        lines = [f"{name}={clean_value(str(value))}" for name, value in assignments.items()]
        try:
            self._socket.sendto("\n".join(lines).encode(errors="replace"), self._address)
        except OSError as err:
            names = ",".join(assignments)
            self._rate_limited_log.write(logging.WARNING, "the service manager is not told", what=names, err=str(err))
            return False
        return True

    def tell_reloading(self) -> None:
        """Say that files are read anew, until READY says that this is done."""
        self.tell(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._socket:
            self._socket.close()


def open_service_manager(environment: MutableMapping[str, str], pid: int) -> ServiceManager:
    """Open the way to the service manager of this process, and take its variables away: they are not for children."""
    address = environment.pop("NOTIFY_SOCKET", "")
    timeout, addressee = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
    if address and not address.startswith(("/", "@")):
        log.warning("the service manager is not told", extra={"fields": {"err": f"NOTIFY_SOCKET={address} is no path"}})
        address = ""
    watchdog_seconds = None
    if address and timeout.isascii() and timeout.isdigit() and int(timeout) and addressee in ("", str(pid)):
        watchdog_seconds = int(timeout) / 1e6
    return ServiceManager(address, watchdog_seconds)


def clean_value(text: str) -> str:
    """Return text as it may stand in an assignment: a line break would begin another one."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:MAX_STATUS])
