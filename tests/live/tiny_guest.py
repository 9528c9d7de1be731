"""A guest of our own: a few instructions on ``/dev/kvm``, in a process that looks like a VMM.

Run as a program it makes a VM in long mode with ioctls alone, one thread per vCPU, prints a JSON line
when it is ready and obeys one command a line on stdin, answering each with JSON lines on stdout:

=========================== =====================================================================
``run N``                   every vCPU writes a port exactly N times and halts; ``done`` per vCPU
``loop``                    every vCPU writes the port until ``stop``
``notify key=value ...``    writes to the injector's port, see below; ends by itself or by ``stop``
``stop``                    kicks every vCPU out of KVM_RUN; ``done`` per running vCPU, then ``stopped``
``quit``, end of input      ends the process
=========================== =====================================================================

``notify`` speaks the protocol of ``tests/lab/notify_inject/notify_inject.c``. Its keys: ``exits`` (at one
instruction, 0 for ever), ``rounds`` (0 for ever), ``rips`` (instructions a round), ``other`` (ordinary port
writes after each), ``qualification``, ``vectoring``, ``flags``, ``rcx``, ``vcpu`` (one index; all without it),
``nested`` (1: in a guest of the guest, on AMD; it must end by itself), ``code`` (where the instructions are; each vCPU
has a page of its own).

Decisions:

* One file that needs nothing beside it: it runs as its own program, under the names of a VMM.
* Only the standard library, and little of it: under emulation importing dataclasses and pathlib takes half a
  second. ctypes only for an address that KVM needs. The ioctl numbers are this file's own, so that it does
  not share a mistake with the code that it tests.
* The process gets the command line, process name and thread names of the VMM it stands for. QEMU creates
  each vCPU in that vCPU's thread and holds a stats fd for it; Firecracker does neither.
* The injector's port has an ioeventfd: KVM handles the write in the kernel, as it handles a notify exit.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import mmap
import os
import signal
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

# include/uapi/linux/kvm.h
KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE, KVM_GET_SUPPORTED_CPUID = 0xAE01, 0xAE04, 0xC008AE05
KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION, KVM_IOEVENTFD = 0xAE41, 0x4020AE46, 0x4040AE79
KVM_RUN, KVM_GET_REGS, KVM_SET_REGS, KVM_GET_STATS_FD = 0xAE80, 0x8090AE81, 0x4090AE82, 0xAECE
KVM_GET_SREGS, KVM_SET_SREGS, KVM_SET_CPUID2, KVM_SET_MSRS = 0x8138AE83, 0x4138AE84, 0x4008AE90, 0x4008AE89
KVM_EXIT_IO, KVM_EXIT_HLT, KVM_EXIT_NOTIFY = 2, 5, 37
KVM_IOEVENTFD_FLAG_PIO = 2
REGS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)), "rip", "rflags")

MEMORY_BYTES = 0x200000
PML4, PDPT, PD, CODE = 0x2000, 0x3000, 0x4000, 0x10000
CODE_BYTES = 0x1000
# Of each vCPU: what runs the guest of the guest, its control block, and a page for the CPU.
NESTED, NESTED_BYTES = 0x100000, 0x3000
CR0, CR4, EFER = 0x80050033, 0x20, 0x500  # long mode, with paging
EFER_AT, EFER_SVME, MSR_VM_HSAVE_PA = 24 * 8 + 32 + 5 * 8, 0x1000, 0xC0010117
PYTHON = os.path.realpath(sys.executable)
PLAIN_PORT, NOTIFY_PORT = 0x10, 0x75
OUT_BYTES = 2  # out %al, $port
STYLES = {"qemu": ("/usr/bin/qemu-system-x86_64", "CPU {}/KVM"), "firecracker": ("/usr/bin/firecracker", "fc_vcpu {}")}


class Program(NamedTuple):
    """What a vCPU executes: instructions, and registers to begin with."""

    code: bytes
    registers: Mapping[str, int]
    nested: bool = False
    code_at: int | None = None


def build_program(ports: Sequence[int], rounds: int, registers: Mapping[str, int] | None = None) -> Program:
    """Returns a loop of ``out %al, $port`` instructions that ends in ``hlt`` after `rounds`, 0 for never."""
    outs = b"".join(bytes([0xE6, port]) for port in ports)
    if rounds == 0:
        code = outs + b"\xe9" + struct.pack("<i", -len(outs) - 5)  # jmp to the start
    else:
        outs += b"\x48\xff\xcb"  # dec %rbx
        code = outs + b"\x0f\x85" + struct.pack("<i", -len(outs) - 6) + b"\xf4"  # jnz to the start, hlt
    if len(code) > CODE_BYTES:
        raise ValueError(f"{len(ports)} instructions do not fit into {CODE_BYTES} bytes of guest code")
    return Program(code, {"rbx": rounds, **(registers or {})})


def build_notify_program(keys: Mapping[str, int]) -> Program:
    """Returns the program for the keys of a ``notify`` command."""
    ports = [NOTIFY_PORT, *[PLAIN_PORT] * keys.get("other", 0)] * keys.get("rips", 1)
    wanted = {"r8": "qualification", "r9": "vectoring", "r10": "flags", "rcx": "rcx"}
    registers = {register: keys.get(key, 0) for register, key in wanted.items()}
    program = build_program(ports, keys.get("rounds", 1), {**registers, "r11": keys.get("exits", 1)})
    return program._replace(nested=bool(keys.get("nested")), code_at=keys.get("code"))


def build_vmcb(rip: int) -> bytes:
    """Returns the control block (AMD64 manual 2, appendix B) of a guest like its host; ``hlt`` leads back to that."""
    vmcb = bytearray(0x1000)
    struct.pack_into("<2I", vmcb, 0x0C, 1 << 24, 1)  # intercept hlt and vmrun, and no port
    struct.pack_into("<I", vmcb, 0x58, 1)  # its ASID
    for number, attributes in enumerate((0xC93, 0xA9B, 0xC93, 0xC93, 0xC93, 0xC93)):  # es, cs, ss, ds, fs, gs
        struct.pack_into("<HHI", vmcb, 0x400 + 16 * number, 8 if number == 1 else 16, attributes, 0xFFFFFFFF)
    struct.pack_into("<Q", vmcb, 0x4D0, EFER | EFER_SVME)
    # cr4, cr3, cr0, dr7, dr6, rflags, rip
    struct.pack_into("<7Q", vmcb, 0x548, CR4, PML4, CR0, 0x400, 0xFFFF0FF0, 2, rip)
    return bytes(vmcb)


class Vm:
    """A VM with two megabytes of identity-mapped memory."""

    def __init__(self) -> None:
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.fd = fcntl.ioctl(self.kvm, KVM_CREATE_VM, 0)
        self.creator_tid = threading.get_native_id()
        self.memory = mmap.mmap(-1, MEMORY_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        fcntl.ioctl(self.fd, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, MEMORY_BYTES, address))
        for table, entry in ((PML4, PDPT | 7), (PDPT, PD | 7), (PD, 0x87)):
            struct.pack_into("<Q", self.memory, table, entry)
        self.run_bytes = fcntl.ioctl(self.kvm, KVM_GET_VCPU_MMAP_SIZE, 0)
        self.eventfd = os.eventfd(0)
        event = struct.pack("<QQIiI36x", 0, NOTIFY_PORT, 0, self.eventfd, KVM_IOEVENTFD_FLAG_PIO)
        fcntl.ioctl(self.fd, KVM_IOEVENTFD, event)
        self.cpuid = bytearray(struct.pack("<II", 256, 0) + bytes(256 * 40))
        fcntl.ioctl(self.kvm, KVM_GET_SUPPORTED_CPUID, self.cpuid)


class Vcpu:
    """One vCPU and the thread that runs it."""

    def __init__(self, vm: Vm, index: int, vcpu_id: int, thread_name: str) -> None:
        self.vm, self.index, self.vcpu_id, self.thread_name = vm, index, vcpu_id, thread_name
        self.code = CODE + index * CODE_BYTES
        self.fd = self.stats_fd = -1
        self.tid = 0
        self.thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._program: Program | None = None
        self._stop = False
        self.idle = threading.Event()

    def create(self, with_stats_fd: bool) -> None:
        """Creates the vCPU in 64-bit mode; the thread that calls is the one that KVM writes down."""
        self.fd = fcntl.ioctl(self.vm.fd, KVM_CREATE_VCPU, self.vcpu_id)
        # From Linux 7 on, long mode is refused unless CPUID has said before that there is one.
        fcntl.ioctl(self.fd, KVM_SET_CPUID2, self.vm.cpuid)
        self.run_page = mmap.mmap(self.fd, self.vm.run_bytes)
        sregs = bytearray(312)
        fcntl.ioctl(self.fd, KVM_GET_SREGS, sregs)
        # struct kvm_segment: cs is 64-bit code, the five others flat data.
        struct.pack_into("<QIH10B", sregs, 0, 0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)
        for number in range(1, 6):
            struct.pack_into("<QIH10B", sregs, 24 * number, 0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        # After eight segments and two tables: cr0, cr2, cr3, cr4, cr8, efer (LME | LMA).
        struct.pack_into("<6Q", sregs, 24 * 8 + 32, CR0, 0, PML4, CR4, 0, EFER)
        fcntl.ioctl(self.fd, KVM_SET_SREGS, bytes(sregs))
        if with_stats_fd:
            self.stats_fd = fcntl.ioctl(self.fd, KVM_GET_STATS_FD, 0)

    def serve(self, with_stats_fd: bool, first: Program, ready: threading.Barrier) -> None:
        """The vCPU thread: waits for programs and runs them until the process ends."""
        self.tid = threading.get_native_id()
        write_thread_name(self.tid, self.thread_name)
        if self.fd < 0:
            self.create(with_stats_fd)
        self._execute(first)  # KVM learns which thread runs the vCPU
        self.idle.set()
        ready.wait()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._program is not None)
                program, self._program = self._program, None
            assert program is not None
            outcome = self._execute(program)
            with self._wake:  # who has read the answer may give the next program at once
                answer(event="done", vcpu=self.index, **outcome)
                self.idle.set()

    def start(self, program: Program) -> None:
        """Hands the vCPU thread its next program."""
        with self._wake:
            if not self.idle.is_set():
                raise RuntimeError(f"vCPU {self.index} still runs its last program")
            self.idle.clear()
            self._stop = False
            self.run_page[1] = 0  # immediate_exit
            self._program = program
            self._wake.notify()

    def kick(self) -> None:
        """Makes KVM_RUN return, whether the thread is inside or just about to enter it.

        With immediate_exit KVM first finishes the port write it was at, so the next program starts afresh.
        """
        self._stop = True
        self.run_page[1] = 1
        if self.thread is not None and self.thread.ident is not None:
            signal.pthread_kill(self.thread.ident, signal.SIGUSR1)

    def _execute(self, program: Program) -> dict[str, Any]:
        code = self.code if program.code_at is None else program.code_at
        self.vm.memory[code : code + len(program.code)] = program.code
        start = self._prepare_nested(code) if program.nested else code
        self._write_registers({"rip": start, "rflags": 2, "rsp": MEMORY_BYTES - 0x1000, **program.registers})
        counts = {"port_writes": 0, "notify_user_exits": 0, "halted": False}
        while True:
            try:
                fcntl.ioctl(self.fd, KVM_RUN, 0)
            except InterruptedError:
                if self._stop:
                    break
                continue
            reason = struct.unpack_from("<I", self.run_page, 8)[0]
            if reason == KVM_EXIT_HLT:
                counts["halted"] = True
                break
            if reason == KVM_EXIT_IO:
                counts["port_writes"] += 1
            elif reason == KVM_EXIT_NOTIFY:
                counts["notify_user_exits"] += 1
                registers = self._read_registers()
                self._write_registers({**registers, "rip": registers["rip"] + OUT_BYTES})
            else:
                raise RuntimeError(f"vCPU {self.index} left KVM_RUN with exit reason {reason}")
        return {**counts, "code": code, "registers": self._read_registers()}

    def _prepare_nested(self, code: int) -> int:
        """Writes what runs the program as a guest of this guest; returns where that begins."""
        start = NESTED + self.index * NESTED_BYTES
        vmcb, for_the_cpu = start + 0x1000, start + 0x2000
        # mov $vmcb, %eax; vmrun; stgi; hlt
        stub = b"\xb8" + struct.pack("<I", vmcb) + b"\x0f\x01\xd8\x0f\x01\xdc\xf4"
        self.vm.memory[start : start + len(stub)] = stub
        self.vm.memory[vmcb : vmcb + 0x1000] = build_vmcb(code)
        sregs = bytearray(312)
        fcntl.ioctl(self.fd, KVM_GET_SREGS, sregs)
        struct.pack_into("<Q", sregs, EFER_AT, EFER | EFER_SVME)
        fcntl.ioctl(self.fd, KVM_SET_SREGS, bytes(sregs))
        fcntl.ioctl(self.fd, KVM_SET_MSRS, struct.pack("<IIIIQ", 1, 0, MSR_VM_HSAVE_PA, 0, for_the_cpu))
        return start

    def _read_registers(self) -> dict[str, int]:
        regs = bytearray(len(REGS) * 8)
        fcntl.ioctl(self.fd, KVM_GET_REGS, regs)
        return dict(zip(REGS, struct.unpack("<18Q", regs), strict=True))

    def _write_registers(self, registers: Mapping[str, int]) -> None:
        fcntl.ioctl(self.fd, KVM_SET_REGS, struct.pack("<18Q", *(registers.get(name, 0) for name in REGS)))


def write_thread_name(tid: int, name: str) -> None:
    """Names one of our threads; the kernel cuts a name after 15 bytes."""
    fd = os.open(f"/proc/self/task/{tid}/comm", os.O_WRONLY)
    os.write(fd, name.encode("ascii"))
    os.close(fd)


def answer(**fields: object) -> None:
    """Prints one JSON line; one write, so that lines of several threads do not mix."""
    os.write(1, (json.dumps(fields) + "\n").encode())


def end_process(args: threading.ExceptHookArgs) -> None:
    """Ends the process when a vCPU thread fails: a guest that is half alive would mislead a test."""
    sys.__excepthook__(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
    os._exit(1)


def ignore_kick(_signal: int, _frame: FrameType | None) -> None:
    """Does nothing: a caught signal is what makes KVM_RUN return."""


def open_guest(args: argparse.Namespace) -> tuple[Vm, list[Vcpu]]:
    """Makes the VM and starts its vCPU threads; returns when each has been in KVM_RUN."""
    vm = Vm()
    _, thread_name = STYLES[args.style]
    ids = args.vcpu_ids or range(args.vcpus)
    vcpus = [Vcpu(vm, index, vcpu_id, thread_name.format(index)) for index, vcpu_id in enumerate(ids)]
    first = build_program([PLAIN_PORT], args.port_writes) if args.port_writes else build_program([], 1)
    ready = threading.Barrier(len(vcpus) + 1)
    for vcpu in vcpus:
        if args.style == "firecracker":
            vcpu.create(args.stats_fds)
        vcpu.thread = threading.Thread(target=vcpu.serve, args=(args.stats_fds, first, ready), daemon=True)
        vcpu.thread.start()
    ready.wait()
    return vm, vcpus


def obey(line: str, vcpus: Sequence[Vcpu]) -> bool:
    """Carries out one command; False when it says to end."""
    verb, *words = line.split()
    if verb == "quit":
        return False
    if verb == "stop":
        for vcpu in vcpus:
            vcpu.kick()
        for vcpu in vcpus:
            vcpu.idle.wait()
        answer(event="stopped")
        return True
    keys = {name: int(value, 0) for name, value in (word.split("=", 1) for word in words if "=" in word)}
    programs = {
        "run": lambda: build_program([PLAIN_PORT], int(words[0])),
        "loop": lambda: build_program([PLAIN_PORT], 0),
        "notify": lambda: build_notify_program(keys),
    }
    program = programs[verb]()
    for vcpu in [vcpus[keys["vcpu"]]] if "vcpu" in keys else vcpus:
        vcpu.start(program)
    return True


def build_command(args: argparse.Namespace) -> list[str]:
    """Returns the words of a command line as the VMM that is stood for would have it, this script as the second."""
    argv0, _ = STYLES[args.style]
    words = [argv0, __file__, "--style", args.style, "--vcpus", str(args.vcpus)]
    words += ["--stats-fds"] if args.stats_fds else []
    words += ["--vm-stats-fd"] if args.vm_stats_fd else []
    words += ["--vcpu-ids", ",".join(map(str, args.vcpu_ids))] if args.vcpu_ids else []
    words += ["--port-writes", str(args.port_writes)] if args.port_writes is not None else []
    if args.style == "firecracker":
        return [*words, "--id", args.name] if args.name else words
    words += ["-name", f"guest={args.name.replace(',', ',,')},debug-threads=on"] if args.name else []
    return [*words, "-uuid", args.uuid] if args.uuid else words


def build_environment() -> dict[str, str]:
    """Returns the environment in which Python finds its library although argv[0] is a VMM's."""
    return {**os.environ, "PYTHONHOME": sys.base_prefix}


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parses our own options and those of the VMMs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--vcpus", type=int, default=1)
    parser.add_argument("--vcpu-ids", type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--style", choices=sorted(STYLES), default="qemu")
    parser.add_argument("--stats-fds", action="store_true", help="hold a stats fd for each vCPU, as QEMU >= 8.1 does")
    parser.add_argument("--vm-stats-fd", action="store_true", help="hold a stats fd of the VM itself, as no VMM does")
    parser.add_argument("--port-writes", type=int, help="every vCPU makes so many before the ready line")
    parser.add_argument("--name")
    parser.add_argument("--uuid")
    for option in ("-name", "-uuid", "--id"):
        parser.add_argument(option, dest="vmm" + option.replace("-", "_"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    """Runs a guest until its stdin ends."""
    args = parse_arguments(words)
    if args.name or args.uuid:
        os.execve(PYTHON, build_command(args), build_environment())
    write_thread_name(os.getpid(), STYLES[args.style][0].rpartition("/")[2])
    signal.signal(signal.SIGUSR1, ignore_kick)
    threading.excepthook = end_process
    vm, vcpus = open_guest(args)
    vm_stats_fd = fcntl.ioctl(vm.fd, KVM_GET_STATS_FD, 0) if args.vm_stats_fd else -1
    about = [{"index": v.index, "vcpu_id": v.vcpu_id, "tid": v.tid, "fd": v.fd, "stats_fd": v.stats_fd} for v in vcpus]
    ids = {"pid": os.getpid(), "vm_fd": vm.fd, "creator_tid": vm.creator_tid, "vm_stats_fd": vm_stats_fd}
    answer(event="ready", **ids, vcpus=about)
    for line in sys.stdin:
        if line.strip() and not obey(line, vcpus):
            break
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
