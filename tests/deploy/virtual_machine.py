"""A Debian as a machine of its own: systemd as the first process, the lab's kernel, KVM and notify exits.

What a container cannot show is shown here: the agent as its unit starts it, in the pid namespace that the machine was
booted with, reading by bpf and tracing. The disk is a tree of `chroot.make_tree` with the package installed. The tests
that run inside are put into its /srv; they need Debian's Python and what the package depends on, and pytest and
hypothesis.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.deploy.chroot import run_on_host
from tests.lab.apt import LabError
from tests.lab.boot import Limits, Run, ThreadIndex, boot
from tests.lab.cpio import CpioWriter
from tests.lab.debian import Kernel, open_kernel, open_userland
from tests.lab.modules import WANTED, build_injector, read_modules

ROOT = Path(__file__).parents[2]
SERIES = "6.12"
DISK_BYTES = 2 << 30
PROGRAMS = ("promtool", "prometheus")
TEST_PACKAGES = ("pytest", "hypothesis")
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in $(cat /lab/order); do insmod "/lab/$module.ko" || echo "lab: $module cannot be loaded"; done
mount -t ext4 /dev/vda /sysroot || { echo "lab: no disk"; poweroff -f; }
mount -t tmpfs run /sysroot/run
mkdir -p /sysroot/run/systemd/system/multi-user.target.wants
cp /lab/job.service /sysroot/run/systemd/system/lab-job.service
ln -s ../lab-job.service /sysroot/run/systemd/system/multi-user.target.wants/
umount /proc
mount --move /dev /sysroot/dev
exec switch_root /sysroot /lib/systemd/systemd
"""
JOB_UNIT = """[Unit]
Description=What the lab runs here
After=multi-user.target
[Service]
WorkingDirectory=/srv/project
Environment=PYTHONPATH=/srv/packages/site-packages:/srv/project PYTHONDONTWRITEBYTECODE=1 HOME=/root
Environment=PATH=/srv/bin:/usr/sbin:/usr/bin:/sbin:/bin KVM_LAB_INSIDE=1 KVM_TESTS_MUST_RUN=1
ExecStart=/usr/bin/python3 tests/lab/guest_job.py /srv/job.json
"""


def add_tests(tree: Path, package: Path) -> None:
    """Put the project's tests into /srv of a tree: what they test is what the package has installed."""
    srv = tree / "srv"
    project = srv / "project"
    for part in ("tests", "grafana"):
        ignored = shutil.ignore_patterns("__pycache__", "npm")
        shutil.copytree(ROOT / part, project / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", project)
    for name in ("exporter", "kvm"):
        (project / name).symlink_to(f"/usr/lib/kvm-notify-exporter/{name}")
    shutil.copy(package, srv / "package.deb")
    install_tests_packages(tree, srv / "packages/site-packages")
    (srv / "bin").mkdir()
    for name in PROGRAMS:
        found = shutil.which(name)
        if found is None:
            raise LabError(f"there is no {name} here: apt-get install prometheus")
        shutil.copy(found, srv / "bin")
    # Under emulation, to compile is most of what a program does at its start.
    run_on_host(tree, "python3", "-m", "compileall", "-q", "--invalidation-mode=unchecked-hash", "/srv")


def install_tests_packages(tree: Path, site: Path) -> None:
    """Install pytest and what else the tests take, at our versions, for the tree's own Python."""
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = run_on_host(tree, "python3", "-c", program).strip()
    names = [f"{name}=={importlib.metadata.version(name)}" for name in TEST_PACKAGES]
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", f"--target={site}"]
    words += [f"--python-version={version}", "--only-binary=:all:", *names]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"pip cannot install {', '.join(names)} for Python {version}: {done.stderr[-2000:]}")


def write_initramfs(kernel: Kernel, path: Path) -> None:
    """Write what loads KVM and the disk's modules, and hands over to the disk's systemd."""
    modules = read_modules(kernel, (*WANTED, "virtio_blk", "crc32c_generic", "ext4"))
    with path.open("wb") as file:
        writer = CpioWriter(file)
        for name in ("proc", "dev", "sysroot"):
            writer.add_directory(name)
        writer.add_file("bin/busybox", (open_userland().path / "usr/bin/busybox").read_bytes(), executable=True)
        writer.add_file("init", INIT.encode(), executable=True)
        for name, data in modules.items():
            writer.add_file(f"lab/{name}.ko", data)
        writer.add_file("lab/notify_inject.ko", build_injector(kernel).read_bytes())
        writer.add_file("lab/order", "\n".join([*modules, "notify_inject"]).encode())
        writer.add_file("lab/job.service", JOB_UNIT.encode())
        writer.close()


def run_in_machine(tree: Path, command: Sequence[str], files: Sequence[str], threads: ThreadIndex) -> Run:
    """Boot a tree and run a command in it, from the project's directory; the tree stays as it is. Raises RunLost."""
    kernel = open_kernel(SERIES)
    job = {"command": list(command), "environment": {}, "files": list(files)}
    (tree / "srv/job.json").write_text(json.dumps(job))
    with tempfile.TemporaryDirectory(prefix="machine-") as directory:
        disk, initramfs = Path(directory) / "disk", Path(directory) / "initramfs"
        write_initramfs(kernel, initramfs)
        subprocess.run(["mkfs.ext4", "-q", "-d", str(tree), str(disk), f"{DISK_BYTES >> 10}k"], check=True)
        limits = Limits(boot_seconds=240, silence_seconds=400, job_seconds=3000)
        return boot(kernel, initramfs, "systemd.show_status=no", threads, limits, disk=disk)
