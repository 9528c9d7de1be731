"""Writes the dashboards; with ``--check`` says only which of them would change, and exits with 1 if any would."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana.builder import fleet, host, vm

DASHBOARDS = Path(__file__).parent.parent / "dashboards"


def render_files() -> dict[str, str]:
    """Return the text of each file in ``grafana/dashboards/``, by name."""
    dashboards = (fleet.render(), host.render(), vm.render())
    return {f"{d['uid']}.json": json.dumps(d, indent=2, ensure_ascii=False) + "\n" for d in dashboards}


def main(arguments: list[str], directory: Path = DASHBOARDS) -> int:
    """Write what changed, and say so."""
    check = arguments == ["--check"]
    if arguments and not check:
        print("usage: python -m grafana.builder [--check]", file=sys.stderr)
        return 2
    changed = 0
    for name, text in render_files().items():
        path = directory / name
        if path.exists() and path.read_text() == text:
            continue
        changed += 1
        print(f"{'would write' if check else 'wrote'} {path}")
        if not check:
            path.write_text(text)
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
