"""The errors that leave the readers; an OSError never does."""

from __future__ import annotations


class KvmReadError(Exception):
    """The parent of what the readers raise; an OSError never leaves them."""


class SourceUnavailable(KvmReadError):
    """A way to read counters does not work on this host.

    ``reason`` says what is missing, ``remedy`` what a person can do about it ("" where nothing can be done).
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy


class MalformedData(KvmReadError):
    """Bytes or text from outside make no sense; ``origin`` says where they came from."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(f"{origin}: {reason}")
        self.origin = origin
        self.reason = reason


class VmGone(KvmReadError):
    """The VM ended while it was being read: normal life, not a fault."""
