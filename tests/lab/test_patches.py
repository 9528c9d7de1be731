"""The patches of kvm/patches: in order, in the kernel's style, for Debian's source as it is, and explained."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.lab.debian import open_kernel
from tests.lab.patched import PATCHES, apply_patches, find_patches, find_version, unpack_source
from tests.lab.plan import read_series

README = (PATCHES / "README.md").read_text(encoding="utf-8")
ALL = sorted(PATCHES.glob("v*/*.patch"))
SUBJECT = re.compile(r"^Subject: \[(?:RFC )?PATCH\] (KVM: \w+: [A-Z][^\n]*(?:\n [^\n]*)?)\n\n", re.MULTILINE)


def read_subject(patch: Path) -> str:
    found = SUBJECT.search(patch.read_text(encoding="utf-8"))
    assert found, f"{patch}: no subject in the kernel's style"
    return found.group(1).replace("\n ", " ")


def read_added(patch: Path) -> list[str]:
    return [line[1:] for line in patch.read_text(encoding="utf-8").splitlines() if line.startswith("+")]


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: f"{patch.parent.name}-{patch.name[:4]}")
def test_a_patch_says_what_and_why_and_is_signed_by_nobody(patch: Path) -> None:
    text = patch.read_text(encoding="utf-8")
    assert not read_subject(patch).endswith(".")
    why = text[SUBJECT.search(text).end() : text.index("\n---\n")]  # type: ignore[union-attr]
    assert len(why.split()) > 20
    assert max(len(line) for line in why.splitlines()) <= 75
    assert "Signed-off-by" not in text
    assert ("[RFC PATCH]" in text) == patch.parent.name.endswith("-rfc")


@pytest.mark.parametrize("series", sorted({patch.parent for patch in ALL}), ids=lambda series: series.name)
def test_a_series_is_numbered_without_gaps(series: Path) -> None:
    numbers = [int(patch.name[:4]) for patch in sorted(series.glob("*.patch"))]
    assert numbers == list(range(1, len(numbers) + 1))


def test_each_series_has_the_same_patches_and_the_readme_names_them() -> None:
    series = {patch.parent.name for patch in ALL if not patch.parent.name.endswith("-rfc")}
    subjects = {name: [read_subject(patch) for patch in find_patches(name[1:])] for name in series}
    assert len(set(map(tuple, subjects.values()))) == 1
    for number, subject in enumerate(next(iter(subjects.values())), start=1):
        assert f"| {number:04} {subject.removeprefix('KVM: x86: ')} |" in README
    assert all(f"`{name}`" in README for name in {patch.parent.name for patch in ALL})


def test_the_readme_explains_each_statistic_and_parameter() -> None:
    added = "\n".join(line for patch in ALL for line in read_added(patch))
    names = re.findall(r"STATS_DESC_\w+\(VCPU, (\w+)\)", added) + re.findall(r"module_param\((\w+),", added)
    assert len(set(names)) == 8
    missing = [name for name in names if f"`{name}`" not in README and f"`kvm.{name}`" not in README]
    assert missing == []


@pytest.mark.lab
@pytest.mark.parametrize("series", read_series(os.environ, "LAB_PATCHED_KERNELS"))
def test_patches_apply_and_checkpatch_finds_what_the_readme_names(series: str, tmp_path: Path) -> None:
    kernel = open_kernel(series)
    source = tmp_path / "source"
    unpack_source(kernel, source)
    patches = find_patches(find_version(kernel))
    apply_patches(patches, source)
    proposed = sorted((PATCHES / f"v{find_version(kernel)}-rfc").glob("*.patch"))
    apply_patches(proposed, source)
    command = ["perl", "scripts/checkpatch.pl", "--no-tree", "--strict", "--no-signoff", "--show-types", "--terse"]
    said = subprocess.run(
        [*command, "--no-summary", *map(str, [*patches, *proposed])],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    found = Counter(re.findall(r": ((?:ERROR|WARNING|CHECK):\w+): ", said.stdout))
    assert sum(found.values()) == len(said.stdout.splitlines()), said.stdout + said.stderr
    named = Counter(re.findall(r"^    ((?:ERROR|WARNING|CHECK):\w+)$", README, re.MULTILINE))
    assert found == named, said.stdout
