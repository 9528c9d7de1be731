"""Packages from Debian's archive, unpacked into the lab's cache and never installed.

Decisions:

* apt itself resolves and downloads, with lists, state and sources of its own under the cache, so
  nothing is added to the system's configuration. The mirror and the key are the ones that the
  system's own ``debian.sources`` names; only the suites differ.
* Packages are resolved against an *empty* dpkg status. What comes out is a closure: everything the
  wanted packages need, down to libc. Unpacked it is a directory that one can
  chroot into or pick files from, whatever the host has installed. No maintainer script runs.
* A resolution is kept for a day, so that a cached run needs no network. When the archive cannot be
  asked later, the last resolution serves, and a line on stderr says so.
* Unpacked trees are named after a hash of the package file names, which hold the versions: a new
  version is a new tree, and two runs never disagree about what a tree holds.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "lab"
SYSTEM_SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
RESOLUTION_KEPT_SECONDS = 24 * 3600
UNUSED_KEPT_SECONDS = 7 * 24 * 3600
APT_TIMEOUT_SECONDS = 900


class LabError(Exception):
    """The lab cannot do what was asked; the message says why and what to do."""


@dataclass(frozen=True)
class Mirror:
    """Where the system's own configuration gets Debian from."""

    archive: str
    security: str
    signed_by: str


def parse_mirror(deb822: str) -> Mirror:
    """Finds the archive's and the security archive's address in the text of a ``debian.sources``."""
    archive = security = signed_by = ""
    for stanza in deb822.split("\n\n"):
        fields = {
            name.strip(): value.strip()
            for name, _, value in (line.partition(":") for line in stanza.splitlines() if not line.startswith("#"))
        }
        uri = fields.get("URIs", "").split(" ")[0]
        if "-security" in fields.get("Suites", ""):
            security = uri
        elif uri:
            archive = uri
            signed_by = fields.get("Signed-By", "")
    if not archive:
        raise LabError(f"no archive with a URIs: line in {SYSTEM_SOURCES}; the lab takes its mirror from there")
    return Mirror(archive, security or f"{archive}-security", signed_by)


def render_sources(mirror: Mirror, codename: str, *, is_released: bool = True) -> str:
    """Returns the lines of a ``sources.list`` for one release, and its updates and backports.

    One that is not released yet has none of these.
    """
    option = f"[signed-by={mirror.signed_by}] " if mirror.signed_by else ""
    suites = [(mirror.archive, codename)]
    if is_released:
        suites += [(mirror.archive, f"{codename}-updates"), (mirror.security, f"{codename}-security")]
        suites += [(mirror.archive, f"{codename}-backports")]
    return "".join(f"deb {option}{uri} {suite} main\n" for uri, suite in suites)


def run(command: Sequence[str | Path], timeout_seconds: float = APT_TIMEOUT_SECONDS) -> str:
    """Runs a command and returns its stdout; LabError with the end of its output when it fails."""
    words = [str(word) for word in command]
    shown = re.sub(r" -o \S+", "", " ".join(words))[:300]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except FileNotFoundError as err:
        raise LabError(f"{words[0]} is not installed, the lab needs it") from err
    except subprocess.TimeoutExpired as err:
        raise LabError(f"{shown} did not end within {timeout_seconds:.0f} s") from err
    if done.returncode != 0:
        tail = (done.stdout + done.stderr).strip()[-2000:]
        raise LabError(f"{shown} failed with status {done.returncode}:\n{tail}")
    return done.stdout


@contextmanager
def hold_lock(name: str) -> Iterator[None]:
    """Holds an exclusive lock in the cache: two runs at once fetch and build a thing once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(message: str) -> None:
    """Prints a line about what the lab is doing to stderr; stdout is for results."""
    print(f"lab: {message}", file=sys.stderr, flush=True)


def remove_unused(directory: Path) -> None:
    """Removes from the cache what no run has used for a week: trees and layers of versions gone by."""
    for path in directory.iterdir():
        if time.time() - path.stat().st_mtime > UNUSED_KEPT_SECONDS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Archive:
    """One Debian release as this lab sees it: own sources, own lists, empty dpkg status."""

    def __init__(self, codename: str, *, is_released: bool = True) -> None:
        self.codename = codename
        self._is_released = is_released
        self.root = CACHE / "apt" / codename
        self.debs = CACHE / "debs"
        self._updated = False

    def _options(self) -> list[str]:
        empty = self.root / "empty"
        pairs: Mapping[str, Path | str] = {
            "Dir::Etc::sourcelist": self.root / "sources.list",
            "Dir::Etc::sourceparts": empty,
            "Dir::Etc::preferencesparts": empty,
            "Dir::State": self.root,
            "Dir::State::lists": self.root / "lists",
            "Dir::State::status": self.root / "status",
            "Dir::Cache": self.root,
            "Dir::Cache::archives": self.debs,
            # The unprivileged download user of apt cannot write below a checkout in /root.
            "APT::Sandbox::User": "root",
            "APT::Keep-Downloaded-Packages": "true",
            # By itself apt-get update ends well although nothing could be downloaded.
            "APT::Update::Error-Mode": "any",
            "Acquire::Retries": "2",
        }
        return [word for name, value in pairs.items() for word in ("-o", f"{name}={value}")]

    def update(self) -> None:
        """Downloads the package lists, once in the life of this object."""
        if self._updated:
            return
        for directory in (self.root / "lists" / "partial", self.root / "empty", self.debs / "partial"):
            directory.mkdir(parents=True, exist_ok=True)
        (self.root / "status").touch()
        try:
            sources = SYSTEM_SOURCES.read_text(encoding="utf-8")
        except OSError as err:
            raise LabError(f"{SYSTEM_SOURCES} cannot be read ({err}); the lab takes its mirror from there") from err
        lines = render_sources(parse_mirror(sources), self.codename, is_released=self._is_released)
        (self.root / "sources.list").write_text(lines, encoding="utf-8")
        say(f"reading the package lists of {self.codename}")
        run(["apt-get", *self._options(), "-qq", "update"])
        self._updated = True

    def _remove_leftovers(self) -> None:
        # apt does not list what it has already, and the list is what will be unpacked.
        for deb in self.debs.glob("*.deb"):
            deb.unlink()

    def find_names(self, pattern: str) -> list[str]:
        """Returns the names of all packages that match a regular expression."""
        self.update()
        lines = run(["apt-cache", *self._options(), "search", "--names-only", pattern]).splitlines()
        return [line.split(" ", 1)[0] for line in lines]

    def read_depends(self, package: str) -> list[str]:
        """Returns the names a package's newest version depends on, the first of each alternative."""
        self.update()
        for line in run(["apt-cache", *self._options(), "show", "--no-all-versions", package]).splitlines():
            if line.startswith("Depends:"):
                return [part.split()[0].split(":")[0] for part in line.removeprefix("Depends:").split(",")]
        return []

    def fetch_closure(self, packages: Sequence[str], release: str | None) -> list[Path]:
        """Downloads packages with everything they depend on, preferring `release` where given."""
        self._remove_leftovers()
        self.update()
        chosen = ["-t", release] if release else []
        command = ["apt-get", *self._options(), *chosen, "install", "-y", "--no-install-recommends"]
        uris = [line for line in run([*command, "--print-uris", "-qq", *packages]).splitlines() if line.startswith("'")]
        run([*command, "--download-only", "-qq", *packages])
        return [self.debs / line.split(" ")[1] for line in uris]

    def fetch_alone(self, packages: Sequence[str]) -> list[Path]:
        """Downloads the newest version of just these packages."""
        self._remove_leftovers()
        self.update()
        uris = run(["apt-get", *self._options(), "download", "--print-uris", "-qq", *packages]).splitlines()
        # apt-get download writes into the current directory, wherever archives are kept.
        run(["env", "-C", str(self.debs), "apt-get", *self._options(), "download", "-qq", *packages])
        return [self.debs / line.split(" ")[1] for line in uris if line.startswith("'")]


@dataclass(frozen=True)
class Tree:
    """Packages unpacked into one directory."""

    name: str
    path: Path
    debs: tuple[str, ...]

    def version(self, package: str) -> str:
        """Returns the version of one of the packages in this tree."""
        for deb in self.debs:
            name, version, _ = deb.split("_", 2)
            if name == package:
                return version.replace("%3a", ":")
        raise LabError(f"{package} is not among the packages of {self.name}")


def find_kept_tree(name: str, wanted: Sequence[str]) -> tuple[Tree | None, bool]:
    """Returns the tree that was unpacked last for a name, if it is complete, and whether it is fresh."""
    note = CACHE / "resolved" / f"{name}.json"
    if not note.exists():
        return None, False
    kept = json.loads(note.read_text(encoding="utf-8"))
    path = CACHE / "trees" / str(kept["tree"])
    if kept["wanted"] != list(wanted) or not path.is_dir():
        return None, False
    os.utime(path)
    fresh = time.time() - float(kept["resolved_at"]) < RESOLUTION_KEPT_SECONDS
    return Tree(name, path, tuple(kept["debs"])), fresh and not os.environ.get("LAB_REFRESH")


def unpack_deb(deb: Path, into: Path) -> None:
    """Unpacks one package file below a directory, through the links that stand there."""
    # Not dpkg-deb -x: it replaces the link lib -> usr/lib by a directory of its own.
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as unpacked:
        tar = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(into)]
        done = subprocess.run(tar, stdin=unpacked.stdout, capture_output=True, text=True, check=False)
    if done.returncode != 0 or unpacked.returncode != 0:
        raise LabError(f"{deb.name} cannot be unpacked: {done.stderr.strip()[-500:]}")


def unpack_tree(name: str, wanted: Sequence[str], debs: Sequence[Path]) -> Tree:
    """Unpacks package files into a tree of their own and notes it as the current one of its name."""
    names = sorted(deb.name for deb in debs)
    directory = f"{name}-{hashlib.sha256(' '.join(names).encode()).hexdigest()[:12]}"
    path = CACHE / "trees" / directory
    if not path.is_dir():
        say(f"unpacking {len(debs)} packages for {name}")
        unfinished = path.with_name(f"{directory}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        # Merged /usr, as on every installed Debian: files of /lib and /usr/lib meet in one place.
        for link in ("bin", "lib", "lib64", "sbin"):
            (unfinished / "usr" / link).mkdir(parents=True)
            (unfinished / link).symlink_to(f"usr/{link}")
        for deb in debs:
            unpack_deb(deb, unfinished)
        unfinished.rename(path)
        os.utime(path)
        remove_unused(path.parent)
    for deb in debs:
        deb.unlink(missing_ok=True)
    note = CACHE / "resolved" / f"{name}.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    kept = {"wanted": list(wanted), "tree": directory, "debs": names, "resolved_at": time.time()}
    note.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return Tree(name, path, tuple(names))


def open_tree(name: str, wanted: Sequence[str], fetch: Callable[[], list[Path]]) -> Tree:
    """Returns the tree of what `fetch` downloads, from the cache while that is fresh.

    `wanted` says in words what is fetched; a tree that was made for other words is not used.
    """
    with hold_lock(name):
        kept, fresh = find_kept_tree(name, wanted)
        if kept is not None and fresh:
            return kept
        try:
            with hold_lock("apt"):
                return unpack_tree(name, wanted, fetch())
        except LabError as err:
            if kept is None:
                raise
            say(f"going on with the {name} of before, because {err}")
            return kept


def open_closure(
    name: str,
    archive: Archive,
    packages: Sequence[str],
    release: str | None = None,
    without: Sequence[str] = (),
) -> Tree:
    """Returns the tree of packages and all they depend on but `without`."""

    def fetch() -> list[Path]:
        return [deb for deb in archive.fetch_closure(packages, release) if deb.name.split("_")[0] not in without]

    return open_tree(name, [archive.codename, release or "", *packages, *(f"-{package}" for package in without)], fetch)
