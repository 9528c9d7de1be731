"""Holds VMs on ``/dev/kvm`` in ways in which few VMMs do, and does nothing else: ``strange_vmm.py WAY``.

Prints a JSON line when it is as wanted, in ways that change another one after a line of input; ends with its input.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

KVM_CREATE_VM, KVM_CREATE_VCPU = 0xAE01, 0xAE41  # include/uapi/linux/kvm.h
SYS_exit = 60  # ends one thread; arch/x86/include/asm/unistd_64.h
NOBODY = 65534
made = threading.Event()


def make_vm(*vcpu_ids: int) -> tuple[int, list[int]]:
    """Make a VM; returns its fd and those of its vCPUs."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    vcpus = [fcntl.ioctl(vm, KVM_CREATE_VCPU, vcpu_id) for vcpu_id in vcpu_ids]
    os.close(kvm)
    return vm, vcpus


def tell(**fields: object) -> None:
    print(json.dumps({"pid": os.getpid(), **fields}), flush=True)


def wait() -> None:
    sys.stdin.read()


def hold_empty() -> None:
    vm, _ = make_vm()
    tell(vm_fd=vm)
    wait()


def hold_ids_that_fall() -> None:
    vm, _ = make_vm(7, 2, 5)
    tell(vm_fd=vm)
    wait()


def hold_several() -> None:
    first, _ = make_vm(0, 1)
    second, _ = make_vm(0, 1, 2)
    tell(vm_fds=[first, second])
    wait()


def hold_vcpus_only() -> None:
    for _ in range(2):
        vm, _ = make_vm(0, 1)
        os.close(vm)
    tell()
    wait()


def hold_duplicates() -> None:
    vm, vcpus = make_vm(0, 1)
    low = os.dup(vm)
    for fd in (vm, vm, *vcpus, *vcpus):
        os.dup(fd)
    os.close(vm)
    tell(vm_fd=low)
    wait()


def hold_with_child() -> None:
    """The child holds all files too, and lives on when the parent has ended with its input."""
    vm, vcpus = make_vm(0, 1)
    told, telling = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.close(0)
        os.write(telling, b"%d" % os.getpid())
        os.close(telling)
        os.close(1)
        threading.Event().wait()
    os.close(telling)
    tell(vm_fd=vm, vcpu_fds=vcpus, child=int(os.read(told, 20)))
    wait()


def hold_until_its_file_moves() -> None:
    """After a line of input the VM is held by a higher fd."""
    vm, _ = make_vm(0, 1)
    low, high = sorted((vm, os.dup(vm)))
    tell(vm_fd=low)
    sys.stdin.readline()
    os.close(low)
    tell(vm_fd=high)
    wait()


def end_leader() -> None:
    """End this thread, and not the process."""
    ctypes.CDLL(None).syscall(SYS_exit, 0)


def keep_by_thread() -> None:
    """Hold a VM by a thread that is not the leader; tell when the leader has ended."""
    vm, _ = make_vm(0, 1)
    made.set()
    while Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        os.sched_yield()
    tell(vm_fd=vm)
    os.read(0, 1)
    os._exit(0)


def hold_without_leader() -> None:
    """The leader's thread has ended: the process lives on, and its /proc/PID/fd is empty."""
    threading.Thread(target=keep_by_thread, daemon=True).start()
    end_leader()


def hold_until_the_leader_ends() -> None:
    """After a line of input the leader's thread ends."""
    threading.Thread(target=keep_by_thread, daemon=True).start()
    made.wait()
    tell()
    sys.stdin.readline()
    end_leader()


def hold_many_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = min(hard, 100_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    null = os.open("/dev/null", os.O_RDONLY)
    while os.dup(null) < files - 10:
        pass
    vm, _ = make_vm(0, 1)
    tell(vm_fd=vm, files=files)
    wait()


def hold_forgeries() -> None:
    """Not root: FIFOs and files that are called as KVM's are."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        for name in ("kvm-vcpu:0", "kvm-vm"):
            os.mkfifo(f"{directory}/{name}")
            os.open(f"{directory}/{name}", os.O_RDWR)
            os.memfd_create(name)
        tell()
        wait()
        for name in ("kvm-vcpu:0", "kvm-vm"):
            Path(directory, name).unlink()
        os._exit(0)


WAYS: dict[str, Callable[[], None]] = {
    name.removeprefix("hold_"): function for name, function in list(globals().items()) if name.startswith("hold_")
}

if __name__ == "__main__":
    WAYS[sys.argv[1]]()
