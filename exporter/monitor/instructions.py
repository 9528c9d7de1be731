"""Has the instruction read at which a vCPU seems to be stuck, where somebody wants to see it and KVM tells.

It is read while the vCPU is suspected, so that the warning has it. To arm a thread costs the host something, and a
guest decides how often it is suspected: one vCPU is read at a time, one each second, and the VM that was served longest
ago comes first, so that none can hide another's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from exporter.monitor.backends import ReadInstruction, Run
from exporter.monitor.tracked_vcpu import TrackedVcpu
from exporter.stalls.verdicts import State
from kvm.errors import SourceUnavailable, VmGone
from kvm.model import VmKey

log = logging.getLogger(__name__)

PERIOD_SECONDS: Final = 1.0
# For a notify exit to come; a vCPU of which none came, or not the right one, is tried again after a while.
WAIT_SECONDS: Final = 0.3
AGAIN_SECONDS: Final = 10.0
NO_PATCHES: Final = SourceUnavailable(
    "KVM itself does not tell where notify exits are", "use a KVM with the patches of kvm/patches"
)


class Instructions:
    """``read`` reads one in a worker thread, None where nobody wants any; ``on_read`` is called when there is one."""

    def __init__(self, read: ReadInstruction | None, run: Run, on_read: Callable[[], None]) -> None:
        self._read, self._run, self._on_read = read, run, on_read
        self._task: asyncio.Task[None] | None = None
        self._next_at = float("-inf")
        self._served: dict[VmKey, float] = {}
        self._problem = ""

    def start(self, vcpus: Iterable[TrackedVcpu], now: float) -> None:
        """Begin to read the instruction of one vCPU, if one wants it and none is being read."""
        if self._read is None or self._task is not None or now < self._next_at:
            return
        wanting = [vcpu for vcpu in vcpus if wants_instruction(vcpu, now)]
        if not wanting:
            return
        vcpu = min(wanting, key=lambda one: self._served.get(one.key.vm, float("-inf")))
        self._served[vcpu.key.vm], self._next_at = now, now + PERIOD_SECONDS
        vcpu.instruction_tried = (vcpu.detector.rip, now + AGAIN_SECONDS)
        self._task = asyncio.get_running_loop().create_task(self._read_one(self._read, vcpu))

    def tell_that_there_are_none(self) -> None:
        """Say, once, that this KVM does not tell what somebody wants to see."""
        if self._read is not None:
            self._tell(NO_PATCHES)

    def _tell(self, err: SourceUnavailable) -> None:
        if str(err) != self._problem:
            self._problem = str(err)
            fields = {"reason": err.reason, "remedy": err.remedy}
            log.warning("instructions cannot be shown", extra={"fields": fields})

    def forget(self, vm: VmKey) -> None:
        """Forget a VM that has ended."""
        self._served.pop(vm, None)

    async def close(self) -> None:
        """Wait for what is under way."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _read_one(self, read: ReadInstruction, vcpu: TrackedVcpu) -> None:
        try:
            assert vcpu.vcpu.tid is not None
            vcpu.instruction = await self._run(partial(read, vcpu.key.vm.pid, vcpu.vcpu.tid, WAIT_SECONDS))
            self._problem = ""
        except VmGone as err:
            log.debug("a vCPU's thread has ended", extra={"fields": {"vm": vcpu.vm.id, "err": str(err)}})
        except SourceUnavailable as err:
            self._tell(err)
        except OSError as err:
            self._tell(SourceUnavailable(str(err)))
        finally:
            self._task = None
            self._on_read()


def wants_instruction(vcpu: TrackedVcpu, now: float) -> bool:
    """Tell whether a vCPU seems to be stuck, by KVM's own word, at an instruction that is not known."""
    return (
        vcpu.told_by_kernel
        and not vcpu.in_session
        and vcpu.detector.state in (State.SUSPECT, State.STALLED)
        and vcpu.vcpu.tid is not None
        and vcpu.find_instruction(vcpu.detector.verdict) is None
        and (vcpu.detector.rip != vcpu.instruction_tried[0] or now >= vcpu.instruction_tried[1])
    )
