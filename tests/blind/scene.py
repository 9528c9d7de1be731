"""Two VMs, an agent that is blind in some way, and what root reads of the VMs before and after."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.blind.claims import Truth, find_missing, find_read
from tests.blind.surfaces import Answers, ask, make_stage, run
from tests.blind.ways import Sees, Way
from tests.live import open_guest_process

ROOT: Final = Way(name="root")


class Scene(NamedTuple):
    """Where agents are run, and the VMs beside them: one with stats fds, and one whose VMM holds none."""

    pids: frozenset[int]
    stage: Path


@contextmanager
def open_scene() -> Iterator[Scene]:
    """Run the VMs."""
    with (
        tempfile.TemporaryDirectory() as directory,
        open_guest_process(vcpus=2, name="web", stats_fds=True, port_writes=23) as one,
        open_guest_process(style="firecracker", name="fn", port_writes=7) as two,
    ):
        yield Scene(frozenset({one.pid, two.pid}), make_stage(Path(directory)))


def read_as_root(scene: Scene) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """What root reads: the VMs of the scene by pid, and the whole document."""
    document = json.loads(run(ROOT, scene.stage, "once", "--format=json").text)
    return {vm["pid"]: vm for vm in document["vms"] if vm["pid"] in scene.pids}, document


@contextmanager
def open_truth(scene: Scene) -> Iterator[list[Truth]]:
    """Have root read before and after; the list has the truth in the end."""
    before, first = read_as_root(scene)
    truths: list[Truth] = []
    yield truths
    after, document = read_as_root(scene)
    sources = frozenset(source["source"] for source in document["sources"] if source["up"])
    truths.append(Truth(before, after, document["host"], sources, first["complete"] and document["complete"]))


def ask_beside_root(scene: Scene, way: Way) -> tuple[Truth, Answers]:
    """Ask all surfaces of an agent that is blind in this way."""
    with open_truth(scene) as truths:
        answers = ask(way, scene.stage)
    return truths[0], answers


def judge_sight(truth: Truth, answers: Answers) -> Sees:
    """Which of the VMs ``once`` has listed and read."""
    read = find_read(truth, answers) - find_missing(truth, answers)
    if read == set(truth.after):
        return Sees.ALL
    return Sees.SOME if read else Sees.NONE
