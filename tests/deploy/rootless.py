"""podman as a user of no rights, known in a mount namespace of the test only: nothing of it stays on the machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

USER, UID, FIRST_SUBORDINATE = "image-builder", 71_000, 300_000
TABLES = ("passwd", "group", "subuid", "subgid")
# cgroup2 alone, as on any Debian 12: with version 1 beside it, crun starts nothing.
SCRIPT = f"""
set -e
for name in passwd group subuid subgid; do
    [ -e /etc/$name ] || touch /etc/$name
    mount --bind "$1/etc/$name" /etc/$name
done
umount --lazy /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
export HOME="$1/home" XDG_RUNTIME_DIR="$1/run"
cd "$1/home"
shift
exec setpriv --reuid={UID} --regid={UID} --clear-groups "$@"
"""
PODMAN = ("podman", "--storage-driver=vfs", "--cgroup-manager=cgroupfs")


class Podman:
    """A user's podman, whose images and containers are below a directory that everybody may enter."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        (directory / "etc").mkdir()
        lines = {
            "passwd": f"{USER}:x:{UID}:{UID}::{directory}/home:/bin/sh\n",
            "group": f"{USER}:x:{UID}:\n",
            "subuid": f"{USER}:{FIRST_SUBORDINATE}:65536\n",
            "subgid": f"{USER}:{FIRST_SUBORDINATE}:65536\n",
        }
        for name in TABLES:
            path = Path("/etc") / name
            (directory / "etc" / name).write_text((path.read_text() if path.exists() else "") + lines[name])
        for name in ("home", "run"):
            (directory / name).mkdir(mode=0o700)
            os.chown(directory / name, UID, UID)

    def run(self, *words: str, expect: Sequence[int] = (0,)) -> str:
        """Run a command of podman's to its end; returns what it prints."""
        command = ["unshare", "--mount", "--propagation=private", "sh", "-c", SCRIPT, "sh", str(self._directory)]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            [*command, *PODMAN, *words], env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode in expect, (words, done.returncode, done.stdout[-4000:], done.stderr[-4000:])
        return done.stdout

    def close(self) -> None:
        """End what runs, and the process that keeps the user's namespaces."""
        self.run("rm", "--all", "--force", "--time=1")
        for path in (self._directory / "run").rglob("pause.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGTERM)
