"""The locks pin what is asked for, each file by its hash, and the bill of materials has them; no network is needed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.bill import SCHEMA, render_bill
from deploy.locks import EXTRAS, LOCKS, digest_requirements, find_requirements, parse_lock
from tests.deploy.distributions import ROOT

SECONDS = 1_700_000_000


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_is_of_what_is_asked_for_now(name: str) -> None:
    text = (LOCKS / name).read_text()
    assert f"# For {digest_requirements(EXTRAS[name])} of pyproject.toml\n" in text, "run: python -m deploy.locks"
    pinned = {found.name: found.version for found in parse_lock(text)}
    wanted = [Requirement(text) for text in find_requirements(EXTRAS[name])]
    assert len(wanted) > 5
    for requirement in wanted:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_a_requirement_that_changes_is_noticed(tmp_path: Path) -> None:
    before = digest_requirements("")
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace('"psutil>=5.9"', '"psutil>=5.10"'))
    assert digest_requirements("", tmp_path) != before


@pytest.mark.parametrize(
    "line", ["psutil==7.0", "psutil>=7.0 --hash=sha256:" + "0" * 64, "psutil==7.0 --hash=sha256:0"]
)
def test_what_pins_nothing_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="no version with hashes"):
        parse_lock(f"# of something\n{line}\n")


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lib = tmp_path_factory.mktemp("lib")
    (lib / "kvm/bpf/programs").mkdir(parents=True)
    (lib / "kvm/bpf/programs/vcpus.bpf.o").write_bytes((ROOT / "kvm/bpf/programs/vcpus.bpf.o").read_bytes())
    return lib


def test_the_bill_is_valid_and_the_same_each_time(lib: Path) -> None:
    text = render_bill("1.2.3", lib, SECONDS)
    assert SCHEMA is SchemaVersion.V1_6
    assert JsonStrictValidator(SCHEMA).validate_str(text) is None
    assert JsonStrictValidator(SCHEMA).validate_str(text.replace('"library"', '"librarry"')) is not None
    assert render_bill("1.2.3", lib, SECONDS) == text


def test_the_bill_lists_program_objects_and_libraries(lib: Path) -> None:
    bill = json.loads(render_bill("1.2.3", lib, SECONDS))
    program = bill["metadata"]["component"]
    assert (program["name"], program["version"], program["type"]) == ("kvm-notify-exporter", "1.2.3", "application")
    assert bill["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"
    depends = {(found["name"], found["value"]) for found in program["properties"]}
    assert ("kvm-notify-exporter:deb:depends", "python3-aiohttp (>= 3.8.4)") in depends
    assert ("kvm-notify-exporter:rpm:depends", "libbpf >= 1") in depends
    libraries = {(found["name"], found["version"]) for found in bill["components"] if found["type"] == "library"}
    assert libraries == {(name, version) for name, version, _ in parse_lock((LOCKS / "run.txt").read_text())}
    (compiled,) = (found for found in bill["components"] if found["type"] == "file")
    digest = hashlib.sha256((lib / compiled["name"]).read_bytes()).hexdigest()
    assert compiled["hashes"] == [{"alg": "SHA-256", "content": digest}]
    (direct,) = (found["dependsOn"] for found in bill["dependencies"] if found["ref"] == program["bom-ref"])
    assert any(name.startswith("pkg:pypi/aiohttp@") for name in direct)
    assert not any(name.startswith("pkg:pypi/aiosignal@") for name in direct), "aiohttp asks for that"
