"""Makes PNGs small: few colours are enough for text and lines."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

MOST_BYTES: Final = 250_000


def shrink(path: Path) -> None:
    """Make a PNG small, in its place; raises RuntimeError where a program is missing or it is still too large."""
    for program in ("pngquant", "optipng"):
        if shutil.which(program) is None:
            raise RuntimeError(f"there is no {program}: Debian's package has it")
    quantize = ["pngquant", "--force", "--skip-if-larger", "--strip", "--speed=1", f"--output={path}", "256", str(path)]
    found = subprocess.run(quantize, check=False).returncode
    if found not in (0, 98):  # 98: it was smaller before
        raise RuntimeError(f"pngquant ended with {found}")
    subprocess.run(["optipng", "-quiet", "-o4", str(path)], check=True)
    size = path.stat().st_size
    print(f"{path.name}: {size:,} bytes")
    if size > MOST_BYTES:
        raise RuntimeError(f"{path} has {size:,} bytes, more than {MOST_BYTES:,}")
