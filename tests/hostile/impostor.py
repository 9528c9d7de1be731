"""A VM of an unprivileged user that claims to be another customer's: by name, UUID, and a libvirt status of its own.

It opens /dev/kvm as root, becomes that user, and then root of a user and mount namespace of its own, where
``/run/libvirt/qemu`` is what it likes. Prints ``ready`` when its VM is there; ends at the end of its input.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from tests.hostile.held import hold, open_held
from tests.live import tiny_guest

KVM_CREATE_VM, KVM_CREATE_VCPU = 0xAE01, 0xAE41  # include/uapi/linux/kvm.h
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # include/uapi/linux/sched.h
NOBODY = 65534
STATUS = """<domstatus state='running' pid='{pid}'><domain type='kvm'><name>{name}</name><uuid>{uuid}</uuid><metadata>
<nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'><nova:name>{name}</nova:name><nova:owner>
<nova:project uuid='1'>VICTIM-PROJECT</nova:project></nova:owner></nova:instance>
<kubevirt:kubevirt xmlns:kubevirt='http://kubevirt.io'><kubevirt:metadata/></kubevirt:kubevirt></metadata></domain>
</domstatus>"""


def become_root_of_a_namespace() -> ctypes.CDLL:
    """Become that user, then root of a user and mount namespace of its own with an empty ``/run``; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: its own files in /proc are its own again
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {NOBODY} 1")
    Path("/proc/self/gid_map").write_text(f"0 {NOBODY} 1")
    if libc.mount(b"none", b"/run", b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), "mount")
    return libc


def main(name: str, uuid: str) -> None:
    """Become who it claims to be, and hold a VM."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    become_root_of_a_namespace()
    directory = Path("/run/libvirt/qemu")
    directory.mkdir(parents=True)
    (directory / f"{name}.xml").write_text(STATUS.format(pid=os.getpid(), name=name, uuid=uuid))
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    hold()


def open_impostor(name: str, uuid: str) -> AbstractContextManager[int]:
    """Hold such a VM; gives the pid of its process."""
    words = ["/usr/bin/qemu-system-x86_64", "-m", "tests.hostile.impostor", "-name", f"guest={name}", "-uuid", uuid]
    return open_held(words, tiny_guest.PYTHON, tiny_guest.build_environment())


if __name__ == "__main__":
    main(sys.argv[2].removeprefix("guest="), sys.argv[4])
