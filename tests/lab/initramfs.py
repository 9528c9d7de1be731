"""What a booted kernel finds as its root: layers, of which only a small one is made for each run.

======== ======================================================================= ===================
layer    holds                                                                   made when
======== ======================================================================= ===================
userland busybox, Debian's Python 3.11 with its library compiled, libbpf         Debian updates it
qemu     QEMU 10 below /opt/qemu10, for guests inside the lab                    Debian updates it
packages the project's Python dependencies, and pytest with hypothesis           their versions change
modules  KVM for AMD, virtio, and the injector                                    kernel, injector
project  kvm/, exporter/, tests/, and what is to be run                          each run
======== ======================================================================= ===================

Decisions:

* Python files are compiled here, with the lab's own Python and marked as unchecked: under emulation
  compiling costs seconds, and the kernel's clock says nothing about files in an initramfs.
* The dependencies are those that the running environment has installed, so the lab tests what the other
  tests test. Their compiled parts must be for the Python that Debian has: 3.11.
* Nothing is compressed: unpacking is the slow part under emulation.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.lab.apt import CACHE, LabError, Tree, hold_lock, remove_unused, run, say
from tests.lab.cpio import CpioWriter
from tests.lab.debian import QEMU_WRAPPER, Kernel, open_qemu10_tree, open_userland
from tests.lab.modules import build_injector, read_modules

ROOT = Path(__file__).resolve().parents[2]
GUEST_PYTHON = "python3.11"
TEST_PACKAGES = ("pytest", "hypothesis")
PROJECT_PARTS = ("kvm", "exporter", "tests", "pyproject.toml")
NOT_IN_THE_LAB = re.compile(r"(^|/)(__pycache__|\.pytest_cache|bench)(/|$)")
UNUSED_LIBRARY = re.compile(
    r"usr/lib/(python3\.11/(idlelib|ensurepip|lib2to3|pydoc_data|distutils|tkinter|turtledemo|test|config-)|dpkg|tmpfiles)"
)
UNUSED_QEMU = re.compile(r"usr/share/qemu/(.*(ppc|sparc|hppa|s390|u-boot|skiboot|slof|palcode|efi|npcm|trace)|keymaps)")


def build_layer(name: str, key: Sequence[str], fill: Callable[[CpioWriter], None]) -> Path:
    """Returns the path of a layer, filled unless the cache has it for this key and this recipe."""
    parts = ("initramfs.py", "modules.py", "cpio.py", "guest_init.sh")
    recipe = b"".join(Path(__file__).with_name(part).read_bytes() for part in parts)
    digest = hashlib.sha256(recipe + json.dumps([name, *key]).encode()).hexdigest()[:12]
    path = CACHE / "layers" / f"{name}-{digest}.cpio"
    with hold_lock(f"layer-{name}"):
        if not path.exists():
            say(f"building the layer {path.name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            with unfinished.open("wb") as file:
                writer = CpioWriter(file)
                fill(writer)
                writer.close()
            unfinished.rename(path)
            remove_unused(path.parent)
    os.utime(path)
    return path


def compile_python(userland: Tree, directory: Path, root: Path) -> None:
    """Compiles the Python files below a directory as the lab's Python would; names in them start at `root`."""
    libraries = userland.path / "usr" / "lib" / "x86_64-linux-gnu"
    loader: list[str | Path] = [libraries / "ld-linux-x86-64.so.2", "--library-path", libraries]
    python = [*loader, userland.path / "usr" / "bin" / GUEST_PYTHON]
    options: list[str | Path] = ["-q", "--invalidation-mode", "unchecked-hash", "-s", root, "-p", "/"]
    home = f"PYTHONHOME={userland.path / 'usr'}"
    run(["env", "-u", "PYTHONPATH", home, *python, "-m", "compileall", *options, directory])


def build_userland_layer(userland: Tree) -> Path:
    """Builds the layer with the programs that run inside."""

    def fill(writer: CpioWriter) -> None:
        library = userland.path / "usr" / "lib" / GUEST_PYTHON
        compile_python(userland, library, userland.path)
        writer.add_file("init", Path(__file__).with_name("guest_init.sh").read_bytes(), executable=True)
        for directory in ("proc", "sys", "dev", "tmp", "run", "root", "etc"):
            writer.add_directory(directory)
        for program in ("busybox", GUEST_PYTHON):
            writer.add_file(f"usr/bin/{program}", (userland.path / "usr" / "bin" / program).read_bytes(), True)
        writer.add_link("usr/bin/python3", GUEST_PYTHON)
        writer.add_file("etc/passwd", b"root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
        writer.add_file("etc/group", b"root:x:0:\nnogroup:x:65534:\n")
        writer.add_tree(userland.path, "", is_library)

    return build_layer("userland", [userland.path.name], fill)


def is_library(path: str) -> bool:
    """Says whether a path of the userland tree is one that programs need to start."""
    inside = path in ("bin", "sbin", "lib", "lib64") or path.startswith(("usr/lib/", "usr/lib64/"))
    return inside and not UNUSED_LIBRARY.match(path)


def build_qemu_layer(qemu: Tree) -> Path:
    """Builds the layer with QEMU 10, which runs with -accel kvm inside."""

    def is_needed(path: str) -> bool:
        parts = ("usr/lib/x86_64-linux-gnu", "usr/share/qemu", "usr/share/seabios", "usr/bin/qemu-system-x86_64", "lib")
        return path.startswith(parts) and not UNUSED_QEMU.match(path)

    def fill(writer: CpioWriter) -> None:
        writer.add_tree(qemu.path, "opt/qemu10", is_needed)
        wrapper = QEMU_WRAPPER.format(version=qemu.version("qemu-system-x86"), tree="/opt/qemu10")
        writer.add_file("usr/bin/qemu-system-x86_64", wrapper.encode(), executable=True)

    return build_layer("qemu", [qemu.path.name], fill)


def find_distributions() -> list[importlib.metadata.Distribution]:
    """Returns what the project and its tests need, with what that needs, as installed in this environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    unseen = [*project["dependencies"], *TEST_PACKAGES]
    found: dict[str, importlib.metadata.Distribution] = {}
    while unseen:
        requirement = unseen.pop()
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        wanted_directly = ";" not in requirement
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as err:
            # A requirement with a condition is for another platform or an extra unless it is installed.
            if wanted_directly:
                raise LabError(f"{name} is not installed beside {sys.executable}, the lab takes it from there") from err
            continue
        if "extra ==" not in requirement and distribution.name not in found:
            found[distribution.name] = distribution
            unseen += distribution.requires or []
    return sorted(found.values(), key=lambda distribution: distribution.name)


def build_packages_layer(userland: Tree) -> Path:
    """Builds the layer with the project's dependencies."""
    if sys.version_info[:2] != (3, 11):
        raise LabError(f"the lab runs Debian's Python 3.11 and cannot use packages of {sys.version.split()[0]}")
    distributions = find_distributions()

    def fill(writer: CpioWriter) -> None:
        with open_stage("packages") as stage:
            site = stage / "usr/lib/python3/dist-packages"
            for distribution in distributions:
                for file in distribution.files or []:
                    if ".." not in file.parts and file.suffix != ".pyc":
                        (site / file).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(str(file.locate()), site / file)
            compile_python(userland, site, stage)
            writer.add_tree(stage)

    versions = [f"{distribution.name} {distribution.version}" for distribution in distributions]
    return build_layer("packages", [userland.path.name, *versions], fill)


@contextmanager
def open_stage(name: str) -> Iterator[Path]:
    """Yields an empty directory of this process alone, removed afterwards."""
    CACHE.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f"stage-{name}-", dir=CACHE))
    try:
        yield stage
    finally:
        shutil.rmtree(stage)


def build_modules_layer(kernel: Kernel) -> Path:
    """Builds the layer with the modules of a kernel and the injector."""
    injector = build_injector(kernel)

    def fill(writer: CpioWriter) -> None:
        modules = read_modules(kernel)
        for name, data in modules.items():
            writer.add_file(f"lab/modules/{name}.ko", data)
        writer.add_file("lab/modules/order", "\n".join(modules).encode() + b"\n")
        writer.add_file("lab/modules/notify_inject.ko", injector.read_bytes())

    patched = [] if kernel.patched is None else [kernel.patched.name]
    return build_layer(f"modules-{kernel.series}", [kernel.tree.name, injector.name, *patched], fill)


def add_project(writer: CpioWriter, userland: Tree) -> None:
    """Adds the project as it is in the working tree, compiled, below /project."""
    with open_stage("project") as stage:
        for part in PROJECT_PARTS:
            source = ROOT / part
            paths = [source] if source.is_file() else sorted(source.rglob("*"))
            for path in paths:
                relative = path.relative_to(ROOT)
                if path.is_file() and not NOT_IN_THE_LAB.search(relative.as_posix()):
                    (stage / "project" / relative).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, stage / "project" / relative)
        compile_python(userland, stage / "project", stage)
        writer.add_tree(stage)


def write_layers(kernel: Kernel) -> list[Path]:
    """Returns the paths of all layers that do not change from run to run, written where the cache lacks them."""
    userland = open_userland()
    layers = [build_userland_layer(userland), build_qemu_layer(open_qemu10_tree())]
    return [*layers, build_packages_layer(userland), build_modules_layer(kernel)]


def write_initramfs(kernel: Kernel, job: Mapping[str, object], path: Path) -> None:
    """Writes the initramfs that boots a kernel and carries out a job (see `guest_job`)."""
    with path.open("wb") as file:
        for layer in write_layers(kernel):
            with layer.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
        writer = CpioWriter(file)
        add_project(writer, open_userland())
        writer.add_file("usr/bin/kvm-notify-exporter", b'#!/bin/sh\nexec python3 -m exporter "$@"\n', executable=True)
        writer.add_file("lab/job.json", json.dumps(job).encode())
        writer.close()
