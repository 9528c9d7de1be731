"""Which kernels are booted how, with which tests inside, and what the outcome of that is.

Decisions:

* The state of lockdown can be raised at any time but never falls, so the tests for ``confidentiality`` come last in
  the boot that starts with ``integrity``. The verdicts need guests that flood, which only CPUs that take turns bear;
  there everything is slow, so nothing else is in that boot.
* What an agent says of its blindness takes minutes to ask under emulation, as do the long scenes of the verdicts, and
  is the same on every kernel: boots and tests that are `one_kernel` are left out of all series but one unless the
  whole lab is wanted, as by ``make lab`` and by night.
* Inside nothing may be skipped: everything that a test could lack is put there by us.
* Of 9,038 floods of notify exits, with perf events opened and closed meanwhile and no agent near, four went wrong: one
  guest shut down (KVM_EXIT_SHUTDOWN), one had KVM emulate instructions without end, two gave no more records. Whether
  emulated SVM or the injector is at fault is not known: without the injector it was none of 4,657, too few to tell.
  So a few tests that fail are tried again, in a boot of their own; that is told, and what fails twice has failed.
* A warning of the kernel fails a boot, whatever the tests say: the agent must not bring a kernel into trouble,
  and what the injector does to one must be sound.
* Two boots run at once: one is mostly one busy CPU.
"""

from __future__ import annotations

import os
import re
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.blind.table import ROW_PROPERTY, Row, count_wrong, render_table, unpack_row
from tests.lab.boot import Run, ThreadIndex, run_in_kernel
from tests.lab.debian import SERIES, Kernel, open_kernel
from tests.lab.initramfs import write_layers

DEFAULT_SERIES = "6.12"
NOT_AGAIN = ("-m", "not one_kernel")
JUNIT = "/tmp/junit.xml"
AT_ONCE = 2
SLOWEST = 5
# More tests than that do not fail by chance.
TRIED_AGAIN = 2
KERNEL_WARNING = re.compile(r"WARNING: |BUG: |Oops: |general protection|rcu: INFO: .* stall|hung_task")
ENVIRONMENT = {"KVM_LAB_INSIDE": "1", "KVM_TESTS_MUST_RUN": "1", "PYTHONDONTWRITEBYTECODE": "1"}
# hypothesis is for the tests outside; importing it under emulation takes seconds.
PYTEST = ("python3", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", f"--junitxml={JUNIT}")


@dataclass(frozen=True)
class Boot:
    """One way to boot a kernel, and the tests that are run then."""

    name: str
    append: str
    tests: tuple[str, ...]
    threads: ThreadIndex = ThreadIndex.MULTI
    one_kernel: bool = False
    """Whether all of its tests take long and are the same on every kernel."""
    arguments: tuple[str, ...] = ()
    """Further ones for pytest."""


VERDICTS = Boot("verdicts", "", ("tests/lab/inside/verdicts",), ThreadIndex.SINGLE)
BOOTS = (
    VERDICTS,
    Boot("none", "", ("tests/lab/inside/none",)),
    Boot("blind", "", ("tests/lab/inside/blind",), one_kernel=True),
    Boot("integrity", "lockdown=integrity", ("tests/lab/inside/integrity", "tests/lab/inside/confidentiality")),
)


# Only where KVM has the project's patches. What holds for the stock kernel has to hold here, too: the injector's
# tests are about KVM's handler here, and those of the agent's readers about what has grown under them.
PATCHED = Boot(
    "patched",
    "",
    (
        "tests/lab/inside/patched",
        "tests/lab/inside/none/test_injector.py",
        "tests/lab/inside/none/test_bpf_inside.py",
        "tests/lab/inside/none/test_kvm_interfaces.py",
    ),
)
# The agent there; its guests flood. VERDICTS has the scenarios that are judged alike on stock kernels.
PATCHED_VERDICTS = Boot("patched-verdicts", "", ("tests/lab/inside/patched_verdicts",), ThreadIndex.SINGLE)
# Not with lockdown: modules that nobody has signed are not loaded then.
PATCHED_BOOTS = (VERDICTS, PATCHED, PATCHED_VERDICTS)


@dataclass(frozen=True)
class Outcome:
    """What came of the tests of one boot."""

    boot: Boot
    run: Run
    tests: int
    failed: int
    skipped: int
    kernel_warnings: tuple[str, ...]
    figures: tuple[str, ...] = ()
    blind: tuple[Row, ...] = ()
    failed_tests: tuple[str, ...] = ()
    again: Outcome | None = None
    """What came of the tests that failed, where they were tried a second time."""

    @property
    def may_be_tried_again(self) -> bool:
        """True when few tests failed, and nothing else is wrong."""
        return 0 < len(self.failed_tests) == self.failed <= TRIED_AGAIN and self._is_sound

    @property
    def passed(self) -> bool:
        """True when tests ran, all of them, none failed, alerts tell what is not seen, and the kernel is content."""
        if self.again is not None:
            return self.may_be_tried_again and self.again.passed and self.again.tests == self.failed
        return self._is_sound and self.run.exit_status == 0 and self.tests > 0 and self.failed == 0

    @property
    def _is_sound(self) -> bool:
        return not self.skipped and not self.kernel_warnings and not count_wrong(self.blind)


def read_series(environment: Mapping[str, str], variable: str = "LAB_KERNELS") -> list[str]:
    """Returns the series that a variable names, such as "6.1 6.12 7" or "all"; one where it is not set."""
    words = environment.get(variable, DEFAULT_SERIES).replace(",", " ").split()
    return list(SERIES) if words == ["all"] else words


def parse_junit(xml: bytes) -> tuple[int, int, int]:
    """Returns how many tests a junit file tells of, how many failed, and how many were skipped."""
    suites = ET.fromstring(xml).iter("testsuite")
    counts = [[int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")] for suite in suites]
    tests, failures, errors, skipped = (sum(column) for column in zip(*counts, strict=True))
    return tests, failures + errors, skipped


def parse_figures(xml: bytes) -> tuple[str, ...]:
    """Returns the lines with figures that the tests of a junit file have told."""
    properties = ET.fromstring(xml).iter("property")
    return tuple(found.get("value", "") for found in properties if found.get("name") == "figure")


def find_failed(xml: bytes) -> tuple[str, ...]:
    """Returns the tests of a junit file that failed, as pytest takes them."""
    cases = [case for case in ET.fromstring(xml).iter("testcase") if {"failure", "error"} & {kind.tag for kind in case}]
    return tuple(f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '')}" for case in cases)


def find_slowest(xml: bytes) -> str:
    """Returns a line with the tests of a junit file that took longest."""
    cases = ET.fromstring(xml).iter("testcase")
    slowest = sorted(((float(case.get("time", "0")), case.get("name", "")) for case in cases), reverse=True)[:SLOWEST]
    return "slowest: " + ", ".join(f"{name} {seconds:.0f} s" for seconds, name in slowest)


def parse_blind_rows(xml: bytes) -> tuple[Row, ...]:
    """Returns what blind agents have claimed inside, with the alerts that Prometheus would have raised outside."""
    properties = ET.fromstring(xml).iter("property")
    rows = [unpack_row(found.get("value", "")) for found in properties if found.get("name") == ROW_PROPERTY]
    with tempfile.TemporaryDirectory() as directory:
        return tuple(row.judge_alerts(Path(directory)) for row in rows)


def find_kernel_warnings(console: str) -> tuple[str, ...]:
    """Returns the lines of a console in which the kernel says that something is wrong with itself."""
    return tuple(line.strip() for line in console.splitlines() if KERNEL_WARNING.search(line))


def run_tests(kernel: Kernel, boot: Boot) -> Outcome:
    """Boots a kernel and runs a boot's tests in it, those that fail by chance once more; raises RunLost."""
    outcome = run_once(kernel, boot)
    if not outcome.may_be_tried_again:
        return outcome
    again = run_once(kernel, replace(boot, tests=outcome.failed_tests, arguments=()))
    told = f"tried again: {', '.join(outcome.failed_tests)}: {'passed' if again.passed else 'failed'} the second time"
    return replace(outcome, again=again, figures=(*outcome.figures, told))


def run_once(kernel: Kernel, boot: Boot) -> Outcome:
    """Boots a kernel and runs a boot's tests in it; raises RunLost."""
    command = [*PYTEST, *boot.tests, *boot.arguments]
    run = run_in_kernel(
        kernel, command, environment=ENVIRONMENT, files=[JUNIT], append=boot.append, threads=boot.threads
    )
    junit = run.files.get(JUNIT)
    tests, failed, skipped = parse_junit(junit) if junit else (0, 0, 0)
    figures = (*parse_figures(junit), find_slowest(junit)) if junit else ()
    rows = parse_blind_rows(junit) if junit else ()
    figures += tuple(render_table(rows)) if rows else ()
    failed_tests = find_failed(junit) if junit else ()
    return Outcome(boot, run, tests, failed, skipped, find_kernel_warnings(run.console), figures, rows, failed_tests)


@dataclass(frozen=True)
class Boots:
    """Boots under way, by series and name of the boot."""

    kernels: Mapping[str, Kernel]
    futures: Mapping[tuple[str, str], Future[Outcome]]


@contextmanager
def open_executor() -> Iterator[ThreadPoolExecutor]:
    """Yields what runs boots, as many at once as the machine can take; at the end it waits, and starts no more."""
    executor = ThreadPoolExecutor(max_workers=min(AT_ONCE, os.cpu_count() or 1))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def choose_boots(series: Sequence[str], *, is_whole: bool) -> list[tuple[str, Boot]]:
    """Returns which series are booted how: unless all is wanted, what is the same on each is tried on one of them."""
    once = DEFAULT_SERIES if DEFAULT_SERIES in series else series[0]
    return [
        (name, boot if is_whole or name == once else replace(boot, arguments=NOT_AGAIN))
        for name in series
        for boot in BOOTS
        if is_whole or name == once or not boot.one_kernel
    ]


def start_boots(
    executor: ThreadPoolExecutor,
    boots: Sequence[tuple[str, Boot]],
    open_one: Callable[[str], Kernel] = open_kernel,
) -> Boots:
    """Fetches and builds for one kernel after the other, then starts booting them; raises LabError."""
    kernels = {name: open_one(name) for name in dict.fromkeys(series for series, _ in boots)}
    for kernel in kernels.values():
        write_layers(kernel)
    futures = {(name, boot.name): executor.submit(run_tests, kernels[name], boot) for name, boot in boots}
    return Boots(kernels, futures)
