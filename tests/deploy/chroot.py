"""A Debian of its own below a directory, and a systemd that runs it: real process 1, real units, real sandboxes.

Its namespaces for processes, mounts, cgroups and the network are its own: nothing of it is left when it ends. What it
cannot show is the source bpf, which refuses to work in a pid namespace of its own; ``run_on_host`` is for that: there
a tree is a root of its own, and no more than that.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.lab.apt import SYSTEM_SOURCES, parse_mirror
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache/deploy"
KEPT_SECONDS = 7 * 24 * 3600
# All that the package depends on, and what process 1 takes.
INCLUDED = (
    "systemd",
    "dbus",
    "python3-aiohttp",
    "python3-bcrypt",
    "python3-cffi-backend",  # Debian 12's python3-bcrypt calls it by a virtual name, which debootstrap cannot resolve
    "python3-prometheus-client",
    "python3-psutil",
    "python3-yaml",
    "libbpf1",
)
CGROUPS = Path("/sys/fs/cgroup")
ASK = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[2]), timeout=60)
try:
    connection.request("GET", sys.argv[1])
except ConnectionRefusedError:
    sys.exit(print(0))
answer = connection.getresponse()
print(answer.status)
print(answer.read().decode())
"""
OPEN_ROOT = """
set -e
mount --bind . .
cd "$PWD"
"""
# By pivot_root: who lives in a chroot may make no user namespace.
ENTER_ROOT = """
mount -t tmpfs tmpfs dev
for device in null zero full random urandom tty kvm; do touch dev/$device; mount --bind /dev/$device dev/$device; done
mkdir dev/shm old
pivot_root . old
umount -l old
rmdir old
"""
BOOT = f"""{OPEN_ROOT}
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
{ENTER_ROOT}
exec env -i container=test PATH=/usr/sbin:/usr/bin /lib/systemd/systemd --unit=multi-user.target --show-status=no
"""
ON_HOST = f"""{OPEN_ROOT}
mount --rbind /proc proc
mount --rbind /sys sys
{ENTER_ROOT}
exec "$@"
"""


def make_archive(release: str, *packages: str) -> Path:
    """Make a tar of a small Debian with these packages, by debootstrap or as it made it in the last days."""
    CACHE.mkdir(parents=True, exist_ok=True)
    included = ",".join(packages)
    archive = CACHE / f"{release}-{hashlib.sha256(included.encode()).hexdigest()[:12]}.tar"
    if not archive.exists() or time.time() - archive.stat().st_mtime > KEPT_SECONDS:
        with tempfile.TemporaryDirectory() as directory:
            tree = Path(directory) / "tree"
            mirror = parse_mirror(SYSTEM_SOURCES.read_text()).archive
            included_words = [f"--include={included}"] if included else []
            words = ["debootstrap", "--variant=minbase", *included_words, release, str(tree), mirror]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr
            made = archive.with_suffix(".new")
            subprocess.run(["tar", "--numeric-owner", "-cf", str(made), "-C", str(tree), "."], check=True)
            made.replace(archive)
    return archive


def make_tree(release: str, target: Path, *others: str) -> None:
    """Lay a Debian of this release, with all that the package depends on, and with other packages."""
    archive = make_archive(release, *INCLUDED, *others)
    target.mkdir()
    subprocess.run(["tar", "--numeric-owner", "-xpf", str(archive), "-C", str(target)], check=True)
    # What these do is done to the whole kernel, not to a namespace.
    for name in ("systemd-sysctl", "systemd-modules-load"):
        (target / f"etc/systemd/system/{name}.service").symlink_to("/dev/null")


def find_files(tree: Path) -> set[str]:
    """What is in a tree, but for what changes by itself."""
    passing = {"proc", "sys", "dev", "run", "tmp", "root", "var/log", "var/cache", "var/lib/dpkg", "var/lib/systemd"}
    words = ["find", ".", "(", *[word for path in sorted(passing) for word in ("-path", f"./{path}", "-o")], "-false"]
    done = subprocess.run([*words, ")", "-prune", "-o", "-print"], cwd=tree, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


class Container:
    """A running systemd; made by `open_container`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.enter = ("nsenter", f"--target={pid}", *"--mount --pid --uts --ipc --cgroup --net --root --wd".split())

    def run(self, *words: str, expect: int = 0) -> str:
        """Run a command to its end; returns what it prints."""
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(
            [*self.enter, *words], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == expect, (words, done.returncode, done.stdout, done.stderr)
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """What systemd says of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def get(self, path: str, port: int = 9750) -> tuple[int, str]:
        """Ask the agent, as a client in there does: status and body, 0 and "" where nobody listens."""
        status, _, body = self.run("python3", "-c", ASK, path, str(port)).partition("\n")
        return int(status), body

    def list_failed(self) -> str:
        """Names of units that have failed."""
        return self.run("systemctl", "list-units", "--failed", "--no-legend", "--plain")


@contextlib.contextmanager
def open_container(tree: Path) -> Iterator[Container]:
    """Boot a tree until its systemd is up; kill it on the way out."""
    unified = CGROUPS / "unified" if (CGROUPS / "unified").is_dir() else CGROUPS
    cgroup = Path(tempfile.mkdtemp(prefix="kvm-notify-deploy-", dir=unified))
    apart = "unshare --mount --propagation=private --pid --fork --kill-child --uts --ipc --cgroup --net".split()
    join = f'echo $$ > {cgroup}/cgroup.procs && exec "$@"'
    words = ["sh", "-c", join, "sh", *apart, "sh", "-c", BOOT]
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(words, cwd=tree, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process,
    ):
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

            def tell_output() -> str:
                output.seek(0)
                return f"systemd is up: {output.read()}"

            wait_until(lambda: children.read_text().split(), tell_output)
            container = Container(int(children.read_text()))
            state = [*container.enter, "systemctl", "is-system-running"]
            wait_until(
                lambda: subprocess.run(state, capture_output=True, text=True, check=False).stdout.strip() == "running",
                tell_output,
                seconds=60,
                pause_seconds=0.2,
            )
            yield container
        finally:
            process.kill()  # --kill-child: process 1 goes with it, and all others with that
            process.wait()
            remove_cgroup(cgroup)


def remove_cgroup(cgroup: Path) -> None:
    """Remove a cgroup and all below it, as soon as its last process has ended."""
    populated = cgroup / "cgroup.events"
    wait_until(lambda: "populated 0" in populated.read_text(), "the container has ended")
    for path in sorted(cgroup.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
    cgroup.rmdir()


def run_on_host(tree: Path, *words: str, expect: Sequence[int] = (0,)) -> str:
    """Run a command in a tree, with the host's processes, network, /sys and /dev/kvm; returns what it prints."""
    apart = ["unshare", "--mount", "--propagation=private", "sh", "-c", ON_HOST, "sh"]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    done = subprocess.run([*apart, *words], cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in expect, (words, done.returncode, done.stdout, done.stderr)
    return done.stdout


def has_all_that_it_takes() -> bool:
    """Whether trees can be made and booted here; debootstrap is one of the test packages."""
    return shutil.which("debootstrap") is not None and Path("/dev/kvm").exists() and SYSTEM_SOURCES.exists()
