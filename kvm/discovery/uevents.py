"""Hears from the kernel that a VM has been made: KVM's uevents, on a netlink socket.

The event comes before the VM has vCPUs, and hot-plug sends none: it says where to look, not what is there.
"""

from __future__ import annotations

import errno
import socket

from kvm import abi


def parse_uevent(message: bytes) -> int | None:
    """Return the thread id that KVM's ``create`` uevent names, None for any other message.

    The message is ``ACTION@PATH`` and ``KEY=VALUE`` pairs, NUL between them (lib/kobject_uevent.c, and
    kvm_uevent_notify_change in virt/kvm/kvm_main.c).
    """
    head, *pairs = message.split(b"\0")
    if not head.endswith(b"@/devices/virtual/misc/kvm"):
        return None
    values = dict(pair.partition(b"=")[::2] for pair in pairs)
    number = values.get(b"PID", b"")
    return int(number) if values.get(b"EVENT") == b"create" and number.isdigit() and len(number) < 12 else None


def open_uevents() -> socket.socket:
    """Open a socket on which the kernel tells of new devices and VMs; raises OSError."""
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, abi.NETLINK_KOBJECT_UEVENT)
    try:
        netlink.bind((0, abi.KOBJECT_UEVENT_GROUP_KERNEL))
    except OSError:
        netlink.close()
        raise
    return netlink


def read_uevent(netlink: socket.socket) -> bytes:
    """Read one waiting uevent, b"" where there is none; one that did not come from the kernel reads as b"-"."""
    try:
        message, (sender, _groups) = netlink.recvfrom(65536)
    except BlockingIOError:
        return b""
    except OSError as err:
        if err.errno != errno.ENOBUFS:  # some were lost: the listings are read all the same
            raise
        return b"-"
    return message if sender == 0 else b"-"
