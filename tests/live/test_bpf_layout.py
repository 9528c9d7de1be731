"""The eBPF source where the types are not those of the KVM that runs: types that were moved stand for a moved KVM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from kvm.bpf.btf import split_sections
from kvm.counters.bpf import BpfSource
from kvm.counters.source import CounterSource
from kvm.counters.stats_fd import StatsFdSource
from kvm.discovery.vm_discovery import Discovery
from kvm.errors import SourceUnavailable
from kvm.host import throwaway_vm
from kvm.identity.owner_cache import OwnerCache
from kvm.read_errors import ReadErrors
from kvm.snapshot import HostReader
from tests.btf_types import cut_struct, make_other_struct, move_in_module, move_in_vmlinux, pack_btf
from tests.live import OTHER_EXITS, GuestProcess, open_guest_process

pytestmark = pytest.mark.live

NAMES = ("exits", "notify_window_exits")
NO_DEVICE = Path("/nonexistent/kvm")
BTF = Path("/sys/kernel/btf")
MAKERS: dict[str, Callable[[Path], BpfSource]] = {
    "list": lambda sys: BpfSource(NAMES, sys=sys),
    "files": lambda sys: BpfSource(NAMES, sys=sys, with_list=False),
    "names": lambda sys: BpfSource(NAMES, sys=sys, device=NO_DEVICE),
}


@pytest.fixture(scope="module")
def vmlinux() -> bytes:
    if (BTF / "kvm").exists():
        pytest.skip("KVM is a module here: the lab has what this shows")
    return (BTF / "vmlinux").read_bytes()


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """A /sys like the host's, but for the types in it."""
    (tmp_path / "kernel/btf").mkdir(parents=True)
    (tmp_path / "module").symlink_to("/sys/module")
    (tmp_path / "kernel/security").symlink_to("/sys/kernel/security")
    return tmp_path


def write_types(sysfs: Path, vmlinux: bytes, module: bytes) -> None:
    (sysfs / "kernel/btf/vmlinux").write_bytes(vmlinux)
    (sysfs / "kernel/btf/kvm").write_bytes(module)


def check_reads(source: BpfSource, guest: GuestProcess) -> None:
    """The source counts what the guest does."""
    guest.run(1000)
    before = next(counters for key, counters in source.read().items() if key.pid == guest.pid)
    guest.run(1000)
    after = next(counters for key, counters in source.read().items() if key.pid == guest.pid)
    assert after.tids == tuple(vcpu.tid for vcpu in guest.vcpus)
    (exits_before,), (exits_after,) = before.per_vcpu["exits"], after.per_vcpu["exits"]
    assert 1000 <= exits_after - exits_before <= 1000 + OTHER_EXITS


class Moved(NamedTuple):
    """The first member of struct kvm_vcpu that has moved, by how many bytes, and what is read otherwise then."""

    first: bytes
    by: int
    read: str


MOVED = [
    Moved(b"stat", 24, "fpu_reload reads (0,) and is (101,)"),
    Moved(b"stat", 8, "fpu_reload reads (0,) and is (101,)"),
    Moved(b"stat", -8, "fpu_reload reads (0,) and is (101,)"),
    Moved(b"vcpu_id", 8, f"and is {throwaway_vm.VCPU_ID}"),
    Moved(b"kvm", 8, "it is not found by its file"),
    Moved(b"pid", 8, "its thread reads "),
]


@pytest.mark.parametrize("method", ["list", "files"])
@pytest.mark.parametrize("moved", MOVED, ids=lambda moved: f"{moved.first.decode()} by {moved.by}")
def test_a_moved_struct_is_refused_with_what_is_read_wrong(
    vmlinux: bytes, sysfs: Path, method: str, moved: Moved
) -> None:
    write_types(sysfs, vmlinux, move_in_module(vmlinux, b"kvm_vcpu", moved.first, moved.by))
    source = MAKERS[method](sysfs)
    with pytest.raises(SourceUnavailable) as refused:
        source.open()
    assert refused.value.reason.startswith("KVM's memory is laid out otherwise than the kernel's types say: ")
    assert moved.read in refused.value.reason
    assert "CONFIG_DEBUG_INFO_BTF_MODULES" in refused.value.remedy
    with pytest.raises(SourceUnavailable):
        source.read()


@pytest.mark.parametrize("first", [b"regs", b"regs_avail"])
def test_moved_registers_are_refused(vmlinux: bytes, sysfs: Path, first: bytes) -> None:
    write_types(sysfs, move_in_vmlinux(vmlinux, b"kvm_vcpu_arch", first, 8), make_other_struct(vmlinux))
    with pytest.raises(SourceUnavailable, match="laid out otherwise"):
        MAKERS["list"](sysfs).open()


def test_by_names_alone_a_moved_struct_is_refused_where_there_is_a_vm(vmlinux: bytes, sysfs: Path) -> None:
    write_types(sysfs, vmlinux, move_in_module(vmlinux, b"kvm_vcpu", b"stat", 24))
    with (
        open_guest_process(vcpus=1, port_writes=1),
        pytest.raises(SourceUnavailable, match=r"laid out otherwise .*: files called a vCPU's: \d+ lead to none"),
    ):
        MAKERS["names"](sysfs).open()


@pytest.mark.parametrize("method", MAKERS)
def test_the_modules_own_types_count(vmlinux: bytes, sysfs: Path, method: str) -> None:
    own = pack_btf(bytes(cut_struct(split_sections(vmlinux, "test"), b"kvm_vcpu")), b"")
    write_types(sysfs, move_in_vmlinux(vmlinux, b"kvm_vcpu", b"vcpu_id", 24), own)
    source = MAKERS[method](sysfs)
    source.open()
    try:
        assert source.method == method
        with open_guest_process(vcpus=1, port_writes=1) as guest:
            check_reads(source, guest)
    finally:
        source.close()


@pytest.mark.parametrize("method", MAKERS)
def test_types_of_the_module_that_make_no_sense_leave_vmlinuxs(
    vmlinux: bytes, sysfs: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_types(sysfs, vmlinux, b"not BTF")
    source = MAKERS[method](sysfs)
    source.open()
    try:
        with open_guest_process(vcpus=1, port_writes=1) as guest:
            check_reads(source, guest)
    finally:
        source.close()
    assert "the kvm module's own types cannot be used" in caplog.messages


def test_stats_fd_takes_over(vmlinux: bytes, sysfs: Path) -> None:
    write_types(sysfs, vmlinux, move_in_module(vmlinux, b"kvm_vcpu", b"stat", 24))
    errors = ReadErrors()
    owners = OwnerCache(errors.teller("owners"))
    sources: list[CounterSource] = [MAKERS["list"](sysfs), StatsFdSource(NAMES, errors.teller("stats_fd"))]
    discovery = Discovery(Path("/proc"), errors.teller("discovery"))
    reader = HostReader(sources, discovery, owners.find, errors)
    try:
        with open_guest_process(vcpus=1, port_writes=1, stats_fds=True) as guest:
            guest.run(1000)
            snapshot = reader.read()
            (reading,) = (reading for reading in snapshot.readings if reading.vm.key.pid == guest.pid)
            assert reading.source == "stats_fd"
            assert reading.counters.per_vcpu["exits"][0] >= 1000
        bpf, stats_fd = snapshot.sources
        assert (bpf.up, stats_fd.up) == (False, True)
        assert "fpu_reload reads (0,) and is (101,)" in bpf.reason
    finally:
        reader.close()
        owners.close()
