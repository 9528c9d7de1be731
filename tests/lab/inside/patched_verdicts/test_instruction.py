"""With --instruction, what the guest has at the RIP at which it is stuck stands in the warning, as KVM has read it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.lab.inside.patched_verdicts.test_kernel_evidence import wait_until_known
from tests.lab.inside.verdicts.test_verdicts import STALL, count_events, make_uuid, open_guest, open_listener
from tests.live.tiny_guest import CODE_BYTES, build_notify_program
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("injector")

INSN_BYTES = 15


def test_the_warning_has_the_bytes_that_the_guest_has_there(perf_opens: Callable[[], int]) -> None:
    with open_listener("--no-trigger.bpf", "--instruction") as listener:
        vms = {}
        with open_guest(80, "stuck") as stuck, open_guest(81, "nested") as nested:
            vms = {guest: f"{make_uuid(80 + n)}-{guest.pid}" for n, guest in enumerate((stuck, nested))}
            wait_until_known(listener, *vms.values())
            for guest, keys in ((stuck, {"exits": 0}), (nested, {"exits": 0, "nested": 1})):
                guest.notify(0, **keys)
                line = listener.wait_for_line(STALL, vms[guest])
                written = build_notify_program(keys).code
                assert len(written) < INSN_BYTES < CODE_BYTES
                shown = bytes.fromhex(line["instruction"])
                assert (len(shown), shown[: len(written)]) == (INSN_BYTES, written)
                assert line["nested"] == ("yes" if "nested" in keys else "no")
                assert listener.find_vcpu(vms[guest])["instruction"] == line["instruction"]
            assert len(vms) <= perf_opens() <= 2 * len(vms)  # one each, and again where no exit came in time
            wait_until(lambda: count_events(listener.agent.pid) == 0, "all events are closed", 5)
        assert listener.agent.samples("kvm_exporter_trace_armings_total") == {(): 0.0}
