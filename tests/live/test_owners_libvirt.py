"""A real libvirt's guests: their names, UUIDs and OpenStack projects come out of ``read_owner``."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvm.discovery.processes import read_stat
from kvm.identity.owner_cache import OwnerCache
from kvm.identity.owners import OwnerReading, read_owner
from kvm.model import Identity, Owner
from tests.live.libvirt_daemon import (
    Libvirt,
    find_missing,
    render_kubevirt_metadata,
    render_nova_metadata,
    running_libvirt,
)

ROOT = Path(__file__).parents[2]
PROC = Path("/proc")
UUID = "6c1b3a86-60c5-4d0a-9b22-1d7c5d8f6a01"
PROJECT = "0f5b5f7d2a6e4d55a1d0d25a7e6f0002"
OPENSTACK = Owner(
    vmm="qemu",
    name="instance-0000002a",
    uuid=UUID,
    project=PROJECT,
    display_name="web <1> & co",
    identity=Identity.CLAIMED,
    uid=0,
)
# What a program prints that looks at its own /proc and its own host directories.
LOOK = """
import dataclasses, json, sys
from pathlib import Path
from kvm.identity.owners import read_owner
pid = int(sys.argv[1])
owner, problems = read_owner(Path("/proc"), pid, pid)
print(json.dumps([dataclasses.asdict(owner), problems]))
"""

pytestmark = pytest.mark.live


def read(pid: int) -> OwnerReading:
    """What is read of a process; its topology is tested with command lines."""
    owner, problems = read_owner(PROC, pid, pid, ())
    return OwnerReading(replace(owner, cpu_topology=None), problems)


@pytest.fixture(scope="module")
def libvirt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirt]:
    if reason := find_missing():
        pytest.skip(reason)
    with running_libvirt(tmp_path_factory.mktemp("libvirt")) as daemon:
        yield daemon


@pytest.fixture
def openstack_guest(libvirt: Libvirt) -> Iterator[int]:
    metadata = render_nova_metadata("web <1> & co", PROJECT, "payments")
    yield libvirt.start_domain("instance-0000002a", UUID, metadata=metadata)
    libvirt.destroy_domain("instance-0000002a")


def test_openstack_guest_seen_from_outside_its_container(openstack_guest: int) -> None:
    # Its QEMU runs as root, and so could have written what is root's in its container.
    assert read(openstack_guest) == OwnerReading(OPENSTACK)


def test_openstack_guest_seen_from_beside_libvirt(libvirt: Libvirt, openstack_guest: int) -> None:
    inner_pid = str(libvirt.read_inner_pid("instance-0000002a"))
    printed = libvirt.run_inside([sys.executable, "-c", LOOK, inner_pid], {"PYTHONPATH": str(ROOT)})
    owner, problems = json.loads(printed)
    assert problems == []
    assert replace(Owner(**owner), cpu_topology=None) == replace(OPENSTACK, identity=Identity.LIBVIRT)


def test_status_with_another_pid_is_another_guests(libvirt: Libvirt, openstack_guest: int) -> None:
    status = libvirt.status_directory / "instance-0000002a.xml"
    text = status.read_text()
    inner_pid = libvirt.read_inner_pid("instance-0000002a")
    try:
        status.write_text(text.replace(f"pid='{inner_pid}'", "pid='999999'"))
        owner = read(openstack_guest).owner
    finally:
        status.write_text(text)
    assert owner == replace(OPENSTACK, project="", display_name="", identity=Identity.CMDLINE)


def test_kubevirt_guest_has_namespace_and_name(libvirt: Libvirt) -> None:
    metadata = render_kubevirt_metadata("e5f45977-58d0-45a3-97c5-0d8053183c60")
    pid = libvirt.start_domain("shop_cart-7", UUID, metadata=metadata)
    try:
        owner = read(pid).owner
    finally:
        libvirt.destroy_domain("shop_cart-7")
    assert owner == Owner("qemu", name="cart-7", uuid=UUID, namespace="shop", identity=Identity.CLAIMED, uid=0)


def test_awkward_name_and_an_underscore_alone(libvirt: Libvirt) -> None:
    name = 'a_b, "quoted" \\ ünï&<'
    pid = libvirt.start_domain(name, UUID)
    try:
        reading = read(pid)
    finally:
        libvirt.destroy_domain(name)
    assert reading == OwnerReading(Owner("qemu", name=name, uuid=UUID, identity=Identity.CLAIMED, uid=0))


def test_cache_finds_the_guest_and_forgets_it(libvirt: Libvirt, openstack_guest: int) -> None:
    errors: list[tuple[int, str, str]] = []
    cache = OwnerCache(lambda *error: errors.append(error))
    process = (openstack_guest, read_stat(PROC, openstack_guest).start_ticks)
    found = cache.find({process: openstack_guest}, 10.0)
    assert {key: replace(owner, cpu_topology=None) for key, owner in found.items()} == {process: OPENSTACK}
    assert cache.find({}, 0.0) == {}
    cache.close()
    assert errors == []


def test_libvirt_counts_the_guests_exits(libvirt: Libvirt, openstack_guest: int) -> None:
    statistics = libvirt.read_vcpu_statistics("instance-0000002a")
    assert statistics["vcpu.0.exits.sum"] > 0
    assert statistics["vcpu.1.notify_window_exits.sum"] == 0


def test_nothing_outlives_a_killed_test(tmp_path: Path) -> None:
    if reason := find_missing():
        pytest.skip(reason)
    code = f"""
import os, signal
from pathlib import Path
from tests.live.libvirt_daemon import running_libvirt
with running_libvirt(Path({str(tmp_path / "l")!r})) as libvirt:
    pid = libvirt.start_domain("orphan", {UUID!r})
    print(os.pidfd_open(pid), libvirt.init_pid, pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == -9, done.stderr
    for pid in map(int, done.stdout.split()[1:]):
        wait_for_end(pid)


def wait_for_end(pid: int) -> None:
    """Return when a process has ended; the test fails where it has not within a minute."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], 60.0)[0], f"process {pid} is still there"
    finally:
        os.close(pidfd)
