"""Which threads' lost contexts are news: each once, with its vCPU where that is known in time."""

from __future__ import annotations

from exporter.monitor.context_losses import PLACE_SECONDS, ContextLosses, Thread
from exporter.monitor.thread_index import Found
from tests.fake_host import FakeVm

VM = FakeVm("web", 100, 2)
READING = VM.read()
THREADS: list[Thread] = [(100, 77, vcpu.tid, 2 * number) for number, vcpu in enumerate(VM.vcpus)]


def find(thread: Thread) -> Found | None:
    number = thread[3] // 2
    return Found(READING, READING.vcpus[number]) if thread in THREADS else None


def test_each_exit_is_news_once() -> None:
    losses = ContextLosses()
    placed, unplaced = losses.take({THREADS[0]: 1}, find, 0.0)
    assert ([found.vcpu.index for found in placed], unplaced) == ([0], [])
    assert losses.take({THREADS[0]: 1}, find, 1.0) == ([], [])
    placed, _ = losses.take({THREADS[0]: 1, THREADS[1]: 1}, find, 2.0)
    assert [found.vcpu.index for found in placed] == [1]
    # Somebody has reset the VM, which keeps its threads.
    placed, _ = losses.take({THREADS[0]: 2, THREADS[1]: 1}, find, 3.0)
    assert [found.vcpu.index for found in placed] == [0]


def test_a_thread_that_has_ended_is_news_again_if_it_comes_back() -> None:
    losses = ContextLosses()
    losses.take({THREADS[0]: 1}, find, 0.0)
    losses.take({}, find, 1.0)
    assert len(losses.take({THREADS[0]: 1}, find, 2.0)[0]) == 1


def test_a_thread_waits_for_its_vcpu_and_is_reported_without_it_after_a_while() -> None:
    losses, stranger = ContextLosses(), (4242, 1, 4243, 0)
    assert losses.take({stranger: 1}, lambda thread: None, 0.0) == ([], [])
    assert losses.waiting
    placed, unplaced = losses.take({stranger: 1}, lambda thread: Found(READING, READING.vcpus[0]), 1.0)
    assert (len(placed), unplaced, losses.waiting) == (1, [], False)
    other = (4242, 1, 4244, 1)
    losses.take({stranger: 1, other: 1}, lambda thread: None, 2.0)
    assert losses.take({stranger: 1, other: 1}, lambda thread: None, 2.0 + PLACE_SECONDS) == ([], [other])
    assert losses.take({stranger: 1, other: 1}, lambda thread: None, 60.0) == ([], [])


def test_a_thread_that_ended_while_it_waited_is_forgotten() -> None:
    losses = ContextLosses()
    losses.take({(4242, 1, 4243, 0): 1}, lambda thread: None, 0.0)
    assert losses.take({}, lambda thread: None, 1.0) == ([], [])
    assert not losses.waiting
