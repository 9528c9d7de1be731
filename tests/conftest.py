"""What every test may use, and the rule about skips: a reason always, and none at all where KVM_TESTS_MUST_RUN=1."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

MUST_RUN = os.environ.get("KVM_TESTS_MUST_RUN") == "1"


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
