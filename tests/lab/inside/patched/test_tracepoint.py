"""kvm:kvm_notify_window: one record for each notify exit, with the instruction that the guest has there."""

from __future__ import annotations

import pytest

from tests.lab.inside.kvm_readers import read_vcpu_statistics
from tests.lab.inside.perf_reader import open_perf_reader
from tests.live import GuestProcess
from tests.live.tiny_guest import CODE_BYTES, build_notify_program

EVENT = "kvm/kvm_notify_window"
INSN_BYTES = 15
HIDE_RIP = 1
KNOWN = ("vcpu_id", "rip", "streak", "exit_qual", "vectoring_info", "guest_mode", "insn_len")

pytestmark = pytest.mark.usefixtures("injector")


def read_insn(record: dict[str, int]) -> bytes:
    return record["insn"].to_bytes(INSN_BYTES, "little")[: record["insn_len"]]


def test_a_record_tells_what_the_guest_does(fresh: GuestProcess) -> None:
    keys = {"exits": 3, "qualification": 0x1000, "vectoring": 0x80000B11}
    with open_perf_reader(EVENT, fresh.vcpus[1].tid) as reader:
        fresh.notify(1, **keys)
        code = fresh.wait_for("done")["code"]
        records = reader.read()
    assert [{name: record[name] for name in KNOWN} for record in records] == [
        {
            "vcpu_id": fresh.vcpus[1].vcpu_id,
            "rip": code,
            "streak": streak,
            "exit_qual": 0x1000,
            "vectoring_info": 0x80000B11,
            "guest_mode": 0,
            "insn_len": INSN_BYTES,
        }
        for streak in (1, 2, 3)
    ]
    written = build_notify_program(keys).code
    assert [read_insn(record)[: len(written)] for record in records] == [written[:INSN_BYTES]] * 3


def test_the_instruction_is_not_read_beyond_its_page(fresh: GuestProcess) -> None:
    # As many instructions as fit: dec, jnz and hlt, 10 bytes, stand behind the last.
    with open_perf_reader(EVENT, fresh.vcpus[0].tid) as reader:
        fresh.notify(0, rips=(CODE_BYTES - 10) // 2)
        code = fresh.wait_for("done")["code"]
        last = reader.read()[-1]
    assert last["rip"] == code + CODE_BYTES - 12
    assert last["insn_len"] == 12
    assert read_insn(last)[:2] == b"\xe6\x75"


@pytest.mark.parametrize("keys", [{"exits": 3, "flags": HIDE_RIP}, {"rounds": 3, "qualification": 1}], ids=str)
def test_without_a_rip_there_is_no_instruction(fresh: GuestProcess, keys: dict[str, int]) -> None:
    with open_perf_reader(EVENT, fresh.vcpus[0].tid) as reader:
        fresh.notify(0, **keys)
        fresh.wait_for("done")
        records = reader.read()
    assert [(r["rip"], r["streak"], r["insn_len"], r["insn"]) for r in records] == [(0, 0, 0, 0)] * 3
    assert {record["exit_qual"] for record in records} == {keys.get("qualification", 0)}


def test_nothing_but_notify_exits_is_recorded(fresh: GuestProcess) -> None:
    before = read_vcpu_statistics(fresh, fresh.vcpus[0])
    with open_perf_reader(EVENT, fresh.vcpus[0].tid) as reader:
        fresh.run(100)
        fresh.notify(0, rounds=50, other=3)
        fresh.wait_for("done")
        records = reader.read()
    after = read_vcpu_statistics(fresh, fresh.vcpus[0])
    assert len(records) == after["notify_window_exits"] - before["notify_window_exits"] == 50
