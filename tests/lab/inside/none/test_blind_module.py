"""An agent where KVM is not loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.blind.claims import Truth
from tests.blind.scene import ROOT, Scene, read_as_root
from tests.blind.surfaces import ask, make_stage
from tests.blind.ways import Sees
from tests.lab.inside.blind import check_row
from tests.lab.inside.none.test_bpf_module import insert, is_loaded, remove


@pytest.fixture(autouse=True)
def unloaded() -> Iterator[None]:
    """KVM is not loaded; what was before is loaded after."""
    names = [name for name in ("notify_inject", "kvm-amd", "kvm") if is_loaded(name)]
    for name in names:
        remove(name).check_returncode()
    yield
    for name in reversed(names):
        insert(name)


def test_without_kvm_no_surface_says_that_all_is_well(
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        stage = make_stage(Path(directory))
        answers = ask(ROOT, stage)
        _, document = read_as_root(Scene(frozenset(), stage))
    nothing = Truth({}, {}, document["host"], frozenset(), complete=False)
    check_row("KVM not loaded", Sees.ALL, nothing, answers, record_testsuite_property)  # there is no VM to be missed
    assert "KVM is not loaded" in answers.check.text
    assert (answers.once.code, answers.check.code, answers.ready[0]) == (1, 1, 503)
