"""KVM's modules with the project's patches, for a Debian kernel: ``python -m tests.lab.patched [--series 6.12]``.

Decisions:

* The source is Debian's own, of exactly the version of the kernel that boots. Of it only what KVM's modules are built
  from is unpacked, over a copy of the headers that the kernel came with: ten seconds instead of a kernel's build.
* Patched headers replace those of the same name for this build alone. The three modules are built and loaded together.
* Modules get BTF, as Debian's have, based on the vmlinux that comes with the headers, or that is inside the image.
* Patches apply without fuzz or not at all: where Debian's source has moved on, a human looks.
* What was built is kept under a hash of all that it was made from.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.lab.apt import CACHE, LabError, Tree, hold_lock, open_tree, remove_unused, run, say
from tests.lab.debian import SERIES, Kernel, open_kernel
from tests.lab.modules import make_modules

PATCHES = Path(__file__).resolve().parents[2] / "kvm" / "patches"
MODULES = ("kvm", "kvm-intel", "kvm-amd")
KVM_PARTS = ("arch/x86/kvm", "arch/x86/include", "virt/kvm", "virt/lib", "include/linux/kvm*")
SOURCE_PARTS = (*KVM_PARTS, "scripts/checkpatch.pl")
LZ4_LEGACY = bytes.fromhex("02214c18")
# What the patches may touch, and the headers package has a copy of.
HEADERS = ("arch/x86/include/asm/kvm*.h", "arch/x86/include/uapi/asm/kvm*.h", "include/linux/kvm*.h")


def find_version(kernel: Kernel) -> str:
    """Returns the first two numbers of a kernel's release, as in "6.12"."""
    found = re.match(r"\d+\.\d+", kernel.release)
    if found is None:
        raise LabError(f"{kernel.release} does not begin with a version")
    return found.group()


def find_patches(version: str) -> list[Path]:
    """Returns the patches for a kernel such as "6.12", in their order; LabError where there are none."""
    patches = sorted((PATCHES / f"v{version}").glob("*.patch"))
    if not patches:
        there = ", ".join(sorted(path.name for path in PATCHES.glob("v*")))
        raise LabError(f"kvm/patches has none for Linux {version}; there are {there}")
    return patches


def open_source(kernel: Kernel) -> Tree:
    """Returns the tree with the source package of a kernel, of the same version as its image."""
    package = f"linux-source-{find_version(kernel)}"
    wanted = f"{package}={kernel.version}"
    archive = SERIES[kernel.series]
    return open_tree(package, [archive.codename, wanted], lambda: archive.fetch_alone([wanted]))


def unpack_source(kernel: Kernel, into: Path) -> None:
    """Unpacks the parts of a kernel's source that KVM and its patches are made of, below an empty directory."""
    (tarball,) = (open_source(kernel).path / "usr" / "src").glob("linux-source-*.tar.xz")
    name = tarball.name.removesuffix(".tar.xz")
    members = [f"{name}/{part}" for part in SOURCE_PARTS]
    into.mkdir(parents=True)
    # virt/lib came with 6.2: tar says that it lacks a member, and unpacks the others.
    tar = ["tar", "-xJf", str(tarball), "--wildcards", "--strip-components=1", "-C", str(into), *members]
    done = subprocess.run(tar, capture_output=True, text=True, check=False)
    missing = [part for part in SOURCE_PARTS if part != "virt/lib" and not any(into.glob(part))]
    if missing:
        raise LabError(f"{tarball.name} has no {', '.join(missing)}: {done.stderr.strip()[-500:]}")


def apply_patches(patches: Sequence[Path], source: Path) -> None:
    """Applies patches to a source tree, one after the other; LabError where one does not fit exactly."""
    for patch in patches:
        run(["patch", "--batch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", "-d", source, "-i", patch])


def overlay_headers(kernel: Kernel, source: Path, tree: Path) -> str:
    """Copies a kernel's headers to `tree`, the patched source over them; returns their common directory's name."""
    shutil.copytree(kernel.tree / "usr" / "src", tree, symlinks=True)
    (common,) = tree.glob("linux-headers-*-common")
    for part in ("arch/x86/kvm", "virt"):
        shutil.copytree(source / part, common / part, symlinks=True, dirs_exist_ok=True)
    for pattern in HEADERS:
        for header in source.glob(pattern):
            shutil.copy(header, common / header.relative_to(source))
    return common.name


def unpack_vmlinux(image: bytes, path: Path) -> None:
    """Writes the vmlinux inside a bzImage (Documentation/arch/x86/boot.rst, payload_offset); LabError if it cannot."""
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (image[0x1F1] + 1) * 512 + offset
    # The last four bytes are the kernel's own: its size when unpacked.
    payload = image[start : start + length - 4]
    if not payload.startswith(LZ4_LEGACY):
        raise LabError(f"the kernel is compressed in a way that begins with {payload[:4].hex()}, and not with lz4")
    packed = path.with_name("vmlinux.lz4")
    packed.write_bytes(payload)
    run(["lz4", "-q", "-d", "-f", packed, path])
    packed.unlink()


def add_btf_base(kernel: Kernel, tree: Path) -> list[str]:
    """Puts what BTF of modules is based on where make looks for it; returns options for make."""
    vmlinux = tree / f"linux-headers-{kernel.release}" / "vmlinux"
    if not vmlinux.exists():
        unpack_vmlinux(kernel.image.read_bytes(), vmlinux)
    # KVM has no lists of BTF ids, so that where Debian has no tool for them, it is not missed.
    tools = kernel.tree.glob("usr/lib/linux-kbuild-*/tools/bpf/resolve_btfids/resolve_btfids")
    return [] if any(tools) else ["RESOLVE_BTFIDS=true"]


def compile_modules(kernel: Kernel, patches: Sequence[Path], built: Path) -> None:
    """Compiles KVM's modules with the patches and puts them into the directory `built`."""
    work = built.with_name(f"{built.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    source, tree = work / "source", work / "src"
    unpack_source(kernel, source)
    apply_patches(patches, source)
    common = overlay_headers(kernel, source, tree)
    # Not as /work: KVM's Makefile looks for virt/kvm from where it is.
    options = [f"M=/usr/src/{common}/arch/x86/kvm", f"-j{os.cpu_count() or 1}", *add_btf_base(kernel, tree)]
    make_modules(kernel, tree, tree / common / "arch/x86/kvm", options)
    unfinished = work / "modules"
    unfinished.mkdir()
    for name in MODULES:
        shutil.move(tree / common / "arch/x86/kvm" / f"{name}.ko", unfinished)
    unfinished.rename(built)
    shutil.rmtree(work)


def build_patched(kernel: Kernel) -> Path:
    """Returns the directory with the patched modules of a kernel, built unless the cache has them."""
    patches = find_patches(find_version(kernel))
    recipe = [Path(__file__), Path(__file__).with_name("modules.py"), *patches]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in recipe) + kernel.tree.name.encode()).hexdigest()[:12]
    built = CACHE / "patched" / f"{kernel.release}-{digest}"
    with hold_lock(f"build-{kernel.series}"):
        if not built.is_dir():
            say(f"building KVM with {len(patches)} patches for {kernel.release}")
            compile_modules(kernel, patches, built)
            remove_unused(built.parent)
        built.touch()
    return built


def open_patched_kernel(series: str) -> Kernel:
    """Returns the newest kernel of a series, with KVM's modules replaced by patched ones."""
    kernel = open_kernel(series)
    return replace(kernel, patched=build_patched(kernel))


def main() -> int:
    """Builds patched modules and prints where they are."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.patched", description=main.__doc__)
    parser.add_argument("--series", action="append", choices=SERIES, help="of this series; repeatable; all without it")
    try:
        for series in parser.parse_args().series or SERIES:
            kernel = open_patched_kernel(series)
            for name in MODULES:
                print(f"{kernel.patched}/{name}.ko")
    except LabError as err:
        print(f"lab: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
