"""A Debian as a machine of its own: systemd as the first process, the lab's kernel, KVM and notify exits.

What a container cannot show is shown here: the agent as its unit starts it, in the pid namespace that the machine was
booted with, reading by bpf and tracing. The disk is a tree that `installed.add_installed_agent` has prepared.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.deploy.installed import ENVIRONMENT, PROJECT
from tests.lab.boot import Limits, Run, ThreadIndex, boot
from tests.lab.cpio import CpioWriter
from tests.lab.debian import Kernel, open_kernel, open_userland
from tests.lab.modules import WANTED, build_injector, read_modules

SERIES = "6.12"
DISK_BYTES = 2 << 30
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
JOB_UNIT = f"""[Unit]
Description=What the lab runs here
After=multi-user.target
[Service]
WorkingDirectory={PROJECT}
Environment={" ".join(ENVIRONMENT)} HOME=/root
ExecStart=/usr/bin/python3 tests/lab/guest_job.py /srv/job.json
"""


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
