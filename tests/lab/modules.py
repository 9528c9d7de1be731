"""The kernel modules that go into a booted kernel: KVM's own, and the injector of notify exits.

Decisions:

* The injector is built in the compilers' tree by chroot, with the kernel's headers and the source
  bound into it. That happens in a mount namespace of its own, so that nothing stays mounted even if
  the build is killed.
* Debian's modules are compressed; they are unpacked here, because busybox's insmod does not.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.lab.apt import CACHE, LabError, hold_lock, run, say
from tests.lab.debian import Kernel, open_compilers

SOURCE = Path(__file__).with_name("notify_inject")
# Virtio for the channel to the host; some kernels have it built in.
WANTED = ("virtio_pci", "virtio_console", "kvm", "kvm-amd")

# KERNEL, COMPILERS, HEADERS and WORK are directories, OPTIONS are words for make.
BUILD_SCRIPT = r"""
mkdir -p "$COMPILERS/usr/src" "$COMPILERS/work" "$COMPILERS/proc" "$COMPILERS/dev" "$COMPILERS/tmp"
mkdir -p "$COMPILERS/usr/lib/$KBUILD"
# A link that only gawk's maintainer script would make.
ln -sf gawk "$COMPILERS/usr/bin/awk"
touch "$COMPILERS/dev/null"
mount --bind /dev/null "$COMPILERS/dev/null"
mount --bind "$HEADERS" "$COMPILERS/usr/src"
mount --bind "$KERNEL/usr/lib/$KBUILD" "$COMPILERS/usr/lib/$KBUILD"
mount --bind "$WORK" "$COMPILERS/work"
# objtool finds its own program through /proc.
mount -t proc proc "$COMPILERS/proc"
# What BTF was made from has done its work then, and is ten times as large as the rest.
exec chroot "$COMPILERS" /usr/bin/env -i PATH=/usr/bin:/usr/sbin LC_ALL=C sh -ec "
    make -s -C /usr/src/linux-headers-$RELEASE $OPTIONS modules
    find /work -name '*.ko' -exec strip --strip-debug {} +"
"""


def build_injector(kernel: Kernel) -> Path:
    """Returns the path of notify_inject.ko for a kernel, built unless the cache has it."""
    sources = sorted(path for path in SOURCE.iterdir() if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    built = CACHE / "modules" / f"notify_inject-{kernel.release}-{digest}.ko"
    with hold_lock(f"build-{kernel.series}"):
        if not built.exists():
            say(f"building notify_inject for {kernel.release}")
            compile_injector(kernel, sources, built)
    return built


def make_modules(kernel: Kernel, headers: Path, work: Path, options: Sequence[str]) -> None:
    """Runs ``make modules`` in the compilers' tree, with `headers` as its /usr/src and `work` as its /work."""
    (kbuild,) = (path.name for path in (kernel.tree / "usr" / "lib").glob("linux-kbuild-*"))
    places = {"KERNEL": kernel.tree, "COMPILERS": open_compilers().path, "HEADERS": headers, "WORK": work}
    variables = {**places, "KBUILD": kbuild, "RELEASE": kernel.release, "OPTIONS": " ".join(options)}
    words = [f"{name}={value}" for name, value in variables.items()]
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    run(["unshare", *as_root, "--mount", "--pid", "--fork", "env", *words, "sh", "-ec", BUILD_SCRIPT])


def compile_injector(kernel: Kernel, sources: list[Path], built: Path) -> None:
    """Compiles the injector and puts it at `built`."""
    work = built.parent / f"work-{kernel.release}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for source in sources:
        shutil.copy(source, work)
    # Module BTF takes time, and the injector needs none.
    make_modules(kernel, kernel.tree / "usr" / "src", work, ["M=/work", "CONFIG_DEBUG_INFO_BTF_MODULES="])
    (work / "notify_inject.ko").rename(built)
    shutil.rmtree(work)


def parse_depends(module: bytes) -> list[str]:
    """Returns the names of the modules that a module says it needs, from its .modinfo."""
    found = re.search(rb"\x00depends=([^\x00]*)\x00", module)
    if found is None:
        raise LabError("a kernel module without depends= in its .modinfo")
    return [name for name in found.group(1).decode("ascii").split(",") if name]


def read_module(kernel: Kernel, name: str) -> bytes:
    """Reads one module of a kernel, decompressed; the patched one where there is one."""
    if kernel.patched is not None and (kernel.patched / f"{name}.ko").exists():
        return (kernel.patched / f"{name}.ko").read_bytes()
    # A module's name and its file's name may differ in - and _.
    pattern = re.sub("[-_]", "[-_]", name)
    found = [path for path in kernel.modules.rglob(f"{pattern}.ko*") if path.suffix in (".ko", ".xz")]
    if len(found) != 1:
        raise LabError(f"{kernel.release} has {len(found)} modules called {name}, one was expected")
    data = found[0].read_bytes()
    return lzma.decompress(data) if found[0].suffix == ".xz" else data


def read_modules(kernel: Kernel, wanted: Sequence[str] = WANTED) -> dict[str, bytes]:
    """Returns the wanted modules and all they need, by name, in the order in which they have to be loaded."""
    loaded: dict[str, bytes] = {}
    builtin = {Path(line).stem for line in (kernel.modules / "modules.builtin").read_text(encoding="ascii").split()}

    def load(name: str) -> None:
        if name not in loaded and name not in builtin:
            data = read_module(kernel, name)
            for needed in parse_depends(data):
                load(needed)
            loaded[name] = data

    for name in wanted:
        load(name)
    return loaded
