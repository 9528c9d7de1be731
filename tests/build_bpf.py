"""Builds the BPF objects that stand in the repository: ``python -m tests.build_bpf``.

It takes Debian's clang-14, llvm-14, libbpf-dev and linux-libc-dev. The same compiler makes the same bytes wherever
the repository lies: sources are named relative to their directory.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CLANG = "clang-14"
STRIP = "llvm-strip-14"
SOURCES = Path(__file__).parents[1] / "kvm" / "bpf" / "programs"
# What each object is made of, and the macros for that.
OBJECTS = {
    "vcpus.bpf.o": ("vcpus.bpf.c",),
    "vcpus_direct.bpf.o": ("vcpus.bpf.c", "-DDIRECT_LOADS"),
    "notify.bpf.o": ("notify.bpf.c",),
}


def build(name: str, target: Path, sources: Path = SOURCES) -> None:
    """Compile one object of these sources into ``target``; raises CalledProcessError or FileNotFoundError."""
    # BTF v3 instructions (32-bit jumps and arithmetic) are known since Linux 5.1; asm/types.h stands in the directory
    # of the host's architecture, which clang does not search for this target.
    command = [CLANG, "-g", "-O2", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v3", "-I/usr/include/x86_64-linux-gnu"]
    command += [f"-ffile-prefix-map={sources}=.", "-c", *OBJECTS[name], "-o", str(target)]
    subprocess.run(command, check=True, cwd=sources)
    subprocess.run([STRIP, "--strip-debug", str(target)], check=True)


def main() -> int:
    """Build all objects in their place."""
    for name in OBJECTS:
        build(name, SOURCES / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
