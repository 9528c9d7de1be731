"""Sends log records to the journal with their fields, where stderr is the journal anyway.

systemd says so by JOURNAL_STREAM (systemd.exec(5)). The protocol is journald's native one (systemd.io,
JOURNAL_NATIVE_PROTOCOL): a datagram of fields, values with line breaks with their length before them, so that no
untrusted text can forge a field. The fields of a record are called KVM_*; ``journalctl KVM_VM=...`` finds them.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from exporter.logs.formatters import build_fields, render_logfmt

SOCKET: Final = Path("/run/systemd/journal/socket")
IDENTIFIER: Final = "kvm-notify-exporter"
# syslog(3): LOG_ERR, LOG_WARNING, LOG_INFO, LOG_DEBUG
_PRIORITIES: Final = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))
_LENGTH: Final = struct.Struct("<Q")


def is_journal(environment: Mapping[str, str], fd: int) -> bool:
    """Tell whether an fd is the stream to the journal that systemd has opened for us."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def encode_fields(fields: Mapping[str, str]) -> bytes:
    """Encode fields for the journal; names become what it takes: capitals, digits and underscores, 64 at most."""
    lines = []
    for name, text in fields.items():
        key = re.sub(r"[^A-Z0-9_]", "_", name.upper()).lstrip("_0123456789")[:64].encode()
        value = text.encode(errors="replace")
        lines.append(key + (b"\n" + _LENGTH.pack(len(value)) if b"\n" in value else b"=") + value + b"\n")
    return b"".join(lines)


class JournalHandler(logging.Handler):
    """Sends each record as a datagram; ``fallback`` takes those that the journal does not."""

    def __init__(self, fallback: logging.Handler, path: Path = SOCKET) -> None:
        super().__init__()
        self._fallback = fallback
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record; a journal that is full, or being started anew, costs only the fields."""
        try:
            self._socket.sendto(encode_fields(name_fields(record)), str(self._path))
        except OSError:
            self._fallback.handle(record)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


def name_fields(record: logging.LogRecord) -> dict[str, str]:
    """Return the record's fields by the names that the journal knows them by."""
    fields = build_fields(record)
    known = {"time", "level", "msg"}
    rest = {name: value for name, value in fields.items() if name not in known}
    named = {
        "MESSAGE": " ".join(filter(None, (str(fields["msg"]), render_logfmt(rest)))),
        "PRIORITY": str(next((number for level, number in _PRIORITIES if record.levelno >= level), 7)),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
    }
    if message_id := getattr(record, "message_id", ""):
        named["MESSAGE_ID"] = str(message_id)
    return named | {f"KVM_{name.removeprefix('kvm_')}": str(value) for name, value in rest.items()}


def use_journal(environment: Mapping[str, str], fd: int, path: Path = SOCKET) -> bool:
    """Let the root logger write to the journal where ``fd`` leads there; tells whether it does."""
    root = logging.getLogger()
    if not is_journal(environment, fd) or not path.exists():
        return False
    root.handlers[:] = [JournalHandler(handler, path) for handler in root.handlers]
    return True
