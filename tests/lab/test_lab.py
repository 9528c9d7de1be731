"""The lab as a part of the test suite: real kernels with the tests inside, and what the lab says of kernels that fail.

LAB_KERNELS says which series are booted ("6.1 6.12 7", or "all"); one without it. LAB_PATCHED_KERNELS says the same of
kernels with the project's patches. LAB_WHOLE=1 repeats on every kernel what is the same on each. All boots are started
together and run two at a time; each test waits for its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest

from tests.lab.boot import Limits, Run, RunLost, run_in_kernel
from tests.lab.debian import Kernel, open_kernel
from tests.lab.patched import open_patched_kernel
from tests.lab.plan import PATCHED_BOOTS, Boots, Outcome, choose_boots, open_executor, read_series, start_boots

pytestmark = pytest.mark.lab

SERIES = read_series(os.environ)
CHOSEN = choose_boots(SERIES, is_whole=os.environ.get("LAB_WHOLE") == "1")
PATCHED = [(series, boot) for series in read_series(os.environ, "LAB_PATCHED_KERNELS") for boot in PATCHED_BOOTS]
ENVIRONMENT = {"GREETING": "hello"}
FILES = ("/tmp/file", "/tmp/no-such-file")
# What is booted to see what the lab says of it: the command, and how it is booted.
TRIALS: dict[str, Callable[[Kernel], Run]] = {
    "status": lambda kernel: run_in_kernel(
        kernel,
        ["sh", "-c", 'echo "$GREETING"; printf "a\\0b" >/tmp/file; exit 7'],
        environment=ENVIRONMENT,
        files=FILES,
    ),
    "panic": lambda kernel: run_in_kernel(kernel, ["sh", "-c", "echo c >/proc/sysrq-trigger"]),
    "hang": lambda kernel: run_in_kernel(
        kernel, [], append="rdinit=/bin/busybox -- sleep 1000", limits=Limits(boot_seconds=15)
    ),
    "silence": lambda kernel: run_in_kernel(
        kernel, ["sh", "-c", "echo before the silence; sleep 1000"], limits=Limits(silence_seconds=40)
    ),
    "poweroff": lambda kernel: run_in_kernel(kernel, ["poweroff", "-f"]),
}


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    """What runs boots and trials side by side."""
    with open_executor() as opened:
        yield opened


@pytest.fixture(scope="module")
def boots(executor: ThreadPoolExecutor) -> Boots:
    """All boots with tests inside, under way."""
    return start_boots(executor, CHOSEN)


@pytest.fixture(scope="module")
def patched_boots(executor: ThreadPoolExecutor) -> Boots:
    """The boots with a patched KVM, under way."""
    return start_boots(executor, PATCHED, open_patched_kernel)


@pytest.fixture(scope="module")
def trials(executor: ThreadPoolExecutor) -> dict[str, Future[Run]]:
    """All trials, under way."""
    kernel = open_kernel(SERIES[0])
    return {name: executor.submit(partial(trial, kernel)) for name, trial in TRIALS.items()}


def read_failure(trial: Future[Run]) -> str:
    """Returns the message of a run that was lost."""
    with pytest.raises(RunLost) as lost:
        trial.result()
    return str(lost.value)


def check_outcome(outcome: Outcome, tell: Callable[[str], None]) -> None:
    """Tells what came of a boot's tests; fails unless all ran and passed, and the kernel warned of nothing."""
    boot, run = outcome.boot.name, outcome.run
    tell(f"{run.release} {boot}: {outcome.tests} tests, {outcome.skipped} skipped, {run.seconds:.0f} s")
    for figure in outcome.figures:
        tell(f"{run.release} {boot}: {figure}")
    assert not outcome.kernel_warnings, f"{run.release} complained:\n{run.console}"
    twice = "" if outcome.again is None else f"\nthe second time:\n{outcome.again.run.output}"
    assert outcome.passed, (
        f"{run.release}, {outcome.failed} of {outcome.tests} tests failed inside:\n{run.output}{twice}"
    )


# First, so that the patched modules are built while the other kernels boot.
@pytest.mark.parametrize("boot", [(series, boot.name) for series, boot in PATCHED])
def test_inside_with_patches(
    boots: object, trials: object, patched_boots: Boots, boot: tuple[str, str], tell: Callable[[str], None]
) -> None:
    check_outcome(patched_boots.futures[boot].result(), tell)


@pytest.mark.parametrize(("series", "boot"), [(series, boot.name) for series, boot in CHOSEN])
def test_inside(boots: Boots, trials: object, series: str, boot: str, tell: Callable[[str], None]) -> None:
    check_outcome(boots.futures[series, boot].result(), tell)


def test_a_job_brings_back_its_output_files_and_status(trials: dict[str, Future[Run]]) -> None:
    run = trials["status"].result()
    assert (run.release, run.output, run.exit_status) == (open_kernel(SERIES[0]).release, "hello\n", 7)
    assert run.files == {"/tmp/file": b"a\0b"}


def test_a_panic_ends_the_run_at_once_and_is_shown(trials: dict[str, Future[Run]]) -> None:
    message = read_failure(trials["panic"])
    assert "Kernel panic - not syncing: sysrq triggered crash" in message.splitlines()[0]
    assert "last lines of the console:\n  | " in message
    assert "sysrq: Trigger a crash" in message


def test_a_boot_that_hangs_is_given_up(trials: dict[str, Future[Run]]) -> None:
    message = read_failure(trials["hang"])
    assert "did not come up within 15 s" in message.splitlines()[0]
    assert "last lines of the console:\n  | " in message


def test_a_job_that_never_answers_is_given_up(trials: dict[str, Future[Run]]) -> None:
    message = read_failure(trials["silence"])
    assert "said nothing for 40 s" in message.splitlines()[0]
    assert message.endswith("end of the output:\nbefore the silence\n")


def test_a_machine_that_powers_off_is_noticed(trials: dict[str, Future[Run]]) -> None:
    assert "ended before its job was done" in read_failure(trials["poweroff"]).splitlines()[0]
