"""Shows the table of simulated snapshots; its word says what goes wrong: nothing, or a reading that hangs or fails."""

from __future__ import annotations

import logging
import sys
import threading

from exporter.commands.top import run_live
from exporter.logs.formatters import start_logging
from exporter.top.view import View
from kvm.model import Snapshot
from tests.exporter.top.scene import later, make_vm
from tests.snapshots import make_snapshot


class Reader:
    """Takes snapshots in which the VM ``db`` takes notify exits."""

    def __init__(self, trouble: str) -> None:
        self._trouble, self._taken = trouble, 0

    def read(self) -> Snapshot:
        self._taken += 1
        if self._taken == 3 and self._trouble == "hangs":
            threading.Event().wait()
        if self._taken == 3 and self._trouble == "fails":
            raise RuntimeError("the reader is broken")
        if self._taken == 3 and self._trouble == "warns":
            logging.getLogger("test").warning("a strange thing")
        vms = make_vm("web", 1), make_vm("db", 2, notify=(10 * self._taken, 0)), make_vm("日本\x1b[31m\u202e", 3)
        return later(make_snapshot(*vms), self._taken)

    def close(self) -> None:
        pass


if __name__ == "__main__":
    start_logging("warn", "logfmt")
    run_live(View(), Reader(sys.argv[1]), 0.1)
