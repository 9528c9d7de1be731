"""Whose VM a process is: from captured files in a proc of the test's own, and from real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.discovery.processes import find_living_thread
from kvm.errors import VmGone
from kvm.identity.owners import OwnerReading, parse_namespace_pids, parse_pod_cgroup, read_owner
from kvm.model import Owner
from tests.capture_fixtures import imitated_vmm, scrub_cgroup, scrub_text
from tests.fake_proc import FIXTURES, FakeProc
from tests.waiting import wait_until

UUID = "6c1b3a86-60c5-4d0a-9b22-1d7c5d8f6a01"
PROJECT = "0f5b5f7d2a6e4d55a1d0d25a7e6f0002"
OPENSTACK = Owner("qemu", name="instance-0000002a", uuid=UUID, project=PROJECT, display_name='web "blue" & co')
POD_CGROUP = "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-2.scope\n"


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    (tmp_path / "proc").mkdir()
    return FakeProc(tmp_path / "proc")


def read(proc: FakeProc, pid: int, *directories: Path) -> OwnerReading:
    return read_owner(proc.path, pid, pid, directories)


# Reading one process --------------------------------------------------------------------------------------------------


def test_openstack_domain_in_its_own_root(proc: FakeProc) -> None:
    pid = proc.add("libvirt-openstack")
    proc.add_status(pid, "libvirt-openstack", "instance-0000002a")
    assert read(proc, pid) == OwnerReading(OPENSTACK)


def test_status_of_a_session_daemon(proc: FakeProc) -> None:
    pid = proc.add("libvirt-openstack")
    proc.add_status(pid, "libvirt-openstack", "instance-0000002a", "var/run/libvirt/qemu/run")
    assert read(proc, pid) == OwnerReading(OPENSTACK)


def test_in_the_hosts_directory_only_our_own_number_counts(proc: FakeProc, tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "libvirt-openstack" / "status.xml", tmp_path / "instance-0000002a.xml")
    numbers = (FIXTURES / "libvirt-openstack" / "status").read_text().splitlines()[-1].split()[1:]
    outer, inner = map(int, numbers)
    assert outer != inner
    proc.add("libvirt-openstack", outer)
    proc.add("libvirt-openstack", inner)
    assert read(proc, outer, tmp_path).owner.project == ""
    assert read(proc, inner, tmp_path) == OwnerReading(OPENSTACK)


def test_the_hosts_directory_comes_before_the_processs_own(proc: FakeProc, tmp_path: Path) -> None:
    inner = int((FIXTURES / "libvirt-openstack" / "status").read_text().split()[-1])
    pid = proc.add("libvirt-openstack", inner)
    own = proc.add_status(pid, "libvirt-openstack", "instance-0000002a")
    shutil.copy(own, tmp_path / own.name)
    own.write_bytes(own.read_bytes().replace(PROJECT.encode(), b"claimed"))
    assert read(proc, pid, tmp_path).owner.project == PROJECT
    assert read(proc, pid).owner.project == "claimed"


@pytest.mark.parametrize(("old", "new"), [(b" pid='", b" pid='9"), (b"<name>inst", b"<name>other-inst")])
def test_status_of_another_process_is_ignored(proc: FakeProc, old: bytes, new: bytes) -> None:
    pid = proc.add("libvirt-openstack")
    status = proc.add_status(pid, "libvirt-openstack", "instance-0000002a")
    status.write_bytes(status.read_bytes().replace(old, new))
    assert read(proc, pid) == OwnerReading(Owner("qemu", name="instance-0000002a", uuid=UUID))


def test_kubevirt_by_its_metadata(proc: FakeProc) -> None:
    pid = proc.add("libvirt-kubevirt")
    proc.add_status(pid, "libvirt-kubevirt", "shop_cart-7")
    assert read(proc, pid) == OwnerReading(Owner("qemu", name="cart-7", uuid=UUID, namespace="shop"))


def test_kubevirt_by_its_cgroup_where_there_is_no_status(proc: FakeProc) -> None:
    pid = proc.add("libvirt-kubevirt")
    (proc.path / str(pid) / "cgroup").write_text(POD_CGROUP)
    assert read(proc, pid) == OwnerReading(Owner("qemu", name="cart-7", uuid=UUID, namespace="shop"))


def test_an_underscore_alone_is_no_kubevirt(proc: FakeProc) -> None:
    pid = proc.add("libvirt")
    assert read(proc, pid).owner == Owner("qemu", name="under_score", uuid=UUID)
    # Also not in a pod, where a libvirt's status says that KubeVirt did not make it.
    (proc.path / str(pid) / "cgroup").write_text(POD_CGROUP)
    proc.add_status(pid, "libvirt", "under_score")
    assert read(proc, pid).owner == Owner("qemu", name="under_score", uuid=UUID)


@pytest.mark.parametrize("content", [b"", b"<domstatus pid='1'>", b"<!DOCTYPE d [<!ENTITY a 'b'>]><d>&a;</d>"])
def test_malformed_status_costs_what_it_would_have_told(proc: FakeProc, content: bytes) -> None:
    pid = proc.add("libvirt-openstack")
    status = proc.add_status(pid, "libvirt-openstack", "instance-0000002a")
    status.write_bytes(content)
    owner, problems = read(proc, pid)
    assert owner == Owner("qemu", name="instance-0000002a", uuid=UUID)
    assert [problem.kind for problem in problems] == ["malformed"]
    assert "run/libvirt/qemu/instance-0000002a.xml" in problems[0].message


def test_uuid_of_the_status_where_the_command_line_has_none(proc: FakeProc) -> None:
    pid = proc.add("libvirt-openstack")
    proc.add_status(pid, "libvirt-openstack", "instance-0000002a")
    proc.cmdline(pid).write_bytes(b"/usr/bin/qemu-system-x86_64\0-name\0guest=instance-0000002a\0")
    assert read(proc, pid).owner == OPENSTACK


@pytest.mark.parametrize("name", ["../../../secret", "/secret", "a\nb", "\udcff", "x" * 65536, 'q"u', "..", "…"])
def test_names_of_strangers_lead_nowhere(proc: FakeProc, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.xml").write_text("not to be read")
    pid = proc.add("qemu")
    proc.cmdline(pid).write_bytes(b"qemu-system-x86_64\0-name\0" + os.fsencode(name) + b"\0")
    owner, problems = read(proc, pid, tmp_path)
    assert problems == ()
    assert 0 < len(owner.name) <= 256


def test_other_vmms_are_read_by_their_command_line_alone(proc: FakeProc) -> None:
    pid = proc.add("firecracker-jailed")
    own_id = "551e7604-e35c-42b3-b825-416853441234"
    assert read(proc, pid) == OwnerReading(Owner("firecracker", name=own_id, own_id=own_id))


def test_process_that_has_ended_or_is_ending(proc: FakeProc) -> None:
    with pytest.raises(VmGone):
        read(proc, 1)
    pid = proc.add("qemu")
    proc.cmdline(pid).write_bytes(b"")
    assert read(proc, pid).owner == Owner("qemu")  # has wiped its arguments
    (proc.cmdline(pid).parent / "exe").unlink()
    with pytest.raises(VmGone):
        read(proc, pid)
    proc.cmdline(pid).unlink()
    with pytest.raises(VmGone):
        read(proc, pid)


def test_unreadable_command_line_leaves_the_program(proc: FakeProc) -> None:
    pid = proc.add("qemu")
    proc.cmdline(pid).unlink()
    proc.cmdline(pid).mkdir()
    owner, problems = read(proc, pid)
    assert owner == Owner("qemu")
    assert [problem.kind for problem in problems] == ["unreadable"]


def test_real_processes(tmp_path: Path) -> None:
    with imitated_vmm(tmp_path / "firecracker", ["./firecracker", "--id", "real"]) as pid:
        assert read_owner(Path("/proc"), pid, pid, ()) == OwnerReading(Owner("firecracker", name="real", own_id="real"))
    with imitated_vmm(tmp_path / "my-vmm", [b"x\n\xff", "--id", "real"]) as pid:
        assert read_owner(Path("/proc"), pid, pid, ()) == OwnerReading(Owner("my-vmm"))


LEADERLESS = """
import ctypes, os, sys, threading
def stay():
    print(threading.get_native_id(), flush=True)
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=stay).start()
ctypes.CDLL(None).syscall(60, 0)  # exit(2): of this thread alone
"""


def test_process_whose_leader_thread_has_exited() -> None:
    proc = Path("/proc")
    with subprocess.Popen(
        ["firecracker", "-c", LEADERLESS, "--id", "leaderless"],
        executable=os.path.realpath(sys.executable),
        env={"PYTHONHOME": sys.base_prefix},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        tid = int(process.stdout.readline())
        wait_until(lambda: find_living_thread(proc, process.pid) == tid)
        assert (proc / str(process.pid) / "cmdline").read_bytes() == b""
        owner = Owner("firecracker", name="leaderless", own_id="leaderless")
        assert read_owner(proc, process.pid, tid, ()) == OwnerReading(owner)


def test_namespace_pids() -> None:
    assert parse_namespace_pids("Name:\tq\nNSpid:\t8054\t93\nNSsid:\t1\n") == {8054, 93}
    assert parse_namespace_pids("Name:\tNSpid: 7\n") == set()
    assert parse_namespace_pids("NSpid:\n") == set()


@given(st.text())
def test_any_text_of_proc_is_understood_or_not(text: str) -> None:
    assert all(number >= 0 for number in parse_namespace_pids(text))
    assert parse_pod_cgroup(text) in (True, False)


@pytest.mark.parametrize(
    ("path", "is_pod"),
    [
        ("/kubepods/burstable/pod1/2", True),
        ("/kubepods.slice/kubepods-pod1.slice/crio-2.scope", True),
        ("/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod1.slice", True),
        ("/../../kubepods-besteffort.slice/x", True),
        ("/machine.slice/machine-qemu\\x2d1\\x2da_b.scope/libvirt/emulator", False),
        ("/mykubepods/x", False),
        ("/", False),
    ],
)
def test_pods_by_their_cgroup(path: str, is_pod: bool) -> None:
    assert parse_pod_cgroup(f"12:cpu:{path}\n0::{path}\n") is is_pod


# The capture script ---------------------------------------------------------------------------------------------------


def test_captures_of_hosts_in_use_are_scrubbed() -> None:
    replaced: dict[bytes, bytes] = {}
    status = scrub_text(
        f"<name>acme-db</name><uuid>{UUID}</uuid><nova:project uuid='{PROJECT}'>acme</nova:project>".encode(), replaced
    )
    cmdline = scrub_text(
        f"-name\0guest=acme-db,debug-threads=on\0-uuid\0{UUID}\0mac=fa:16:3e:01:02:03\0".encode(), replaced
    )
    for secret in (b"acme", UUID.encode(), PROJECT.encode(), b"fa:16"):
        assert secret not in status + cmdline
    name = status.split(b"<name>")[1].split(b"<")[0]
    assert b"guest=" + name + b"," in cmdline
    assert scrub_cgroup("0::/machine.slice/machine-qemu\\x2d1\\x2dacme.scope/libvirt/vcpu0\n") == (
        "0::/machine.slice/x/libvirt/vcpu0\n"
    )
