"""Starts a real libvirt for a test and ends it, leaving nothing behind: Debian's libvirtd, without systemd.

Decisions:

* The daemons live in mount and pid namespaces of their own, with private directories in place of /run, /var/lib,
  /var/log, /var/cache and /etc/libvirt: a libvirt that the host may have is neither used nor touched, no user or group
  is added, and two of these can run at once.
* The namespaces' first process ends when its standard input does, and with it the kernel ends everything inside. So
  even where a test is killed, no daemon and no guest outlives it.
* libvirtd says on systemd's notification socket when it is ready: nothing is polled for that.
* virsh runs outside, through the socket in the private directory. From outside, the guests look as in a container:
  libvirt's pids are those of its own namespace, its files lie below /proc/PID/root. ``run_inside`` gives the view of
  a program beside libvirt on one host.

Run as a program (``python -m tests.live.libvirt_daemon DIRECTORY EMULATOR``) it is that first process.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import psutil

READY_SECONDS = 60.0
VIRSH_SECONDS = 120.0
PACKAGES = ("libvirt-daemon", "libvirt-daemon-driver-qemu", "libvirt-clients", "qemu-system-x86")
QEMU = Path("/usr/bin/qemu-system-x86_64")
_QEMU_MODULES = Path("/usr/lib/x86_64-linux-gnu/qemu")

_PRIVATE = {
    "run": "/run",
    "lib": "/var/lib",
    "log": "/var/log",
    "cache": "/var/cache",
    "etc": "/etc/libvirt",
}
_QEMU_CONF = """user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
"""
_LIBVIRTD_CONF = """auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_group = "root"
"""
# Debian's libvirt is built to look these up, whatever its configuration says.
_USER = "libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin\n"
_GROUPS = "libvirt-qemu:x:64055:\nlibvirt:x:64056:\n"

# ACPI is on because libvirt 9.0 switches it off with an option that QEMU 10 no longer knows.
_DOMAIN = """<domain type='kvm'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <metadata>{metadata}</metadata>
  <memory unit='MiB'>64</memory>
  <vcpu>{vcpus}</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <features><acpi/></features>
  <devices><emulator>{emulator}</emulator></devices>
</domain>
"""


class LibvirtError(Exception):
    """A command of libvirt failed, or its daemon did not start; the message has its output."""


@dataclass(frozen=True)
class Libvirt:
    """A running libvirtd, and the directory that holds its private directories."""

    directory: Path
    init_pid: int
    emulator: Path

    @property
    def status_directory(self) -> Path:
        """Where this libvirt keeps its status XML, as seen from outside."""
        return self.directory / "run/libvirt/qemu"

    def virsh(self, *arguments: str) -> str:
        """Return what virsh prints; LibvirtError where it fails."""
        uri = f"qemu+unix:///system?socket={self.directory}/run/libvirt/libvirt-sock"
        done = subprocess.run(
            ["virsh", "-c", uri, *arguments], capture_output=True, text=True, timeout=VIRSH_SECONDS, check=False
        )
        if done.returncode != 0:
            log = (self.directory / "daemons.log").read_text(errors="replace")[-2000:]
            raise LibvirtError(f"virsh {' '.join(arguments)}: {done.stderr.strip()}\n{log}")
        return done.stdout

    def start_domain(self, name: str, uuid: str, *, metadata: str = "", vcpus: int = 2) -> int:
        """Start a guest that runs nothing but its firmware; return the pid of its QEMU as the caller sees it."""
        definition = self.directory / f"{uuid}.xml"
        emulator = escape(str(self.emulator))
        definition.write_text(
            _DOMAIN.format(name=escape(name), uuid=uuid, metadata=metadata, vcpus=vcpus, emulator=emulator)
        )
        self.virsh("create", str(definition))
        return find_outer_pid(self.init_pid, self.read_inner_pid(name))

    def read_inner_pid(self, name: str) -> int:
        """Return the pid of a guest's QEMU in the daemon's own pid namespace."""
        # Not from the .pid file: libvirt escapes the name of that one as if it were XML.
        found = re.search(r"<domstatus [^>]*pid='(\d+)'", (self.status_directory / f"{name}.xml").read_text())
        assert found is not None
        return int(found[1])

    def destroy_domain(self, name: str) -> None:
        """End a guest at once."""
        self.virsh("destroy", name)

    def read_vcpu_statistics(self, name: str) -> dict[str, int]:
        """Return ``virsh domstats --vcpu --raw``: keys like ``vcpu.0.exits.sum``; only values that are numbers."""
        lines = (line.strip() for line in self.virsh("domstats", "--vcpu", "--raw", name).splitlines())
        pairs = (line.partition("=")[::2] for line in lines if line.startswith("vcpu."))
        return {key: int(value) for key, value in pairs if value.isdigit()}

    def run_inside(self, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
        """Return what a program prints that runs beside libvirtd, in its namespaces; LibvirtError where it fails."""
        command = ["nsenter", "--target", str(self.init_pid), "--mount", "--pid", *arguments]
        done = subprocess.run(
            command,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=VIRSH_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            raise LibvirtError(f"{' '.join(arguments)[:200]}: {done.stderr.strip()}")
        return done.stdout


def render_nova_metadata(display_name: str, project_id: str, project_name: str) -> str:
    """Return the metadata that OpenStack's nova gives to a domain (nova/virt/libvirt/config.py)."""
    return f"""
    <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
      <nova:package version="26.2.1"/>
      <nova:name>{escape(display_name)}</nova:name>
      <nova:creationTime>2026-01-02 03:04:05</nova:creationTime>
      <nova:flavor name="m1.small"><nova:memory>64</nova:memory><nova:vcpus>2</nova:vcpus></nova:flavor>
      <nova:owner>
        <nova:user uuid="0f5b5f7d2a6e4d55a1d0d25a7e6f0001">someone</nova:user>
        <nova:project uuid="{project_id}">{escape(project_name)}</nova:project>
      </nova:owner>
    </nova:instance>"""


def render_kubevirt_metadata(uid: str) -> str:
    """Return the metadata that KubeVirt gives to a domain (pkg/virt-launcher/virtwrap/api/schema.go)."""
    return f"""
    <kubevirt xmlns="http://kubevirt.io">
      <uid>{uid}</uid>
      <graceperiod><deletionGracePeriodSeconds>30</deletionGracePeriodSeconds></graceperiod>
    </kubevirt>"""


def find_missing() -> str:
    """Return why no libvirt can be started here, "" where one can."""
    if os.geteuid() != 0:
        return "a libvirt of its own needs root"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "there is no /dev/kvm"
    missing = [name for name in ("libvirtd", "virtlogd", "virsh", "unshare", "nsenter") if not _find_program(name)]
    if missing or not QEMU.exists():
        return f"{', '.join(missing) or QEMU} is missing: apt-get install {' '.join(PACKAGES)}"
    return ""


def _find_program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def find_outer_pid(init_pid: int, inner_pid: int) -> int:
    """Return the pid here of process ``inner_pid`` of the pid namespace whose first process is ``init_pid``."""
    namespace = os.readlink(f"/proc/{init_pid}/ns/pid")
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            if os.readlink(f"/proc/{entry}/ns/pid") != namespace:
                continue
            status = Path(f"/proc/{entry}/status").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended, or is so much protected that it is no child of ours
        numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
        if int(numbers[-1]) == inner_pid:
            return int(entry)
    raise LibvirtError(f"no process {inner_pid} in the pid namespace of {init_pid}")


@contextmanager
def running_libvirt(directory: Path, emulator: Path = QEMU) -> Iterator[Libvirt]:
    """Run a libvirtd whose files are all in ``directory``, which is empty; its guests end with it.

    ``emulator`` runs the guests: the installed QEMU, or one that is only unpacked somewhere. The directory's path
    must be short: a socket's may have 107 bytes.
    """
    (directory / "run").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, (directory / "daemons.log").open("wb") as log:
        ready.bind(str(directory / "run/ready"))
        ready.settimeout(READY_SECONDS)
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        first = subprocess.Popen(
            [*command, sys.executable, "-m", "tests.live.libvirt_daemon", str(directory), str(emulator)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_ready(ready, directory)
            yield Libvirt(directory, _find_only_child(first.pid), emulator)
        finally:
            assert first.stdin is not None
            first.stdin.close()
            # The namespace's first process is reaped last: when this returns, no process of it is left.
            first.wait(timeout=READY_SECONDS)


def _wait_until_ready(ready: socket.socket, directory: Path) -> None:
    try:
        while b"READY=1" not in ready.recv(4096):
            continue
    except TimeoutError as err:
        output = (directory / "daemons.log").read_text(errors="replace")[-4000:]
        raise LibvirtError(f"libvirtd is not ready after {READY_SECONDS:.0f} s:\n{output}") from err


def _find_only_child(pid: int) -> int:
    (child,) = psutil.Process(pid).children()
    return child.pid


def _bind(source: Path, target: str) -> None:
    subprocess.run(["mount", "--bind", str(source), target], check=True)


def _make_private(directory: Path) -> None:
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for name, content in (("passwd", _USER), ("group", _GROUPS)):
        copy = directory / name
        copy.write_text(Path(f"/etc/{name}").read_text() + content)
        _bind(copy, f"/etc/{name}")
    for name in _PRIVATE:
        (directory / name).mkdir(exist_ok=True)
    (directory / "log/libvirt/qemu").mkdir(parents=True)
    (directory / "etc/qemu.conf").write_text(_QEMU_CONF)
    (directory / "etc/libvirtd.conf").write_text(_LIBVIRTD_CONF)
    for name, target in _PRIVATE.items():
        _bind(directory / name, target)


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _hide_modules(directory: Path) -> None:
    """Hide the installed QEMU's modules, for a QEMU of another build: it finds them, and aborts on them."""
    empty = directory / "no-modules"
    empty.mkdir()
    if _QEMU_MODULES.is_dir():
        _bind(empty, str(_QEMU_MODULES))


def main(directory: Path, emulator: Path) -> int:
    """Be the first process of the namespaces: start the daemons, reap what ends, end with the standard input."""
    _make_private(directory)
    if emulator != QEMU:
        _hide_modules(directory)
    # Without a UTF-8 locale libvirtd cuts long names of domains in the middle of a character, and fails on that.
    environment = {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}
    threading.Thread(target=_end_with_input, daemon=True).start()
    virtlogd = subprocess.Popen(["virtlogd"], env=environment, stdin=subprocess.DEVNULL)
    # Only libvirtd is given the socket, since virtlogd would say READY=1 too.
    environment["NOTIFY_SOCKET"] = "/run/ready"
    libvirtd = subprocess.Popen(["libvirtd"], env=environment, stdin=subprocess.DEVNULL)
    daemons = {virtlogd.pid: "virtlogd", libvirtd.pid: "libvirtd"}
    while True:
        pid, status = os.wait()
        if pid in daemons:
            print(f"{daemons[pid]} has ended with status {status}", flush=True)
            return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
