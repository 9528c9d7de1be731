"""What the kernel's verifier has to do for our BPF programs: instructions that it looks at before they may run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from kvm.bpf import notify_trigger, vcpu_programs
from kvm.bpf.bpf_object import BpfObject
from kvm.bpf.btf import read_types
from kvm.bpf.libbpf import open_library

# A quarter of a second on a real core.
MOST = 30_000
# The first of the kernels on which this has been tried.
DIRECT_LOADS_SINCE = (6, 18)
TRIGGER = ("on_entry", "on_return", "learn")


def count_verified(object_: BpfObject, name: str) -> int:
    """Count a loaded program's instructions (Documentation/filesystems/proc.rst, fdinfo)."""
    text = Path(f"/proc/self/fdinfo/{object_.program_fd(name)}").read_text()
    found = re.search(r"^verified_insns:\s*(\d+)$", text, re.MULTILINE)
    assert found, text
    return int(found[1])


def takes_direct_loads(object_: BpfObject) -> bool:
    """Load the programs with direct loads, which only old kernels may refuse."""
    try:
        object_.load()
    except OSError:
        assert read_kernel_version() < DIRECT_LOADS_SINCE
        return False
    return True


def read_kernel_version() -> tuple[int, int]:
    """Read the first two numbers of the running kernel's version."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(re.match(r"\d+", minor)[0])  # type: ignore[index]


def read_bill(function: str = "") -> Iterator[tuple[str, int]]:
    """Load our programs, those of the trigger for this function, and yield what each took."""
    library, types = open_library(), read_types(Path("/sys"))
    with closing(BpfObject(library, vcpu_programs.OBJECT, types)) as vcpus:
        vcpus.load()
        for name in vcpu_programs.ALL:
            yield name, count_verified(vcpus, name)
    with closing(BpfObject(library, vcpu_programs.DIRECT_OBJECT, types)) as vcpus:
        if takes_direct_loads(vcpus):
            for name in vcpu_programs.ALL:
                yield f"{name} with direct loads", count_verified(vcpus, name)
    if function:
        with closing(BpfObject(library, notify_trigger.OBJECT, types)) as trigger:
            for name in TRIGGER[:2]:
                trigger.set_target(name, function)
            trigger.load()
            for name in TRIGGER:
                yield f"{name} of the trigger", count_verified(trigger, name)
