"""A psutil that complains while it is imported, as Debian 12's does without /proc/stat, spoils no journal.

That one itself is met by `tests/deploy/test_blind_installed.py`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMPLAINS = "import traceback\ntry:\n    open('/proc/self/none')\nexcept OSError:\n    traceback.print_exc()\n"
IMPORT = "from exporter.monitor.quiet_psutil import psutil; import sys; print(psutil.MARK, file=sys.stderr)"


@pytest.mark.parametrize(
    ("text", "last_line"),
    [(f"{COMPLAINS}MARK = 'here'\n", "here"), ("raise ImportError('broken')\n", "ImportError: broken")],
    ids=["complains", "fails"],
)
def test_what_it_says_is_not_passed_on_and_its_failure_is(text: str, last_line: str, tmp_path: Path) -> None:
    (tmp_path / "psutil.py").write_text(text)
    words = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; {IMPORT}"]
    said = subprocess.run(words, capture_output=True, text=True, check=False).stderr
    assert said.splitlines()[-1] == last_line
    assert ("Traceback" in said) == ("raise" in text)
