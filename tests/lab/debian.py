"""What the lab takes from Debian: QEMU 10, kernels with headers, a compiler, the guest's userland.

Decisions:

* QEMU 10 comes from bookworm-backports, unpacked into the cache beside the system's own QEMU 7.2,
  which other tests need. A small wrapper script sets the library path and ``exec``s the binary, so
  the process looks like any QEMU: its own executable, command line and thread names.
* A kernel is the newest of its series that the archive has: backports move on, and a pinned version
  would vanish. Only packages called ``linux-*`` are followed (from 7.x on the image package is almost
  empty, and the kernel and its modules are dependencies); boot loaders and initramfs tools are not wanted.
* Modules are built in a directory with the compilers of trixie, entered by chroot: 7.x wants gcc 14,
  which Debian 12 does not have, and with one place for all series the host needs no compiler.
* libc is left out of that tree: a program must use the libc that belongs to the dynamic loader
  which starts it, and that is the host's.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.lab.apt import CACHE, Archive, LabError, Tree, open_closure, open_tree

BOOKWORM = Archive("bookworm")
TRIXIE = Archive("trixie")

QEMU_WRAPPER = """#!/bin/sh
# QEMU {version}, unpacked and not installed.
LD_LIBRARY_PATH={tree}/usr/lib/x86_64-linux-gnu${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}
QEMU_MODULE_DIR={tree}/usr/lib/x86_64-linux-gnu/qemu
export LD_LIBRARY_PATH QEMU_MODULE_DIR
exec {tree}/usr/bin/qemu-system-x86_64 -L {tree}/usr/share/qemu -L {tree}/usr/share/seabios \\
    -L {tree}/usr/lib/ipxe/qemu "$@"
"""


SERIES = {"6.1": BOOKWORM, "6.12": BOOKWORM, "7": TRIXIE}
KERNEL_PARTS = re.compile(r"linux-(binary-|modules-|headers-|kbuild-|base-[0-9])")


@dataclass(frozen=True)
class Kernel:
    """One Debian kernel, unpacked with its modules and headers."""

    series: str
    release: str
    version: str
    tree: Path
    # Where modules are that take the place of the kernel's own.
    patched: Path | None = None

    @property
    def image(self) -> Path:
        """The kernel that QEMU boots."""
        places = [self.tree / "boot" / f"vmlinuz-{self.release}", self.modules / "vmlinuz"]
        for place in places:
            if place.exists():
                return place
        raise LabError(f"{self.release} has no kernel at {' nor at '.join(map(str, places))}")

    @property
    def modules(self) -> Path:
        """The directory below which the kernel's modules are."""
        return self.tree / "lib" / "modules" / self.release


def parse_numbers(name: str) -> list[int]:
    """Returns the numbers in a package name, by which kernels of one series sort by age."""
    return [int(digits) for digits in re.findall(r"\d+", name)]


def find_newest_image(archive: Archive, series: str) -> str:
    """Returns the name of the newest image package of a series; LabError where there is none."""
    names = archive.find_names(rf"^linux-image-{re.escape(series)}\.[0-9].*-cloud-amd64$")
    if not names:
        raise LabError(f"{archive.codename} has no cloud kernel of series {series}")
    return max(names, key=parse_numbers)


def fetch_kernel(archive: Archive, series: str) -> list[Path]:
    """Downloads the newest kernel of a series with its modules and headers."""
    image = find_newest_image(archive, series)
    packages: list[str] = []
    unseen = [image, image.replace("linux-image-", "linux-headers-")]
    while unseen:
        package = unseen.pop()
        packages.append(package)
        depends = archive.read_depends(package)
        unseen += [name for name in depends if KERNEL_PARTS.match(name) and name not in packages + unseen]
    return archive.fetch_alone(packages)


def open_kernel(series: str) -> Kernel:
    """Returns the newest kernel of a series: "6.1", "6.12" or "7"."""
    if series not in SERIES:
        raise LabError(f"no kernel series {series!r}; there are {', '.join(SERIES)}")
    archive = SERIES[series]
    tree = open_tree(f"linux-{series}", [series, KERNEL_PARTS.pattern], lambda: fetch_kernel(archive, series))
    image = next(deb.split("_")[0] for deb in tree.debs if deb.startswith("linux-image-"))
    return Kernel(series, image.removeprefix("linux-image-"), tree.version(image), tree.path)


def open_compilers() -> Tree:
    """Returns a tree to chroot into that can build modules for every series."""
    packages = ["gcc-14", "gcc-12", "make", "pahole", "libelf1t64", "libssl3t64", "dash", "coreutils", "sed", "gawk"]
    return open_closure("compilers", TRIXIE, [*packages, "grep", "findutils", "diffutils"])


def open_userland() -> Tree:
    """Returns the tree of what a booted kernel runs: busybox, Python 3.11 and libbpf."""
    return open_closure("userland", BOOKWORM, ["busybox-static", "python3.11", "libbpf1"])


def open_qemu10_tree() -> Tree:
    """Returns the tree that holds QEMU 10 and its libraries."""
    return open_closure(
        "qemu10", BOOKWORM, ["qemu-system-x86"], release="bookworm-backports", without=["libc6", "libc-bin"]
    )


def find_qemu10() -> Path:
    """Returns the path of an executable that runs QEMU 10's ``qemu-system-x86_64`` on this host."""
    tree = open_qemu10_tree()
    wrapper = CACHE / "bin" / f"{tree.path.name}-system-x86_64"
    text = QEMU_WRAPPER.format(version=tree.version("qemu-system-x86"), tree=tree.path)
    if not wrapper.exists() or wrapper.read_text() != text:  # a cache that was moved has the old place in it
        wrapper.parent.mkdir(parents=True, exist_ok=True)
        unfinished = wrapper.with_name(f"{wrapper.name}.{os.getpid()}")
        unfinished.write_text(text)
        unfinished.chmod(0o755)
        unfinished.rename(wrapper)
    return wrapper


def main() -> int:
    """Fetches what is named and prints where it is."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.debian", description=main.__doc__)
    parser.add_argument("what", choices=["qemu10", "kernels", "all"], help="print a path, or what would boot")
    what = parser.parse_args().what
    try:
        if what in ("kernels", "all"):
            for series in SERIES:
                kernel = open_kernel(series)
                print(series, kernel.release, kernel.version)
        if what in ("qemu10", "all"):
            print(find_qemu10())
        if what == "all":
            print(open_compilers().path, open_userland().path, sep="\n")
    except LabError as err:
        print(f"lab: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
