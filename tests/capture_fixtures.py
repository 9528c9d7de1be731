"""Captures what tells whose VM a process is: its command line, its cgroups, libvirt's status XML.

``python -m tests.capture_fixtures`` (root, /dev/kvm, libvirt) makes guests and writes each below
tests/fixtures/owners/. Where no VMM is at hand, the command line that its documentation gives is run by a program of
that name that does nothing. ``python -m tests.capture_fixtures --pid PID --libvirt-status FILE NAME`` captures a VM of
a host in use as tests/fixtures/owners/NAME.

Names, UUIDs, addresses and directories of a host in use are replaced, the same by the same; of cgroups only the parts
remain that libvirt, systemd and Kubernetes make. Read what was written before you publish it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.live.libvirt_daemon import QEMU, render_kubevirt_metadata, render_nova_metadata, running_libvirt
from tests.waiting import wait_until

FIXTURES = Path(__file__).parent / "fixtures" / "owners"
KERNEL = platform.release().split("-")[0]
UUID = "6c1b3a86-60c5-4d0a-9b22-1d7c5d8f6a01"

_IDENTITIES = re.compile(rb"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|\b[0-9a-f]{32}\b", re.IGNORECASE)
_ADDRESSES = re.compile(rb"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b|\b(?:\d{1,3}\.){3}\d{1,3}\b", re.IGNORECASE)
_NAMES = re.compile(
    rb"<(?:nova:)?(?:name|user|project|title|description)\b[^>]*>([^<]+)<|guest=((?:[^,\0]|,,)+)|(?<=--id\0)([^\0]+)"
)
_KNOWN_CGROUP = re.compile(
    r"[\w-]*\.slice|machine|emulator|vcpu\d+|libvirt|kubepods|besteffort|burstable|guaranteed|[\w-]*\.libvirt-qemu"
)
# Imitated: directory of the program, program, its own name for itself, arguments. From getting-started.md and jailer.md
# of Firecracker, README.md of cloud-hypervisor, the book of crosvm, and what `qm showcmd` of Proxmox VE prints. The
# jailed one has the id of jailer.md's example. Its jail is the root of its mount namespace by pivot_root(2), and so the
# link of its program says no more to who reads it outside.
_JAILED = "551e7604-e35c-42b3-b825-416853441234"
_IMITATED = {
    "firecracker": ("usr/bin", "firecracker", "./firecracker", "--api-sock /run/fc.socket --id web-7"),
    "firecracker-default-id": (
        "usr/bin",
        "firecracker-v1.12.0-x86_64",
        "firecracker-v1.12.0-x86_64",
        "--no-api --config-file /etc/vm.json --id anonymous-instance",
    ),
    "firecracker-jailed": (
        "",
        "firecracker",
        "/firecracker",
        f"--id={_JAILED} --start-time-us 1234567 --start-time-cpu-us 3456 --seccomp-level 0",
    ),
    "cloud-hypervisor": (
        "usr/bin",
        "cloud-hypervisor",
        "cloud-hypervisor",
        f"--kernel /boot/vmlinux --platform serial_number=ds=nocloud,uuid={UUID} --api-socket /run/ch.sock",
    ),
    "crosvm": (
        "usr/bin",
        "crosvm",
        "crosvm",
        "run --cpus 2 --name termina -s /run/crosvm.sock --rwroot /root.img /vm_kernel",
    ),
    "proxmox": (
        "usr/bin",
        "qemu-system-x86_64",
        "/usr/bin/kvm",
        f"-id 104 -name mail,debug-threads=on -no-shutdown -smbios type=1,uuid={UUID} -smp 4,sockets=1,cores=4",
    ),
}
START_SECONDS = 10.0


def scrub_text(content: bytes, replaced: dict[bytes, bytes]) -> bytes:
    """Replace what could tell whose guest it is; ``replaced`` keeps what stands for what over several files."""

    def stand_in(match: re.Match[bytes], form: str) -> bytes:
        return replaced.setdefault(match[0].lower(), form.format(len(replaced) + 1).encode())

    for match in _NAMES.finditer(content):
        name = next(group for group in match.groups() if group)
        replaced.setdefault(name, f"name-{len(replaced) + 1}".encode())
    for name in sorted((name for name in replaced if len(name) > 2), key=len, reverse=True):
        content = content.replace(name, replaced[name])
    content = content.replace(platform.node().encode() or b"\0no host name", b"host")
    content = _IDENTITIES.sub(lambda match: stand_in(match, "00000000-0000-4000-8000-{:012}"), content)
    return _ADDRESSES.sub(lambda match: stand_in(match, "52:54:00:00:00:{:02x}"), content)


def scrub_cgroup(content: str) -> str:
    """Keep of each path the parts that say what manages the process, and ``x`` for each other part."""
    lines = []
    for line in content.splitlines():
        head, path = line.rsplit(":", 1)
        parts = [part if not part or _KNOWN_CGROUP.fullmatch(part) else "x" for part in path.split("/")]
        lines.append(f"{head}:{'/'.join(parts)}\n")
    return "".join(lines)


def capture_process(
    pid: int,
    directory: Path,
    identity: dict[str, str],
    *,
    status: Path | None = None,
    root: str = "",
    in_use: bool = False,
) -> None:
    """Write a process's files to ``directory``; ``root`` is cut from the path of its program."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    proc = Path("/proc") / str(pid)
    numbers = [line for line in (proc / "status").read_text().splitlines() if line.startswith(("Tgid", "NSpid"))]
    files = {
        "cmdline": (proc / "cmdline").read_bytes(),
        "comm": (proc / "comm").read_bytes(),
        "exe": os.readlink(proc / "exe").removeprefix(root).encode(),
        "status": "".join(f"{line}\n" for line in numbers).encode(),
        "cgroup": scrub_cgroup((proc / "cgroup").read_text()).encode(),
    }
    if status is not None:
        files["status.xml"] = status.read_bytes()
    replaced: dict[bytes, bytes] = {}
    for name in sorted(files, reverse=True):  # status.xml first: it names what also stands elsewhere
        content = scrub_text(files[name], replaced) if in_use else files[name]
        (directory / name).write_bytes(content.replace(root.encode(), b"") if root else content)
    (directory / "identity.json").write_text(json.dumps({"kernel": KERNEL, **identity}, indent=2) + "\n")


def wait_for_arguments(pid: int) -> None:
    """Return when a process that was just started has its arguments: the kernel sets them after Popen has returned."""
    wait_until(Path(f"/proc/{pid}/cmdline").read_bytes, f"process {pid} starts", START_SECONDS)


def open_full_pipe() -> tuple[int, int]:
    """Return both ends of a pipe into which nothing more can be written."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(1 << 16))
    os.set_blocking(writer, True)
    return reader, writer


@contextmanager
def imitated_vmm(program: Path, arguments: Sequence[str | bytes]) -> Iterator[int]:
    """Run a program of this path that does nothing, with these arguments, its own name first; yields its pid."""
    program.parent.mkdir(parents=True, exist_ok=True)
    # echo takes any arguments, and waits for ever to print them into a pipe that is full.
    shutil.copy("/bin/echo", program)
    reader, writer = open_full_pipe()
    process = subprocess.Popen(arguments, executable=program, stdout=writer)
    os.close(writer)
    try:
        wait_for_arguments(process.pid)
        yield process.pid
    finally:
        process.kill()
        process.wait()
        os.close(reader)


def capture_imitated() -> None:
    identity = {"vmm": "none: a program of that name, run as the VMM's documentation says"}
    for name, (directory, program, own_name, arguments) in _IMITATED.items():
        with (
            tempfile.TemporaryDirectory() as root,
            imitated_vmm(Path(root, directory, program), [own_name, *arguments.split()]) as pid,
        ):
            capture_process(pid, FIXTURES / name, identity, root=root)


def capture_qemu() -> None:
    version = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    arguments = ["-name", "guest=one,,two,debug-threads=on", "-uuid", UUID, "-m", "16"]
    process = subprocess.Popen([QEMU, *arguments, "-accel", "kvm", "-S", "-display", "none", "-nodefaults"])
    try:
        wait_for_arguments(process.pid)
        capture_process(process.pid, FIXTURES / "qemu", {"vmm": version})
    finally:
        process.kill()
        process.wait()
    nova = render_nova_metadata('web "blue" & co', "0f5b5f7d2a6e4d55a1d0d25a7e6f0002", "payments")
    kubevirt = render_kubevirt_metadata("e5f45977-58d0-45a3-97c5-0d8053183c60")
    with tempfile.TemporaryDirectory() as directory, running_libvirt(Path(directory)) as libvirt:
        identity = {"vmm": version, "libvirt": libvirt.virsh("version", "--daemon").strip().splitlines()[-1]}
        for fixture, name, metadata in (
            ("libvirt-openstack", "instance-0000002a", nova),
            ("libvirt-kubevirt", "shop_cart-7", kubevirt),
            ("libvirt", "under_score", ""),
        ):
            pid = libvirt.start_domain(name, UUID, metadata=metadata)
            capture_process(pid, FIXTURES / fixture, identity, status=libvirt.status_directory / f"{name}.xml")
            libvirt.destroy_domain(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", nargs="?", help="of the fixture to write for --pid")
    parser.add_argument("--pid", type=int, help="capture this process of a host in use, scrubbed")
    parser.add_argument("--libvirt-status", type=Path, help="its /run/libvirt/qemu/NAME.xml")
    options = parser.parse_args()
    if options.pid is None:
        capture_imitated()
        capture_qemu()
    elif options.name:
        capture_process(options.pid, FIXTURES / options.name, {}, status=options.libvirt_status, in_use=True)
    else:
        parser.error("--pid wants a name for the fixture")


if __name__ == "__main__":
    main()
