"""Blocks of bytes from BPF become counters, and nothing is made anew that has not changed."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.binary_stats import Statistic
from kvm.bpf.vcpu_decode import (
    FILE_RECORD,
    IDENTITY,
    REGISTERS,
    STATE_RECORD,
    VM_RECORD,
    HostBlocks,
    VmAssembler,
    decode_files,
    decode_state,
    find_owner,
    find_unowned,
    has_gaps,
    join_blocks,
    keep_vms,
)
from kvm.errors import MalformedData
from kvm.model import VmKey

NAMES = ("exits", "notify_window_exits")
TICK_NS = 10_000_000
MAX_STATISTICS = 16


def pack_vm(
    kvm: int,
    first: int,
    count: int,
    *,
    tgid: int = 100,
    start: int = 5 * TICK_NS,
    vm_fd: int = 9,
    notify: tuple[int, int, int] = (0, 0, 1),
    missing: int = 0,
) -> bytes:
    window, flags, has_notify = notify
    return VM_RECORD.pack(kvm, 1, start, tgid, vm_fd, first, count, window, flags, 0, has_notify, missing)


def pack_identities(*pairs: tuple[int, int]) -> bytes:
    return b"".join(IDENTITY.pack(*pair) for pair in pairs)


def pack_file(
    kvm: int,
    fd: int,
    *values: int,
    vcpu: tuple[int, int] | None = None,
    tgid: int = 100,
    start: int = 5 * TICK_NS,
    owner: bool = True,
    online: int = 0,
) -> bytes:
    vcpu_id, tid = vcpu or (0, 0)
    head = FILE_RECORD.pack(kvm, start, tgid, fd, vcpu is not None, owner, 7, 3, 1, vcpu_id, tid, online)
    return head + b"".join(v.to_bytes(8, "little") for v in (*values, *[0] * (MAX_STATISTICS - len(values))))


def test_two_vms() -> None:
    blocks = HostBlocks(
        pack_vm(0xA, 0, 2, notify=(4711, 1, 1)) + pack_vm(0xB, 2, 1, tgid=200, start=12_345_678_901, vm_fd=3),
        pack_identities((0, 501), (1, 502), (0, 0)),
        ((10, 11, 12), (0, 2, 3)),
    )
    counters = VmAssembler(NAMES).assemble(blocks)
    assert list(counters) == [VmKey(100, 5, 9), VmKey(200, 1234, 3)]
    one, other = counters.values()
    assert (one.vcpu_ids, one.tids) == ((0, 1), (501, 502))
    assert one.per_vcpu == {"exits": (10, 11), "notify_window_exits": (0, 2)}
    assert (one.notify_window_cycles, one.notify_flags) == (4711, 1)
    assert (other.tids, other.per_vcpu["exits"], other.problem) == ((None,), (12,), "")


def test_a_kernel_without_notify_exits_tells_nothing_of_them() -> None:
    counters = VmAssembler(("exits",)).assemble(HostBlocks(pack_vm(0xA, 0, 0, notify=(0, 0, 0)), b"", ((),)))
    (vm,) = counters.values()
    assert (vm.notify_window_cycles, vm.notify_flags) == (None, None)
    assert vm.per_vcpu == {"exits": ()}


def test_what_has_not_changed_is_the_same_object() -> None:
    assembler = VmAssembler(NAMES)
    identities = pack_identities((0, 501), (1, 502))
    looks = [
        assembler.assemble(HostBlocks(pack_vm(0xA, 0, 2), identities, ((n, n), (0, 0))))[VmKey(100, 5, 9)]
        for n in range(2)
    ]
    assert looks[0].vcpu_ids is looks[1].vcpu_ids
    assert looks[0].tids is looks[1].tids
    changed = pack_identities((0, 501), (1, 777))
    look = assembler.assemble(HostBlocks(pack_vm(0xA, 0, 2), changed, ((2, 2), (0, 0))))[VmKey(100, 5, 9)]
    assert look.tids == (501, 777)


def test_a_vm_that_stands_still_has_the_same_counters_whoever_comes_or_moves_beside_it() -> None:
    assembler, still, other, new = VmAssembler(NAMES), VmKey(100, 5, 9), VmKey(200, 5, 9), VmKey(300, 5, 9)
    identities = pack_identities((0, 501), (0, 601), (0, 701))
    two = pack_vm(0xA, 0, 1) + pack_vm(0xB, 1, 1, tgid=200)
    first = assembler.assemble(HostBlocks(two, identities[:16], ((10**9, 10), (10**6, 2))))
    second = assembler.assemble(HostBlocks(two, identities[:16], ((10**9, 11), (10**6, 2))))
    assert second[still] is first[still]
    assert second[other].per_vcpu == {"exits": (11,), "notify_window_exits": (2,)}
    assert second[other].per_vcpu["notify_window_exits"] is first[other].per_vcpu["notify_window_exits"]
    # Nothing moves, though all that is read is read anew.
    again = assembler.assemble(HostBlocks(bytes(bytearray(two)), identities[:16], ((10**9, 11), (10**6, 2))))
    assert again == second
    assert [again[key] is second[key] for key in (still, other)] == [True, True]
    # A third one is listed first, so that all numbers stand elsewhere.
    three = pack_vm(0xC, 0, 1, tgid=300) + pack_vm(0xA, 1, 1) + pack_vm(0xB, 2, 1, tgid=200)
    shifted = identities[16:] + identities[:16]
    third = assembler.assemble(HostBlocks(three, shifted, ((7, 10**9, 12), (8, 10**6, 2))))
    assert third[still] is first[still]
    assert {key: counters.per_vcpu["exits"] for key, counters in third.items()} == {
        new: (7,),
        still: (10**9,),
        other: (12,),
    }


@pytest.mark.parametrize("change", [{"notify": (4711, 1, 1)}, {"notify": (0, 0, 0)}, {"missing": 1}])
def test_a_vm_whose_record_changes_has_new_counters(change: dict[str, Any]) -> None:
    assembler, identities = VmAssembler(NAMES), pack_identities((0, 501))
    (before,) = assembler.assemble(HostBlocks(pack_vm(0xA, 0, 1), identities, ((1,), (0,)))).values()
    (after,) = assembler.assemble(HostBlocks(pack_vm(0xA, 0, 1, **change), identities, ((1,), (0,)))).values()
    assert before != after
    assert after.per_vcpu == before.per_vcpu


def test_a_new_vm_in_old_memory_is_another_vm() -> None:
    assembler = VmAssembler(NAMES)
    assembler.assemble(HostBlocks(pack_vm(0xA, 0, 1), pack_identities((0, 501)), ((1,), (0,))))
    look = assembler.assemble(HostBlocks(pack_vm(0xA, 0, 1, tgid=300), pack_identities((0, 501)), ((1,), (0,))))
    assert list(look) == [VmKey(300, 5, 9)]


@given(st.lists(st.integers(0, 2**31 - 1), unique=True, max_size=40), st.data())
def test_columns_stand_in_the_order_of_ascending_ids(ids: list[int], data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(ids), max_size=len(ids)))
    blocks = HostBlocks(
        pack_vm(0xA, 0, len(ids)), pack_identities(*((i, i % 7) for i in ids)), (tuple(values), tuple(values))
    )
    (vm,) = VmAssembler(NAMES).assemble(blocks).values()
    pairs = sorted(zip(ids, values, strict=True))
    assert vm.vcpu_ids == tuple(vcpu_id for vcpu_id, _ in pairs)
    assert vm.per_vcpu["exits"] == tuple(value for _, value in pairs)
    assert vm.tids == tuple(vcpu_id % 7 or None for vcpu_id, _ in pairs)


def test_vms_whose_process_holds_no_vm_file_keep_their_keys_in_any_order() -> None:
    assembler = VmAssembler(NAMES)
    one, other = pack_vm(0xA, 0, 0, vm_fd=-1), pack_vm(0xB, 0, 0, vm_fd=-1)
    assert [key.vm_fd for key in assembler.assemble(HostBlocks(one + other, b"", ((), ())))] == [-1, -2]
    assert [key.vm_fd for key in assembler.assemble(HostBlocks(other + one, b"", ((), ())))] == [-2, -1]
    assert [key.vm_fd for key in assembler.assemble(HostBlocks(other, b"", ((), ())))] == [-2]


def test_a_vm_without_an_owner_is_left_out_and_can_be_told() -> None:
    blocks = HostBlocks(pack_vm(0xA, 0, 0, tgid=0) + pack_vm(0xB, 0, 0), b"", ((), ()))
    assert [key.pid for key in VmAssembler(NAMES).assemble(blocks)] == [100]
    assert find_unowned(blocks.vms) == {0xA}
    assert [find_owner(blocks.vms, kvm) for kvm in (0xA, 0xB, 0xC)] == [0, 100, None]


def test_a_vm_that_was_not_read_in_whole_says_so() -> None:
    (vm,) = VmAssembler(NAMES).assemble(HostBlocks(pack_vm(0xA, 0, 0, missing=2), b"", ((), ()))).values()
    assert (vm.totals, vm.problem) == ({}, "2 of its vCPUs have no open file")


def test_files_of_one_vm_become_one_vm() -> None:
    block = b"".join(
        [
            pack_file(0xA, 12, 40, 1, vcpu=(1, 502), online=2),
            pack_file(0xA, 9, online=2),
            pack_file(0xA, 14, online=2),
            pack_file(0xA, 11, 30, 0, vcpu=(0, 501), online=2),
            pack_file(0xA, 13, 31, 0, vcpu=(0, 501), online=2),
        ]
    )
    blocks = decode_files(block, 2, MAX_STATISTICS, "here")
    assert not has_gaps(blocks.vms)
    ((key, vm),) = VmAssembler(NAMES).assemble(blocks).items()
    assert key == VmKey(100, 5, 9)
    assert (vm.vcpu_ids, vm.tids, vm.per_vcpu["exits"]) == ((0, 1), (501, 502), (31, 40))
    assert (vm.notify_window_cycles, vm.notify_flags) == (7, 3)


def test_the_owner_goes_before_others_and_the_first_started_before_later_ones() -> None:
    child = pack_file(0xA, 4, tgid=90, start=1, owner=False)
    owner = pack_file(0xA, 9)
    (key,) = VmAssembler(NAMES).assemble(decode_files(child + owner, 2, MAX_STATISTICS, "here"))
    assert key == VmKey(100, 5, 9)
    later = pack_file(0xA, 5, tgid=80, start=2 * TICK_NS, owner=False)
    (key,) = VmAssembler(NAMES).assemble(decode_files(later + child, 2, MAX_STATISTICS, "here"))
    assert key == VmKey(90, 0, 4)


def test_vcpus_that_nobody_has_open_are_missed() -> None:
    blocks = decode_files(pack_file(0xA, 9, online=3), 2, MAX_STATISTICS, "here")
    assert has_gaps(blocks.vms)
    (vm,) = VmAssembler(NAMES).assemble(blocks).values()
    assert vm.problem == "3 of its vCPUs have no open file"


STRIDE = FILE_RECORD.size + MAX_STATISTICS * 8


@given(st.binary(max_size=2000).filter(lambda block: len(block) % STRIDE))
def test_records_that_are_cut_off_are_refused(block: bytes) -> None:
    with pytest.raises(MalformedData, match="here"):
        decode_files(block, 2, MAX_STATISTICS, "here")


@given(st.lists(st.binary(min_size=STRIDE, max_size=STRIDE), max_size=20))
def test_any_whole_records_are_decoded_or_refused(records: list[bytes]) -> None:
    with contextlib.suppress(MalformedData):
        blocks = decode_files(b"".join(records), 2, MAX_STATISTICS, "here")
        VmAssembler(NAMES).assemble(join_blocks(blocks, keep_vms(blocks, set())))


@pytest.mark.parametrize(("tgid", "fd", "tid"), [(2**31, 9, 5), (100, 2**31, 5), (100, 9, -1), (2**32 - 1,) * 2 + (5,)])
@pytest.mark.parametrize("is_vcpu", [True, False])
def test_a_process_thread_or_fd_that_cannot_be_is_refused(tgid: int, fd: int, tid: int, is_vcpu: bool) -> None:
    head = FILE_RECORD.pack(0xA, 5 * TICK_NS, tgid, fd, is_vcpu, True, 0, 0, 0, 0, tid, 1)
    with pytest.raises(MalformedData, match="here: a record of process"):
        decode_files(head + bytes(MAX_STATISTICS * 8), 2, MAX_STATISTICS, "here")


@pytest.mark.parametrize("record", [pack_vm(0xA, 0, 1, tgid=2**31), pack_vm(0xA, 0, 3), pack_vm(0xA, 2**32 - 1, 1)])
def test_a_vm_that_cannot_be_is_refused(record: bytes) -> None:
    with pytest.raises(MalformedData, match="records of VMs"):
        VmAssembler(NAMES).assemble(HostBlocks(record, pack_identities((0, 1)), ((1,), (2,))))


def test_blocks_are_kept_and_joined() -> None:
    two = HostBlocks(
        pack_vm(0xA, 0, 1) + pack_vm(0xB, 1, 1, tgid=200), pack_identities((0, 1), (5, 2)), ((10, 20), (0, 1))
    )
    one = HostBlocks(pack_vm(0xC, 0, 1, tgid=300), pack_identities((7, 3)), ((30,), (2,)))
    joined = VmAssembler(NAMES).assemble(join_blocks(one, keep_vms(two, {0xB})))
    assert {key.pid: (vm.vcpu_ids, vm.per_vcpu["exits"]) for key, vm in joined.items()} == {
        300: ((7,), (30,)),
        200: ((5,), (20,)),
    }


def test_one_vcpu_in_full() -> None:
    registers = list(range(100, 117))
    fresh = 0x1FFFF & ~(1 << REGISTERS.index("rsp")) & ~(1 << REGISTERS.index("rip"))
    raw = b"".join(n.to_bytes(8, "little") for n in (1, 2, 3, 0, 9))
    statistics = {
        "exits": Statistic("exits", 0, 0, 1, 0, 0),
        "hist": Statistic("hist", 4, 0, 2, 8, 0),
        "guest_mode": Statistic("guest_mode", 1, 0, 1, 24, 0),
        "beyond": Statistic("beyond", 0, 0, 1, 32, 0),
    }
    state = decode_state(STATE_RECORD.pack(*registers, fresh, 3, 501, 1, 5) + raw, 32, statistics)
    assert (state.vcpu_id, state.tid) == (3, 501)
    assert state.stale == {"rsp", "rip"}
    assert (state.registers["rax"], state.registers["r15"], state.registers["rip"]) == (100, 115, 116)
    assert state.statistics == {"exits": (1,), "hist": (2, 3), "guest_mode": (0,)}
    assert state.guest_mode is False
    assert (state.state_protected, state.vm_type) == (True, 5)
    unknown = decode_state(STATE_RECORD.pack(*registers, fresh, 3, 501, 2**32 - 1, 2**32 - 1) + raw, 32, statistics)
    assert (unknown.state_protected, unknown.vm_type) == (None, None)
