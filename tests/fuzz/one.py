"""Fuzzes one target in this process, by libFuzzer's flags: ``python -m tests.fuzz.one TARGET FLAGS``."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["kvm", "exporter"]):
    from tests.fuzz.targets import feed


def main() -> None:
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, lambda data: feed(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
