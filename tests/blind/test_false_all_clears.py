"""No surface claims more than a run as root beside it can confirm, in whatever way the agent is blind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.blind.alerts import UP, find_firing, split_sample
from tests.blind.claims import SURFACES, find_listed, find_served
from tests.blind.scene import ROOT, Scene, ask_beside_root, judge_sight, open_scene, open_truth
from tests.blind.surfaces import ask_agent, open_agent
from tests.blind.table import ALERT, Row, make_row, render_table
from tests.blind.ways import (
    CAPABILITIES,
    MASK_KALLSYMS,
    NO_KVM_DEVICE,
    NO_KVM_MODULE,
    OTHER_TYPES,
    PROC_SUBSET,
    PYTHON,
    WAYS,
    Sees,
    Way,
    hide_pids,
)
from tests.btf_types import move_in_module
from tests.own_mounts import UNMOUNT_ALL

# Where serve shows what it knows, by surface; and how long Prometheus waits for it, at least.
SERVED: Final = {"/metrics": "/metrics", "/-/ready": "/-/ready", "page": "/", "API": "/api/v1/vcpus"}
SCRAPE_TIMEOUT: Final = 3.0


def has_same_python() -> bool:
    """Whether Debian's interpreter can import what this one can."""
    name = sys.implementation.cache_tag
    run = subprocess.run(
        [PYTHON, "-c", "import sys; print(sys.implementation.cache_tag)"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() == name


pytestmark = [
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to give up"),
    pytest.mark.skipif(not Path(PYTHON).exists(), reason=f"{PYTHON} is missing"),
    pytest.mark.skipif(not has_same_python(), reason=f"the packages of this environment are not for {PYTHON}"),
    pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's package prometheus has promtool"),
]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with open_scene() as scene:
        write_other_types(scene.stage / "btf")
        yield scene


def write_other_types(directory: Path) -> None:
    """Write types as of a KVM whose struct kvm_vcpu is longer by 24 bytes than that of vmlinux."""
    vmlinux = Path("/sys/kernel/btf/vmlinux").read_bytes()
    (directory / "vmlinux").write_bytes(vmlinux)
    (directory / "kvm").write_bytes(move_in_module(vmlinux, b"kvm_vcpu", b"stat", 24))


@pytest.fixture(scope="module")
def rows(tell: Callable[[str], None]) -> Iterator[list[Row]]:
    """The false claims of each way, by surface; told as a table in the end."""
    rows: list[Row] = []
    yield rows
    for line in render_table(rows):
        tell(line)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_no_surface_claims_more_than_root_can_confirm(way: Way, scene: Scene, rows: list[Row], tmp_path: Path) -> None:
    truth, answers = ask_beside_root(scene, way)
    row = make_row(way.name, judge_sight(truth, answers), truth, answers).judge_alerts(tmp_path)
    rows.append(row)
    assert not row.wrong
    # That it is as blind as meant, and no more: else nothing has been shown.
    assert way.sees in (row.sees, Sees.ANY)
    if way.sees is Sees.ALL:
        assert find_served(truth, answers) == find_listed(truth, answers) == scene.pids
        if truth.complete:
            assert (answers.once.code, answers.check.code, answers.ready[0]) == (0, 0, 200)
            assert answers.snapshot["complete"]


def test_a_frozen_agent_answers_nobody_and_alerts_tell(scene: Scene, rows: list[Row], tmp_path: Path) -> None:
    """It is stopped after it has been scraped a few times; then each scrape takes longer than Prometheus waits."""
    with open_truth(scene) as truths, open_agent(ROOT, scene.stage) as agent:
        before = ask_agent(agent, ROOT, scene.stage)
        os.kill(agent.pid, signal.SIGSTOP)
        try:
            answered = {name: agent.has_answer(path, SCRAPE_TIMEOUT) for name, path in SERVED.items()}
        finally:
            os.kill(agent.pid, signal.SIGCONT)
    row = make_row("agent frozen (SIGSTOP)", Sees.NONE, truths[0], before)
    gone = [(name, f"{value}x3") for name, value in map(split_sample, row.scraped.text.splitlines())]
    firing = find_firing([(UP, "1x3 0x26"), *gone], tmp_path)
    false = {name: ["it answers"] * answered.get(name, False) for name in SURFACES}
    false |= {"once": row.false["once"], "check": row.false["check"]}  # agents of their own, that are not frozen
    false[ALERT] = [] if "KvmNotifyExporterDown" in firing else ["no alert says that it does not answer"]
    rows.append(replace(row, false=false))
    assert not rows[-1].wrong
    assert truths[0].after.keys() == scene.pids


def test_a_snapshot_that_is_renewed_no_more_is_told(scene: Scene, rows: list[Row], tmp_path: Path) -> None:
    """The textfile of a cron job that has died, or an agent that serves what it read long ago."""
    truth, answers = ask_beside_root(scene, ROOT)
    row = make_row("textfile not renewed", Sees.NONE, truth, answers)
    series = [split_sample(line) for line in row.scraped.text.splitlines()]
    assert "kvm_exporter_snapshot_timestamp_seconds" in row.scraped.text
    two_hours_ago = "-7200+0x30"  # promtool's time begins at 0
    stale = [(name, two_hours_ago if "snapshot_timestamp" in name else f"{value}x30") for name, value in series]
    firing = find_firing([(UP, "1x30"), *stale], tmp_path)
    false = {ALERT: [] if "KvmNotifySnapshotStale" in firing else ["no alert says that the file is old"]}
    rows.append(replace(row, false=false))
    assert not rows[-1].wrong


SOME_WAY = st.builds(
    Way,
    name=st.just("at random"),
    sees=st.just(Sees.ANY),
    held=st.none() | st.sets(st.sampled_from(CAPABILITIES)).map(lambda held: tuple(sorted(held))),
    mounts=st.sets(
        st.sampled_from(
            [
                *(hide_pids(1), hide_pids(2), PROC_SUBSET, MASK_KALLSYMS),
                *(NO_KVM_DEVICE, NO_KVM_MODULE, OTHER_TYPES, UNMOUNT_ALL),
            ]
        ),
        max_size=2,
    ).map(lambda mounts: tuple(sorted(mounts, key=lambda line: "proc proc" not in line))),
    refused=st.sets(st.sampled_from(["bpf", "perf_event_open", "pidfd_getfd", "kcmp"])).map(
        lambda names: tuple(sorted(names))
    ),
    max_fds=st.sampled_from([None, 48]),
    sources=st.sampled_from(["", "stats_fd,debugfs", "stats_fd", "debugfs"]),
)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(way=SOME_WAY)
@example(way=Way(name="ProcSubset=pid, user", mounts=(PROC_SUBSET,), held=CAPABILITIES, sees=Sees.ANY))
def test_nor_in_any_combination(way: Way, scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> None:
    truth, answers = ask_beside_root(scene, way)
    row = make_row(way.name, judge_sight(truth, answers), truth, answers)
    assert not row.judge_alerts(tmp_path_factory.mktemp("alerts")).wrong
