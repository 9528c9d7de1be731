"""No surface claims more than a run as root beside it can confirm, in whatever way the agent is blind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.blind.claims import SURFACES, Truth, claim_by_alerts, find_listed, find_missing, find_read, find_served
from tests.blind.surfaces import Answers, ask, make_stage, run
from tests.blind.ways import (
    CAPABILITIES,
    MASK_KALLSYMS,
    NO_KVM_DEVICE,
    PROC_SUBSET,
    PYTHON,
    WAYS,
    Sees,
    Way,
    hide_pids,
)
from tests.live import open_guest_process


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
COLUMNS = [*SURFACES, "alert"]


class Scene(NamedTuple):
    """Two VMs, one of which no VMM's stats fds tell of, and where agents are run."""

    pids: frozenset[int]
    stage: Path


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with (
        tempfile.TemporaryDirectory() as directory,
        open_guest_process(vcpus=2, name="web", stats_fds=True, port_writes=23) as one,
        open_guest_process(style="firecracker", name="fn", port_writes=7) as two,
    ):
        yield Scene(frozenset({one.pid, two.pid}), make_stage(Path(directory)))


@pytest.fixture(scope="module")
def rows(tell: Callable[[str], None]) -> Iterator[dict[str, dict[str, list[str]]]]:
    """The false claims of each way, by surface; told as a table in the end."""
    rows: dict[str, dict[str, list[str]]] = {}
    yield rows
    width = max(map(len, rows), default=0)
    tell(f"{'ways to be blind':<{width}}  sees  {'  '.join(COLUMNS)}")
    for name, row in rows.items():
        cells = "  ".join(f"{'FALSE' if row[column] else 'ok':<{len(column)}}" for column in COLUMNS)
        tell(f"{name:<{width}}  {row['sees'][0]:<4}  {cells}")
    wrong = sum(bool(row[column]) for row in rows.values() for column in COLUMNS)
    tell(f"{len(rows)} ways x {len(COLUMNS)} surfaces: {wrong} false all-clears")


def read_as_root(scene: Scene) -> tuple[dict[int, dict[str, Any]], dict[str, Any], frozenset[str]]:
    document = json.loads(run(Way(name="root"), scene.stage, "once", "--format=json").text)
    vms = {vm["pid"]: vm for vm in document["vms"] if vm["pid"] in scene.pids}
    assert vms.keys() == scene.pids
    return vms, document["host"], frozenset(source["source"] for source in document["sources"] if source["up"])


def ask_beside_root(scene: Scene, way: Way) -> tuple[Truth, Answers]:
    before, _host, _sources = read_as_root(scene)
    answers = ask(way, scene.stage)
    after, host, sources = read_as_root(scene)
    return Truth(before, after, host, sources), answers


def find_false(truth: Truth, answers: Answers, directory: Path) -> dict[str, list[str]]:
    false = {name: list(claim(truth, answers)) for name, claim in SURFACES.items()}
    return false | {"alert": list(claim_by_alerts(truth, answers, directory))}


def judge(truth: Truth, listed: set[int], read: set[int]) -> Sees:
    if read == set(truth.after):
        return Sees.ALL
    return Sees.SOME if read else Sees.NONE


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_no_surface_claims_more_than_root_can_confirm(
    way: Way, scene: Scene, rows: dict[str, dict[str, list[str]]], tmp_path: Path
) -> None:
    truth, answers = ask_beside_root(scene, way)
    false = find_false(truth, answers, tmp_path)
    once = judge(truth, set(truth.after) - find_missing(truth, answers), find_read(truth, answers))
    rows[way.name] = {**false, "sees": [once]}
    assert not any(false.values()), {name: claims for name, claims in false.items() if claims}
    # That it is as blind as meant, and no more: else nothing has been shown.
    assert way.sees in (once, Sees.ANY)
    if way.sees is Sees.ALL:
        assert find_served(truth, answers) == find_listed(truth, answers) == scene.pids
        assert (answers.once.code, answers.check.code, answers.ready[0]) == (0, 0, 200)
        assert answers.snapshot["complete"]


SOME_WAY = st.builds(
    Way,
    name=st.just("at random"),
    sees=st.just(Sees.ANY),
    held=st.none() | st.sets(st.sampled_from(CAPABILITIES)).map(lambda held: tuple(sorted(held))),
    mounts=st.sets(
        st.sampled_from([hide_pids(1), hide_pids(2), PROC_SUBSET, MASK_KALLSYMS, NO_KVM_DEVICE]), max_size=2
    ).map(lambda mounts: tuple(sorted(mounts, key=lambda line: "proc proc" not in line))),
    refused=st.sets(st.sampled_from(["bpf", "perf_event_open", "pidfd_getfd", "kcmp"])).map(
        lambda names: tuple(sorted(names))
    ),
    max_fds=st.sampled_from([None, 48]),
    sources=st.sampled_from(["", "stats_fd,debugfs", "stats_fd", "debugfs"]),
)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(way=SOME_WAY)
def test_nor_in_any_combination(way: Way, scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> None:
    truth, answers = ask_beside_root(scene, way)
    false = find_false(truth, answers, tmp_path_factory.mktemp("alerts"))
    assert not any(false.values()), {name: claims for name, claims in false.items() if claims}
