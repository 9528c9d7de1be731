"""When an instruction is read, of whom, and who sees it."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from exporter.monitor.instructions import AGAIN_SECONDS, PERIOD_SECONDS, WAIT_SECONDS
from exporter.stalls.verdicts import State
from kvm.errors import SourceUnavailable, VmGone
from kvm.model import Instruction
from tests.exporter.monitor.scene import Scene, play, read_lines
from tests.fake_host import FakeHost, FakeVm, R

CODE = bytes.fromhex("e675ebfc")


class Reader:
    """Reads instructions of a fake host: what it was asked, and what it answers."""

    def __init__(self, answer: Instruction | Exception | None) -> None:
        self.answer = answer
        self.asked: list[tuple[float, int, int]] = []

    def __call__(self, pid: int, tid: int, wait_seconds: float) -> Instruction | None:
        assert wait_seconds == WAIT_SECONDS
        self.asked.append((asyncio.get_running_loop().time(), pid, tid))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def patch(host: FakeHost) -> None:
    host.is_patched = True


def find_warnings(caplog: pytest.LogCaptureFixture) -> list[dict[str, str]]:
    return [r.fields for r in caplog.records if r.getMessage() == "instructions cannot be shown"]  # type: ignore[attr-defined]


def test_the_warning_has_the_instruction(caplog: pytest.LogCaptureFixture) -> None:
    vm, reader = FakeVm("a", 100, 1), Reader(Instruction(R, False, 9, CODE))

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        found = scene.find(vm)
        assert found
        assert found.instruction == reader.answer
        await asyncio.sleep(30)

    assert play(act, vm, trigger=True, prepare=patch, read_instruction=reader).armed_times == []
    (line,) = (line for line in read_lines(caplog) if line["msg"] == "vCPU makes no forward progress")
    assert line["instruction"] == "e6 75 eb fc"
    assert [(pid, tid) for _, pid, tid in reader.asked] == [(100, vm.vcpus[0].tid)]


@pytest.mark.parametrize(
    "answer",
    [None, Instruction(R + 4, False, 9, CODE), Instruction(R, True, 9, CODE), VmGone("thread 110 has ended")],
    ids=["no exit came", "another RIP", "its own guest's", "gone"],
)
def test_what_is_not_at_the_rip_is_not_shown_and_tried_again_now_and_then(
    answer: Instruction | Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    vm, reader = FakeVm("a", 100, 1), Reader(answer)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        await asyncio.sleep(5 * AGAIN_SECONDS)
        found = scene.find(vm)
        assert found
        assert found.instruction is None

    play(act, vm, trigger=True, prepare=patch, read_instruction=reader)
    (line,) = (line for line in read_lines(caplog) if line["msg"] == "vCPU makes no forward progress")
    assert "instruction" not in line
    assert 4 <= len(reader.asked) <= 6
    assert find_warnings(caplog) == []


def test_a_refusal_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    vm, reader = FakeVm("a", 100, 1), Reader(SourceUnavailable("lockdown forbids it", "use integrity"))

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        await asyncio.sleep(5 * AGAIN_SECONDS)

    play(act, vm, trigger=True, prepare=patch, read_instruction=reader)
    assert find_warnings(caplog) == [{"reason": "lockdown forbids it", "remedy": "use integrity"}]


def test_on_a_kvm_without_the_patches_none_is_read_and_that_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    vm, reader = FakeVm("a", 100, 1), Reader(Instruction(R, False, 9, CODE))

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED, 20.0)
        await asyncio.sleep(700)  # over retries

    play(act, vm, trigger=True, read_instruction=reader)
    assert reader.asked == []
    assert len(find_warnings(caplog)) == 1


def test_many_that_are_stuck_cost_one_reading_a_second_and_hide_no_other_vm() -> None:
    flood, victim, reader = FakeVm("a", 100, 64), FakeVm("b", 900, 1), Reader(Instruction(R, False, 9, CODE))

    async def act(scene: Scene) -> None:
        for vcpu in flood.vcpus:
            scene.host.set(vcpu, "stuck", interval=0.05)
        await asyncio.sleep(5)
        scene.host.set(victim.vcpus[0], "stuck")
        began = scene.host.clock()
        await scene.wait_for(victim, State.SUSPECT)
        await asyncio.sleep(PERIOD_SECONDS + 0.3)
        assert 900 in [pid for at, pid, _ in reader.asked if at > began]

    play(act, flood, victim, trigger=True, prepare=patch, read_instruction=reader)
    times = [at for at, _, _ in reader.asked]
    assert all(later - earlier >= PERIOD_SECONDS - 1e-6 for earlier, later in itertools.pairwise(times))
