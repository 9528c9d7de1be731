"""Makes processes that do nothing, as fast as it can, and holds them until the end of its input: ``COUNT``."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import AbstractContextManager

from tests.hostile.held import hold, open_children, open_held


def main(count: int) -> None:
    """Make them and hold them."""
    with open_children() as children:
        for _ in range(count):
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(0)
            children.append(child)
        hold()


def open_strangers(count: int) -> AbstractContextManager[int]:
    """Hold so many processes, new ones."""
    return open_held([sys.executable, "-m", "tests.hostile.strangers", str(count)])


if __name__ == "__main__":
    main(int(sys.argv[1]))
