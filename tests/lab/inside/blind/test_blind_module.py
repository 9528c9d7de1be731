"""An agent where KVM is not loaded, and where it is loaded or removed while the agent runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.agents import AgentProcess
from tests.blind.claims import Truth
from tests.blind.scene import ROOT, Scene, open_scene, open_truth, read_as_root
from tests.blind.surfaces import Answers, ask, ask_agent, make_stage, open_agent
from tests.blind.ways import Sees
from tests.lab.inside.blind.check import Record, check_row
from tests.lab.inside.none.test_bpf_module import insert, is_loaded, remove
from tests.waiting import wait_until

# Emulated, the programs take seconds to load.
PATIENCE_SECONDS = 60.0


@pytest.fixture(autouse=True)
def unloaded() -> Iterator[None]:
    """KVM is not loaded; what was before is loaded after."""
    names = [name for name in ("notify_inject", "kvm-amd", "kvm") if is_loaded(name)]
    for name in names:
        remove(name).check_returncode()
    yield
    for name in reversed(names):
        if not is_loaded(name):
            insert(name)


def test_without_kvm_no_surface_says_that_all_is_well(
    record_testsuite_property: Record,
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        stage = make_stage(Path(directory))
        check_that_nothing_is_seen("KVM not loaded", ask(ROOT, stage), stage, record_testsuite_property)


def check_that_nothing_is_seen(way: str, answers: Answers, stage: Path, record: Record) -> None:
    _, document = read_as_root(Scene(frozenset(), stage))
    nothing = Truth({}, {}, document["host"], frozenset(), complete=False)
    check_row(way, Sees.ALL, nothing, answers, record)  # there is no VM to be missed
    assert "KVM is not loaded" in answers.check.text
    assert (answers.once.code, answers.check.code, answers.ready[0]) == (1, 1, 503)


def find_up(agent: AgentProcess) -> set[str]:
    samples = agent.samples("kvm_exporter_source_up")
    return {dict(labels)["source"] for labels, value in samples.items() if value}


def test_kvm_that_is_loaded_while_the_agent_runs_is_seen(
    record_testsuite_property: Record, tell: Callable[[str], None]
) -> None:
    with tempfile.TemporaryDirectory() as directory, open_agent(ROOT, make_stage(Path(directory))) as agent:
        assert find_up(agent) == set()
        for name in ("kvm", "kvm-amd"):
            insert(name)
        loaded = time.monotonic()
        wait_until(lambda: find_up(agent) == {"bpf", "stats_fd", "debugfs"}, "all sources are up", PATIENCE_SECONDS)
        tell(f"KVM loaded late: all sources are up {time.monotonic() - loaded:.1f} s after")
        with open_scene() as scene:
            wait_until(lambda: agent.get("/-/ready")[0] == 200, "VMs have owners and are read", PATIENCE_SECONDS)
            with open_truth(scene) as truths:
                answers = ask_agent(agent, ROOT, scene.stage)
            check_row("KVM loaded late", Sees.ALL, truths[0], answers, record_testsuite_property)


def test_kvm_that_is_removed_while_the_agent_runs_is_missed(
    record_testsuite_property: Record, tell: Callable[[str], None]
) -> None:
    """It can be, at once, where no program of the agent's is at one of its functions."""
    for name in ("kvm", "kvm-amd"):
        insert(name)
    with tempfile.TemporaryDirectory() as directory:
        stage = make_stage(Path(directory))
        with open_agent(replace(ROOT, more_flags=("--no-trigger.bpf",)), stage) as agent:
            wait_until(lambda: find_up(agent) == {"bpf", "stats_fd", "debugfs"}, "all sources are up", PATIENCE_SECONDS)
            for name in ("kvm-amd", "kvm"):
                remove(name).check_returncode()
            removed = time.monotonic()
            wait_until(lambda: find_up(agent) == set(), "no source is up", PATIENCE_SECONDS)
            tell(f"KVM removed: no source is up {time.monotonic() - removed:.1f} s after")
            answers = ask_agent(agent, ROOT, stage)
        check_that_nothing_is_seen("KVM removed", answers, stage, record_testsuite_property)
