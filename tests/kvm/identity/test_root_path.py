"""The walk finds what openat2(2) finds, and never anything above the root, whatever is renamed meanwhile."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvm import syscalls
from kvm.identity.root_path import open_in_root, walk_in_root

NAMES = ("a", "b", "c")
names = st.sampled_from((*NAMES, "..", ".", "", "missing"))
paths = st.lists(names, min_size=1, max_size=5).map("/".join)
# What is made, in order: a directory, a file, or a link with its target.
things = st.lists(st.tuples(paths, st.one_of(st.just("directory"), st.just("file"), paths, paths.map("/{}".format))))


@contextmanager
def open_root(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def make(root: Path, made: list[tuple[str, str]]) -> None:
    """Fill a root, never beside it; what cannot be made there is not."""
    for path, what in made:
        place = root / "/".join(part for part in path.split("/") if part in NAMES)
        if place.is_symlink() or not Path(os.path.realpath(place.parent)).is_relative_to(root):
            continue
        try:
            if what == "directory":
                place.mkdir(parents=True)
            elif what == "file":
                place.touch()
            else:
                place.symlink_to(what or ".")
        except OSError:
            continue


def identify(fd: int) -> tuple[int, int]:
    """Which file it is; the fd is closed."""
    try:
        found = os.fstat(fd)
        return found.st_dev, found.st_ino
    finally:
        os.close(fd)


@example([("c", "c"), ("c/a", "directory")], "c/a", False)
@given(things, paths, st.booleans())
def test_the_walk_finds_what_the_kernel_finds(made: list[tuple[str, str]], path: str, is_directory: bool) -> None:
    def find(walks: bool) -> tuple[int, int] | str:
        try:
            if walks:
                return identify(walk_in_root(root_fd, path, is_directory=is_directory))
            flags = os.O_PATH | (os.O_DIRECTORY if is_directory else 0)
            return identify(syscalls.open_in_root(root_fd, path, flags))
        except OSError as err:
            return errno.errorcode[err.errno or 0]

    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory).resolve() / "root"
        root.mkdir()
        make(root, made)
        with open_root(root) as root_fd:
            before = set(os.listdir("/proc/self/fd"))
            assert find(walks=True) == find(walks=False)
            assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("is_above", [True, False])
def test_a_container_that_renames_all_the_time_leads_nowhere(tmp_path: Path, is_above: bool) -> None:
    """A directory is a link to the outside every other moment, or is moved up while somebody walks through it."""
    root = tmp_path / "root"
    (root / "run/deep").mkdir(parents=True)
    for place in (root / "run/deep", tmp_path):
        (place / "status").write_text(str(place))
    secret = (tmp_path / "status").stat().st_ino
    (root / "trap").symlink_to("../.." if is_above else str(tmp_path))
    stop, seen = threading.Event(), set[int]()

    def rename() -> None:
        while not stop.is_set():
            for name in ("run/deep", "trap"):
                (root / name).rename(root / "aside")
                (root / {"run/deep": "trap", "trap": "run/deep"}[name]).rename(root / name)
                (root / "aside").rename(root / {"run/deep": "trap", "trap": "run/deep"}[name])

    thread = threading.Thread(target=rename)
    thread.start()
    try:
        with open_root(root) as root_fd:
            for number in range(20_000):
                path = ("run/deep/status", "run/deep/../../../status", "trap/status")[number % 3]
                try:
                    seen.add(identify(walk_in_root(root_fd, path))[1])
                except FileNotFoundError:
                    continue
    finally:
        stop.set()
        thread.join()
    assert secret not in seen
    assert (root / "run/deep/status").exists() or (root / "trap/status").exists()
    assert seen, "it has been there"


def test_links_that_lead_to_each_other_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("/a")
    with open_root(tmp_path) as root_fd, pytest.raises(OSError, match="symbolic links"):
        walk_in_root(root_fd, "a")


def test_a_name_of_any_bytes_is_found(tmp_path: Path) -> None:
    name = "\udcff-\u00e9"
    (tmp_path / os.fsdecode(name.encode("utf-8", "surrogateescape"))).touch()
    with open_root(tmp_path) as root_fd:
        assert identify(walk_in_root(root_fd, name)) == identify(open_in_root(root_fd, name))
