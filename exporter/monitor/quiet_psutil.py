"""Imports psutil without the traceback that its release in Debian 12 prints where /proc/stat is missing.

It goes on without harm there: that file is for CPU times of the whole machine, which nobody asks for here.
"""

from __future__ import annotations

import contextlib
import io

with contextlib.redirect_stderr(io.StringIO()):
    import psutil

__all__ = ["psutil"]
