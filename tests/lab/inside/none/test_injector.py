"""What the injector makes is what a notify exit leaves: the counter, the record, and who goes on."""

from __future__ import annotations

import pytest

from tests.lab.inside.kvm_readers import read_vcpu_statistics
from tests.lab.inside.perf_reader import open_perf_reader, read_format
from tests.live import GuestProcess, open_guest_process
from tests.waiting import wait_until

NOTIFY = "exit_reason == 75 && isa == 1"
EXIT_REASON_NOTIFY, ISA_VMX, ISA_SVM, KVM_EXIT_NOTIFY = 75, 1, 2, 37
SVM_EXIT_IOIO, SVM_EXIT_HLT = 0x7B, 0x78
HIDE_RIP, COUNT_IN_RCX, TO_USER, FROM_ENCLAVE = 1, 2, 4, 8
ENCLAVE_BIT = 1 << 27

pytestmark = pytest.mark.usefixtures("injector")


def count_notify_exits(guest: GuestProcess, index: int = 0) -> int:
    return read_vcpu_statistics(guest, guest.vcpus[index])["notify_window_exits"]


def wait_for_notify_exits(guest: GuestProcess, number: int, index: int = 0) -> None:
    target = count_notify_exits(guest, index) + number
    wait_until(lambda: count_notify_exits(guest, index) >= target, f"{number} notify exits", 60)


def test_the_record_is_laid_out_as_the_injector_assumes() -> None:
    fields = read_format("kvm/kvm_exit")
    base = fields["exit_reason"].offset
    layout = {name: (fields[name].offset - base, fields[name].size) for name in fields}
    expected = {"exit_reason": (0, 4), "guest_rip": (8, 8), "isa": (16, 4), "info1": (24, 8), "info2": (32, 8)}
    assert {name: layout[name] for name in expected} == expected


def test_one_notify_exit(guest: GuestProcess) -> None:
    before = [count_notify_exits(guest, index) for index in (0, 1)]
    with open_perf_reader("kvm/kvm_exit", guest.vcpus[0].tid, NOTIFY) as reader:
        guest.notify(0)
        done = guest.wait_for("done")
        (record,) = reader.read()
    expected = {"exit_reason": EXIT_REASON_NOTIFY, "isa": ISA_VMX, "guest_rip": done["code"], "vcpu_id": 0}
    expected |= {"info1": 0, "info2": 0, "intr_info": 0, "error_code": 0, "tid": guest.vcpus[0].tid}
    assert {name: record[name] for name in expected} == expected
    assert [count_notify_exits(guest, index) for index in (0, 1)] == [before[0] + 1, before[1]]
    assert done["halted"]


def test_a_stream_at_one_rip_has_nothing_in_between(guest: GuestProcess) -> None:
    before = read_vcpu_statistics(guest, guest.vcpus[0])
    with open_perf_reader("kvm/kvm_exit", guest.vcpus[0].tid) as reader:
        guest.notify(0, exits=1000)
        done = guest.wait_for("done")
        records = reader.read()
    notify = [record for record in records if record["exit_reason"] == EXIT_REASON_NOTIFY]
    assert len(notify) == 1000
    # Interrupts of the host may come between, as on a real host; all are at the same instruction.
    until_last = records[: records.index(notify[-1]) + 1]
    assert {record["guest_rip"] for record in until_last} == {done["code"]}
    after = read_vcpu_statistics(guest, guest.vcpus[0])
    assert after["notify_window_exits"] - before["notify_window_exits"] == 1000
    assert after["exits"] - before["exits"] == len(records)


def test_registers_stay_the_same_in_a_stream(guest: GuestProcess) -> None:
    guest.notify(0, exits=0, rcx=77, qualification=0x1000)
    wait_for_notify_exits(guest, 100)
    guest.stop()
    done = guest.wait_for("done")
    assert done["registers"]["rip"] == done["code"]
    assert (done["registers"]["rcx"], done["registers"]["r8"]) == (77, 0x1000)
    assert done["port_writes"] == 0


def test_rep_counts_down_rcx_at_one_rip(guest: GuestProcess) -> None:
    with open_perf_reader("kvm/kvm_exit", guest.vcpus[0].tid, NOTIFY) as reader:
        guest.notify(0, flags=COUNT_IN_RCX, rcx=50)
        done = guest.wait_for("done")
        records = reader.read()
    assert [record["guest_rip"] for record in records] == [done["code"]] * 50
    assert done["registers"]["rcx"] == 0
    assert done["halted"]


def test_rips_change(guest: GuestProcess) -> None:
    before = count_notify_exits(guest)
    with open_perf_reader("kvm/kvm_exit", guest.vcpus[0].tid, NOTIFY) as reader:
        guest.notify(0, rips=4, rounds=250)
        done = guest.wait_for("done")
        records = reader.read()
    assert [record["guest_rip"] - done["code"] for record in records] == [0, 2, 4, 6] * 250
    assert count_notify_exits(guest) == before + 1000


def test_other_exits_come_in_between(guest: GuestProcess) -> None:
    with open_perf_reader("kvm/kvm_exit", guest.vcpus[0].tid, "exit_reason == 75 || exit_reason == 0x7b") as reader:
        guest.notify(0, rounds=3, other=2)
        done = guest.wait_for("done")
        records = reader.read()
    seen = [(record["exit_reason"], record["isa"], record["guest_rip"] - done["code"]) for record in records]
    one_round = [(EXIT_REASON_NOTIFY, ISA_VMX, 0), (SVM_EXIT_IOIO, ISA_SVM, 2), (SVM_EXIT_IOIO, ISA_SVM, 4)]
    assert seen == one_round * 3
    assert done["port_writes"] == 6


def test_qualification_and_vectoring_are_what_the_guest_chose(guest: GuestProcess) -> None:
    with open_perf_reader("kvm/kvm_exit", guest.vcpus[0].tid, NOTIFY) as reader:
        guest.notify(0, qualification=0x1000, vectoring=0x80000B11)
        guest.wait_for("done")
        (record,) = reader.read()
    assert (record["info1"], record["info2"]) == (0x1000, 0x80000B11)


def test_the_rip_can_be_hidden(guest: GuestProcess) -> None:
    with open_perf_reader("kvm/kvm_exit", guest.vcpus[0].tid, NOTIFY) as reader:
        guest.notify(0, exits=3, flags=HIDE_RIP)
        guest.wait_for("done")
        records = reader.read()
    assert [record["guest_rip"] for record in records] == [0, 0, 0]


def test_an_exit_can_come_from_an_enclave(guest: GuestProcess) -> None:
    before = count_notify_exits(guest)
    event_filter = f"exit_reason == {EXIT_REASON_NOTIFY | ENCLAVE_BIT}"
    with open_perf_reader("kvm/kvm_exit", guest.vcpus[0].tid, event_filter) as reader:
        guest.notify(0, exits=3, flags=FROM_ENCLAVE)
        guest.wait_for("done")
        assert [record["isa"] for record in reader.read()] == [ISA_VMX] * 3
    assert count_notify_exits(guest) == before + 3


@pytest.mark.parametrize(("keys", "info1"), [({"qualification": 1}, 1), ({"flags": TO_USER}, 0)], ids=str)
def test_the_vmm_gets_the_exit(guest: GuestProcess, keys: dict[str, int], info1: int) -> None:
    before = count_notify_exits(guest)
    tid = guest.vcpus[0].tid
    with (
        open_perf_reader("kvm/kvm_exit", tid, NOTIFY) as reader,
        open_perf_reader("kvm/kvm_userspace_exit", tid, f"reason == {KVM_EXIT_NOTIFY}") as to_user,
    ):
        guest.notify(0, **keys)
        done = guest.wait_for("done")
        (record,) = reader.read()
        assert len(to_user.read()) == 1
    assert record["info1"] == info1
    assert done["notify_user_exits"] == 1
    assert count_notify_exits(guest) == before + 1


def test_two_vcpus_are_stuck_independently(guest: GuestProcess) -> None:
    before = [count_notify_exits(guest, index) for index in (0, 1)]
    with (
        open_perf_reader("kvm/kvm_exit", guest.vcpus[0].tid, NOTIFY) as first,
        open_perf_reader("kvm/kvm_exit", guest.vcpus[1].tid, NOTIFY) as second,
    ):
        guest.notify(0, exits=300)
        guest.notify(1, exits=200)
        codes = {done["vcpu"]: done["code"] for done in (guest.wait_for("done"), guest.wait_for("done"))}
        assert [record["guest_rip"] for record in first.read()] == [codes[0]] * 300
        assert [record["guest_rip"] for record in second.read()] == [codes[1]] * 200
    assert [count_notify_exits(guest, index) for index in (0, 1)] == [before[0] + 300, before[1] + 200]


def test_a_flood_goes_on_until_it_is_stopped(guest: GuestProcess) -> None:
    guest.send("notify exits=0")
    for index in (0, 1):
        wait_for_notify_exits(guest, 5000, index)
    guest.stop()
    stopped = [count_notify_exits(guest, index) for index in (0, 1)]
    guest.run(10)
    assert [count_notify_exits(guest, index) for index in (0, 1)] == stopped


def test_a_stream_that_was_cut_off_is_forgotten_with_its_vcpu() -> None:
    for _ in range(2):
        with open_guest_process(stats_fds=True) as cut_off:
            cut_off.notify(0, exits=10**9)
            wait_for_notify_exits(cut_off, 50)
    with open_guest_process(stats_fds=True) as guest:
        guest.notify(0, exits=60)
        guest.wait_for("done")
        assert count_notify_exits(guest) == 60
