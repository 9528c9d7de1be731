"""Whose VM a process is: from captured files in a proc of the test's own, and from real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.discovery.processes import find_living_thread
from kvm.errors import VmGone
from kvm.identity.owners import OwnerReading, parse_namespace_pids, parse_pod_cgroup, read_owner
from kvm.model import Identity, Owner
from tests.capture_fixtures import imitated_vmm, scrub_cgroup, scrub_text
from tests.fake_proc import FIXTURES, UID, FakeProc
from tests.waiting import wait_until

UUID = "6c1b3a86-60c5-4d0a-9b22-1d7c5d8f6a01"
PROJECT = "0f5b5f7d2a6e4d55a1d0d25a7e6f0002"
# Files of a test belong to whoever runs it.
HOST_STATUS = Identity.LIBVIRT if os.geteuid() == 0 else Identity.CLAIMED
STATUS = Identity.CONTAINER if os.geteuid() == 0 else Identity.CLAIMED
OPENSTACK = Owner(
    "qemu",
    name="instance-0000002a",
    uuid=UUID,
    project=PROJECT,
    display_name='web "blue" & co',
    identity=STATUS,
    uid=UID,
)
CART = Owner("qemu", name="cart-7", uuid=UUID, namespace="shop", identity=STATUS, uid=UID)
UNDER_SCORE = Owner("qemu", name="under_score", uuid=UUID, identity=Identity.CMDLINE, uid=UID)
POD_CGROUP = "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-2.scope\n"


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    (tmp_path / "proc").mkdir()
    return FakeProc(tmp_path / "proc")


def read(proc: FakeProc, pid: int, *directories: Path) -> OwnerReading:
    owner, problems = read_owner(proc.path, pid, pid, directories)
    return OwnerReading(replace(owner, cpu_topology=None), problems)  # what -smp says is tested with command lines


# Reading one process --------------------------------------------------------------------------------------------------


def test_a_status_that_the_vms_user_can_write_is_a_claim(proc: FakeProc) -> None:
    pid = proc.add("libvirt-openstack")
    status = proc.add_status(pid, "libvirt-openstack", "instance-0000002a")
    status.parent.chmod(0o777)
    assert read(proc, pid) == OwnerReading(replace(OPENSTACK, identity=Identity.CLAIMED))
    status.parent.chmod(0o755)
    assert read(proc, pid) == OwnerReading(OPENSTACK)
    proc.set_uid(pid, 0)  # root in a container writes root's files there
    assert read(proc, pid) == OwnerReading(replace(OPENSTACK, identity=Identity.CLAIMED, uid=0))


def test_where_the_user_of_a_vm_is_not_known_its_files_are_claims(proc: FakeProc) -> None:
    pid = proc.add("libvirt-openstack")
    proc.add_status(pid, "libvirt-openstack", "instance-0000002a")
    (proc.path / str(pid) / "status").write_text((FIXTURES / "libvirt-openstack" / "status").read_text())
    assert read(proc, pid) == OwnerReading(replace(OPENSTACK, identity=Identity.CLAIMED, uid=None))


MACHINE = "0::/machine.slice/machine-qemu\\x2d7\\x2dunderscore.scope/libvirt/emulator\n"


@pytest.mark.parametrize(
    ("fixture", "cgroup", "directory"),
    [
        ("libvirt", MACHINE, "machine.slice/machine-qemu\\x2d7\\x2dunderscore.scope"),
        ("libvirt", "3:cpu:/machine/qemu-7-underscore.libvirt-qemu\n", "cpu/machine/qemu-7-underscore.libvirt-qemu"),
        ("proxmox", "0::/qemu.slice/100.scope\n", "qemu.slice/100.scope"),
        ("firecracker-jailed", "0::/firecracker/{own_id}\n", "firecracker/{own_id}"),
    ],
)
def test_a_cgroup_of_roots_that_is_named_after_the_vm_vouches_for_it(
    proc: FakeProc, tmp_path: Path, fixture: str, cgroup: str, directory: str
) -> None:
    pid = proc.add("qemu" if fixture == "proxmox" else fixture)
    if fixture == "proxmox":
        proc.cmdline(pid).write_bytes(b"\0".join([b"/usr/bin/kvm", b"-id", b"100", b"-name", b"web", b""]))
    own_id = read(proc, pid).owner.own_id
    (proc.path / str(pid) / "cgroup").write_text(cgroup.format(own_id=own_id))
    named = tmp_path / "cgroups" / directory.format(own_id=own_id)
    named.mkdir(parents=True)

    def find_identity() -> Identity:
        return read_owner(proc.path, pid, pid, (), tmp_path / "cgroups").owner.identity

    assert find_identity() is (Identity.CGROUP if os.geteuid() == 0 else Identity.CMDLINE)
    named.chmod(0o777)
    assert find_identity() is Identity.CMDLINE
    named.chmod(0o755)
    (proc.path / str(pid) / "cgroup").write_text("0::/user.slice/somebody-else.scope\n")
    assert find_identity() is Identity.CMDLINE


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to lay a trap that only others can lay")
def test_nothing_is_opened_in_a_mount_namespace_of_another_user_namespace(proc: FakeProc) -> None:
    pid = proc.add("libvirt-openstack")
    proc.add_status(pid, "libvirt-openstack", "instance-0000002a")
    with subprocess.Popen(["unshare", "-rm", "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE) as trap:
        try:
            assert trap.stdout is not None
            trap.stdout.read(1)
            namespace = proc.cmdline(pid).parent / "ns" / "mnt"
            namespace.unlink()
            namespace.symlink_to(f"/proc/{trap.pid}/ns/mnt")
            owner = read(proc, pid).owner
        finally:
            trap.kill()
    assert (owner.project, owner.identity) == ("", Identity.CMDLINE)


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
    assert read(proc, inner, tmp_path) == OwnerReading(replace(OPENSTACK, identity=HOST_STATUS))


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
    assert read(proc, pid) == OwnerReading(
        Owner("qemu", name="instance-0000002a", uuid=UUID, identity=Identity.CMDLINE, uid=UID)
    )


def test_kubevirt_by_its_metadata(proc: FakeProc) -> None:
    pid = proc.add("libvirt-kubevirt")
    proc.add_status(pid, "libvirt-kubevirt", "shop_cart-7")
    assert read(proc, pid) == OwnerReading(CART)


def test_kubevirt_by_its_cgroup_where_there_is_no_status(proc: FakeProc) -> None:
    pid = proc.add("libvirt-kubevirt")
    (proc.path / str(pid) / "cgroup").write_text(POD_CGROUP)
    assert read(proc, pid) == OwnerReading(replace(CART, identity=Identity.CMDLINE))


def test_an_underscore_alone_is_no_kubevirt(proc: FakeProc) -> None:
    pid = proc.add("libvirt")
    assert read(proc, pid).owner == UNDER_SCORE
    # Also not in a pod, where a libvirt's status says that KubeVirt did not make it.
    (proc.path / str(pid) / "cgroup").write_text(POD_CGROUP)
    proc.add_status(pid, "libvirt", "under_score")
    assert read(proc, pid).owner == replace(UNDER_SCORE, identity=STATUS)


@pytest.mark.parametrize("content", [b"", b"<domstatus pid='1'>", b"<!DOCTYPE d [<!ENTITY a 'b'>]><d>&a;</d>"])
def test_malformed_status_costs_what_it_would_have_told(proc: FakeProc, content: bytes) -> None:
    pid = proc.add("libvirt-openstack")
    status = proc.add_status(pid, "libvirt-openstack", "instance-0000002a")
    status.write_bytes(content)
    owner, problems = read(proc, pid)
    assert owner == Owner("qemu", name="instance-0000002a", uuid=UUID, identity=Identity.CMDLINE, uid=UID)
    assert [problem.kind for problem in problems] == ["malformed"]
    assert "run/libvirt/qemu/instance-0000002a.xml" in problems[0].message


def test_uuid_of_the_status_where_the_command_line_has_none(proc: FakeProc) -> None:
    pid = proc.add("libvirt-openstack")
    proc.add_status(pid, "libvirt-openstack", "instance-0000002a")
    proc.cmdline(pid).write_bytes(b"/usr/bin/qemu-system-x86_64\0-name\0guest=instance-0000002a\0")
    assert read(proc, pid).owner == OPENSTACK


@pytest.mark.parametrize(
    ("cgroup", "is_pod"),
    [
        ("0::/../../pod1b2c/0123abc", True),
        ("0::/../pod9/abc", True),
        ("0::/kubepods/burstable/pod1/abc", True),
        ("0::/../../kubepods-burstable-pod1.slice/cri-containerd-1.scope", True),
        ("0::/podman/abc", False),
        ("0::/user.slice/pod9/abc", False),
        ("0::/../podman-9/abc", False),
    ],
)
def test_pods_are_told_by_their_cgroup_also_from_inside_another_ones(cgroup: str, is_pod: bool) -> None:
    assert parse_pod_cgroup(cgroup) is is_pod


@pytest.mark.parametrize("name", ["../../../secret", "/secret", "a\nb", "\udcff", "x" * 65536, 'q"u', "..", "…"])
def test_names_of_strangers_lead_nowhere(proc: FakeProc, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.xml").write_text("not to be read")
    pid = proc.add("qemu")
    proc.cmdline(pid).write_bytes(b"qemu-system-x86_64\0-name\0" + os.fsencode(name) + b"\0")
    owner, problems = read(proc, pid, tmp_path)
    assert problems == ()
    assert 0 < len(owner.name.encode()) <= 128


def test_other_vmms_are_read_by_their_command_line_alone(proc: FakeProc) -> None:
    pid = proc.add("firecracker-jailed")
    own_id = "551e7604-e35c-42b3-b825-416853441234"
    assert read(proc, pid) == OwnerReading(
        Owner("firecracker", name=own_id, own_id=own_id, identity=Identity.CMDLINE, uid=UID)
    )


def test_process_that_has_ended_or_is_ending(proc: FakeProc) -> None:
    with pytest.raises(VmGone):
        read(proc, 1)
    pid = proc.add("qemu")
    proc.cmdline(pid).write_bytes(b"")
    assert read(proc, pid).owner == Owner("qemu", uid=UID)  # has wiped its arguments
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
    assert owner == Owner("qemu", uid=UID)
    assert [problem.kind for problem in problems] == ["unreadable"]


def test_real_processes(tmp_path: Path) -> None:
    with imitated_vmm(tmp_path / "firecracker", ["./firecracker", "--id", "real"]) as pid:
        assert read_owner(Path("/proc"), pid, pid, ()) == OwnerReading(
            Owner("firecracker", name="real", own_id="real", identity=Identity.CMDLINE, uid=os.getuid())
        )
    with imitated_vmm(tmp_path / "my-vmm", [b"x\n\xff", "--id", "real"]) as pid:
        assert read_owner(Path("/proc"), pid, pid, ()) == OwnerReading(Owner("my-vmm", uid=os.getuid()))


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
        owner = Owner("firecracker", name="leaderless", own_id="leaderless", identity=Identity.CMDLINE, uid=os.getuid())
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
