"""What a person on call reads, how often, and what cannot be hidden from them."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from exporter.logs.formatters import build_fields, render_logfmt
from exporter.stalls.stall_log import HOST_LINES, MEANING, MEANING_DELIVERY, MEANING_INVALID, StallLog
from exporter.stalls.verdicts import Evidence, State, VcpuReport, name_vector
from tests.reports import RIP, make_report, make_vm

UNIX = 1_800_000_000.0


class Told:
    """A stall log with a clock, and what it has written."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        self._caplog = caplog
        self.now = 100.0
        self.log = StallLog()

    def tell(self, *reports: VcpuReport) -> list[dict[str, object]]:
        for report in reports:
            self.log.tell(report, self.now, UNIX + self.now)
        return self.take()

    def pass_time(self, seconds: float) -> list[dict[str, object]]:
        self.now += seconds
        self.log.flush(self.now, UNIX + self.now)
        return self.take()

    def take(self) -> list[dict[str, object]]:
        lines = [build_fields(record) for record in self._caplog.records]
        self._caplog.clear()
        return lines


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    return Told(caplog)


def test_a_lost_context_is_never_withheld_behind_stalls(told: Told) -> None:
    told.tell(*(make_report(vm=make_vm(f"vm{number}", 100 + number)) for number in range(3 * HOST_LINES)))
    victim = make_vm("victim", 9999)
    (line,) = told.tell(make_report(State.CONTEXT_LOST, vm=victim))
    assert (line["msg"], line["name"], line["context"]) == (
        "the CPU has lost the state of a vCPU",
        "victim",
        "invalid",
    )
    assert "not of the guest" in str(line["meaning"])


def test_the_end_of_a_lost_context_is_told_and_a_stall_after_it_too(told: Told) -> None:
    told.tell(make_report(State.CONTEXT_LOST))
    told.now += 1.0
    (line,) = told.tell(make_report(State.NOTIFYING, reason="it runs again, after its state had been lost"))
    assert (line["msg"], line["reason"]) == ("vCPU runs again", "it runs again, after its state had been lost")
    (stall,) = told.tell(make_report())
    assert stall["msg"] == "vCPU makes no forward progress"


def test_of_a_stall_that_was_told_the_end_is_told_though_a_lost_context_was_withheld(told: Told) -> None:
    told.tell(make_report(State.CONTEXT_LOST, vcpu=0))
    told.now += 1.0
    stalled = make_report(vcpu=1)
    assert len(told.tell(stalled)) == 1
    told.tell(make_report(State.CONTEXT_LOST, vcpu=1))  # one line a minute and VM
    told.log.tell_unplugged(stalled.vm.key, stalled.vcpu.vcpu_id, told.now)
    assert [line["msg"] for line in told.take()] == ["vCPU is gone"]


def test_a_vcpu_whose_context_was_lost_is_missed(told: Told) -> None:
    report = make_report(State.CONTEXT_LOST)
    told.tell(report)
    told.log.tell_unplugged(report.vm.key, report.vcpu.vcpu_id, told.now)
    (line,) = told.take()
    assert line["msg"] == "vCPU is gone"


def test_lost_contexts_have_a_limit_of_their_own_and_one_vm_cannot_use_it_up(told: Told) -> None:
    flood, victim = make_vm("flood", 100), make_vm("victim", 200)
    lines = told.tell(*(make_report(State.CONTEXT_LOST, vm=flood, vcpu=vcpu) for vcpu in range(100)))
    assert [line["vcpu"] for line in lines] == [0]
    assert [line["name"] for line in told.tell(make_report(State.CONTEXT_LOST, vm=victim))] == ["victim"]
    assert (told.log.warnings, told.log.suppressed) == (2, 99)
    (summary,) = told.pass_time(1.0)
    assert (summary["withheld"], summary["vms"]) == (99, 1)


def test_a_line_says_who_where_what_since_when_and_what_to_do(told: Told) -> None:
    (line,) = told.tell(make_report())
    del line["time"]
    assert line.pop("meaning") == MEANING
    assert "pause or reset the VM" in str(line.pop("action"))
    assert line == {
        "level": "WARN",
        "msg": "vCPU makes no forward progress",
        "vm": "uuid-4242",
        "name": "web",
        "owner": "shop",
        "vmm": "qemu",
        "pid": 4242,
        "vcpu": 0,
        "tid": 5000,
        "source": "bpf",
        "rip": "0xffffffff81012345",
        "exits_at_rip": 40,
        "since": "2027-01-15T08:01:39Z",
        "seconds": 1.0,
        "context": "valid",
        "nested": "no",
        "registers": "unchanged",
        "evidence": "trace",
    }


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        (Evidence.TRACE, "It runs a nested guest, to which the RIP may belong."),
        (Evidence.KERNEL, "The RIP is that of its nested guest."),
    ],
)
def test_a_nested_guests_rip_is_certain_where_kvm_tells_it(told: Told, evidence: Evidence, words: str) -> None:
    (line,) = told.tell(make_report(nested=True, evidence=evidence))
    assert (line["evidence"], line["nested"]) == (evidence, "yes")
    assert str(line["meaning"]).endswith(words)


@pytest.mark.parametrize(
    ("fields", "part", "meaning"),
    [
        ({"context_invalid": True}, {"context": "invalid"}, MEANING_INVALID),
        ({"idt_vectoring": 0x80000B11}, {"delivering": "vector 17 (#AC)"}, MEANING_DELIVERY),
        ({"nested": True}, {"nested": "yes"}, "may belong"),
        ({"nested": None}, {"nested": "unknown"}, MEANING),
        ({"registers_alike": None}, {"registers": "not-read"}, "a long REP instruction would show the same"),
        ({"rip": None}, {"rip": "unknown"}, MEANING),
    ],
)
def test_what_is_special_is_said(told: Told, fields: dict[str, Any], part: dict[str, object], meaning: str) -> None:
    (line,) = told.tell(make_report(**fields))
    assert part.items() <= line.items()
    assert meaning in str(line["meaning"])


def test_vectors_are_named() -> None:
    assert [name_vector(info) for info in (0, 0x11, 0x80000301, 0x800000F0)] == [
        "",
        "",
        "vector 1 (#DB)",
        "vector 240",
    ]


def test_a_recovery_is_told_of_if_the_stall_was(told: Told) -> None:
    assert told.tell(make_report(State.RECOVERED)) == []
    told.tell(make_report())
    told.now += 41
    (line,) = told.tell(make_report(State.RECOVERED, reason="it left the guest at another RIP"))
    assert (line["level"], line["msg"]) == ("INFO", "vCPU makes progress again")
    assert (line["rip"], line["stalled_seconds"], line["reason"]) == (
        f"{RIP:#x}",
        42.0,
        "it left the guest at another RIP",
    )
    assert told.tell(make_report(State.RECOVERED)) == []


def test_a_stall_that_was_unknown_for_a_while_is_told_of_once(told: Told) -> None:
    assert len(told.tell(make_report(), make_report(State.UNKNOWN), make_report())) == 1


def test_the_end_of_a_vm_is_told_of_if_a_stall_was(told: Told) -> None:
    told.tell(make_report(), make_report(vm=make_vm(pid=1)))
    told.log.tell_end(make_vm(pid=1).key, told.now)
    told.log.tell_end(make_vm(pid=2).key, told.now)
    (line,) = told.take()
    assert (line["msg"], line["pid"]) == ("vCPU is gone: its VM has ended", 1)


def test_a_vm_has_one_line_a_minute_and_the_others_are_counted(told: Told) -> None:
    lines = told.tell(*(make_report(vcpu=number) for number in range(16)))
    assert [line["vcpu"] for line in lines] == [0]
    (summary,) = told.pass_time(0.1)
    assert (summary["withheld"], summary["vms"], summary["unsaid"]) == (15, 1, 15)
    assert [told.pass_time(1.0) for _ in range(300)] == [[]] * 300
    assert (told.log.warnings, told.log.suppressed) == (1, 15)


def test_a_guest_that_stalls_and_recovers_all_the_time_cannot_fill_the_log(told: Told) -> None:
    lines = []
    for _ in range(600):
        lines += told.tell(make_report(), make_report(State.RECOVERED))
        lines += told.pass_time(1.0)
    assert len(lines) <= 3 * 10 + 1
    assert told.log.warnings == 10
    assert told.log.suppressed == 590


def test_the_host_has_five_lines_a_minute_and_a_stall_that_lasts_is_told_of_later(told: Told) -> None:
    vms = [make_vm(name=f"vm{number}", pid=number) for number in range(20)]
    lines = told.tell(*(make_report(vm=vm) for vm in vms))
    assert [line["pid"] for line in lines] == list(range(HOST_LINES))
    told.tell(make_report(State.RECOVERED, vm=vms[7]))
    later = [line for _ in range(240) for line in told.pass_time(1.0) if "pid" in line]
    assert [line["pid"] for line in later] == [5, 6, *range(8, 20)]
    assert later[0]["seconds"] == 61.0


def test_nobody_overtakes_those_that_wait(told: Told) -> None:
    vms = [make_vm(name=f"vm{number}", pid=number) for number in range(8)]
    told.tell(*(make_report(vm=vm) for vm in vms[:7]))
    told.now += 61
    lines = told.tell(make_report(vm=vms[7]))
    assert [line["pid"] for line in lines] == [5, 6, 7]
    assert told.log.suppressed == 2


def test_a_vm_that_was_never_told_of_comes_before_those_that_were(told: Told) -> None:
    hostile = [make_vm(name=f"vm{number}", pid=number) for number in range(20)]
    for _ in range(4):
        told.tell(*(make_report(vm=vm) for vm in hostile))
        told.pass_time(60.0)
        told.tell(*(make_report(State.RECOVERED, vm=vm) for vm in hostile))
    told.tell(*(make_report(vm=vm) for vm in hostile))
    assert told.tell(make_report(vm=make_vm(name="honest", pid=999))) == []
    assert next(line["pid"] for line in told.pass_time(61.0) if "pid" in line) == 999


def test_a_second_stall_of_a_vm_has_a_line_of_its_own_after_a_minute(told: Told) -> None:
    told.tell(make_report(), make_report(vcpu=1))
    told.now += 61
    (line,) = told.tell(make_report(vcpu=2))
    assert line["vcpu"] == 2


def test_a_vcpu_that_is_unplugged_is_told_of_if_its_stall_was_and_the_next_one_is_not_withheld(told: Told) -> None:
    told.tell(*(make_report(vcpu=number) for number in range(3)))
    for vcpu_id in (0, 4, 6):
        told.log.tell_unplugged(make_vm().key, vcpu_id, told.now)
    (line,) = told.take()
    assert (line["msg"], line["vcpu"]) == ("vCPU is gone", 0)
    (later,) = [line for _ in range(61) for line in told.pass_time(1.0) if "vcpu" in line]
    assert later["vcpu"] == 1
    told.log.tell_unplugged(make_vm().key, 2, told.now)
    told.pass_time(61.0)
    assert not told.log.busy


def test_a_vm_that_was_forgotten_and_comes_back_is_a_new_one(told: Told) -> None:
    told.tell(make_report())
    told.log.tell_end(make_vm().key, told.now)
    told.take()
    assert len(told.tell(make_report())) == 1


def test_a_drill_is_marked_and_outside_the_budget(told: Told) -> None:
    (line,) = told.tell(make_report(drill=True))
    assert line["msg"] == "DRILL, not real: vCPU makes no forward progress"
    assert line["drill"] == "yes"
    assert len(told.tell(make_report())) == 1
    (end,) = told.tell(make_report(State.RECOVERED, drill=True))
    assert str(end["msg"]).startswith("DRILL")


def test_a_simulated_stall_is_marked(told: Told) -> None:
    (line,) = told.tell(make_report(source="simulated"))
    assert line["msg"] == "SIMULATED, not real: vCPU makes no forward progress"


def test_no_name_can_forge_a_field_or_a_line(told: Told) -> None:
    (line,) = told.tell(make_report(vm=make_vm(name='a" rip=0x1\nlevel=ERROR')))
    text = render_logfmt(line)
    assert "\n" not in text
    assert r'name="a\" rip=0x1\nlevel=ERROR"' in text
