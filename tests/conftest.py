"""What every test may use, and the rule about skips: a reason always, and none at all where KVM_TESTS_MUST_RUN=1.

A run has a mount namespace of its own, and fails if the machine's has changed (``tests/own_mounts.py``).

Figures that a reader of the run shall see go through the fixture ``tell``; they are printed when all tests have run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import Any

import hypothesis
import pytest

from tests import own_mounts

# A machine that is busy is no fault of what is tested: how fast it is, benchmarks say.
hypothesis.settings.register_profile("kvm-notify-exporter", deadline=None)
hypothesis.settings.load_profile("kvm-notify-exporter")

# Tests with these markers have a make target of their own, as they need what most machines have not.
ON_REQUEST = ("deploy", "display")
MUST_RUN = os.environ.get("KVM_TESTS_MUST_RUN") == "1"
_FIGURES = pytest.StashKey[list[str]]()
_OUTER_MOUNTS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OUTER_MOUNTS] = own_mounts.read_mounts(str(os.getppid()))
    own_mounts.enter()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    before, after = session.config.stash[_OUTER_MOUNTS], own_mounts.read_mounts(str(os.getppid()))
    if after != before:
        print(f"\nthe tests have changed what is mounted on this machine: {before} -> {after}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if (workers_output := getattr(session.config, "workeroutput", None)) is not None:
        workers_output["figures"] = session.config.stash.get(_FIGURES, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:  # noqa: ANN401 - xdist has no types
    """Takes what a worker of xdist has to tell."""
    workers_output = getattr(node, "workeroutput", {})  # one that crashed has left none
    node.config.stash.setdefault(_FIGURES, []).extend(workers_output.get("figures", []))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/live/" in item.nodeid or "tests/hostile/" in item.nodeid:
            item.add_marker(pytest.mark.live)
    for marker in ON_REQUEST:
        if os.environ.get(f"{marker.upper()}_TESTS") != "1":
            left_out = [item for item in items if item.get_closest_marker(marker)]
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if MUST_RUN and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} must run (KVM_TESTS_MUST_RUN=1), but: {reason}"
    return report


@pytest.fixture(scope="session")
def tell(
    request: pytest.FixtureRequest, record_testsuite_property: Callable[[str, object], None]
) -> Callable[[str], None]:
    """Takes a line with figures, for the end of the run; a junit file has them as properties called ``figure``."""
    figures = request.config.stash.setdefault(_FIGURES, [])

    def tell(line: str) -> None:
        figures.append(line)
        record_testsuite_property("figure", line)

    return tell


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(_FIGURES, []):
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)
