"""A VM whose process has ended while its child holds the VM's files, on a host with very many open files."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tests.agents import AgentProcess, open_agent
from tests.live import strange_vmm, tiny_guest
from tests.waiting import wait_until

HOARDERS = 12  # of 100,000 files each, where the hard limit allows that many
SCRAPES = 40
# A search may take a hundredth of the time: where scrapes come without a pause, few of them could have one.
PAUSE_SECONDS = 0.1


@contextmanager
def open_strange(way: str) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, int]]]:
    with subprocess.Popen(
        [tiny_guest.PYTHON, strange_vmm.__file__, way],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def measure_scrapes(agent: AgentProcess) -> list[float]:
    seconds = []
    for _ in range(SCRAPES):
        began = time.perf_counter()
        agent.get()
        seconds.append(time.perf_counter() - began)
        time.sleep(PAUSE_SECONDS)
    return seconds


def test_who_holds_a_vm_without_process_is_searched_for_seldom(tell: Callable[[str], None]) -> None:
    with ExitStack() as stack:
        files = sum(stack.enter_context(open_strange("many_files"))[1]["files"] for _ in range(HOARDERS))
        agent = stack.enter_context(open_agent())
        before = measure_scrapes(agent)
        process, told = stack.enter_context(open_strange("with_child"))
        stack.callback(os.kill, told["child"], signal.SIGKILL)
        process.communicate()
        child = str(told["child"])
        wait_until(
            lambda: any(("pid", child) in labels for labels in agent.samples("kvm_vm_info")), "it is the child's"
        )
        after = measure_scrapes(agent)
        usual, now = statistics.median(before), statistics.median(after)
        tell(
            f"a VM without its process among {files:,} open files: scrape {1000 * usual:.0f} -> {1000 * now:.0f} ms, "
            f"{1000 * max(after):.0f} ms at most"
        )
        assert now < 2 * usual + 0.05
