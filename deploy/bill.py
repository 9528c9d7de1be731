"""The bill of materials of a release, as CycloneDX: the program, its compiled parts, and what it runs with."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import yaml
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

from deploy.locks import LOCKS, ROOT, find_requirements, parse_lock
from exporter.build_info import NAME

SCHEMA = SchemaVersion.V1_6


def read_dependencies() -> Mapping[str, Sequence[str]]:
    """Return what the packages depend on, by their format: there the distribution's own libraries serve."""
    overrides = yaml.safe_load((ROOT / "deploy/nfpm.yaml").read_text())["overrides"]
    return {form: tuple(override["depends"]) for form, override in overrides.items()}


def make_objects(lib: Path) -> Iterator[Component]:
    """Make a component of each file that was compiled from a source in the repository."""
    for path in sorted(lib.rglob("*.o")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        name = path.relative_to(lib).as_posix()
        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=digest)]
        yield Component(type=ComponentType.FILE, name=name, bom_ref=f"file:{name}", hashes=hashes)


def make_libraries() -> Iterator[tuple[Component, bool]]:
    """Make a component of each library as it is locked, and tell whether the program itself asks for it."""
    wanted = {re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0].lower() for text in find_requirements("")}
    for name, version, _ in parse_lock((LOCKS / "run.txt").read_text()):
        purl = PackageURL("pypi", None, name, version)
        component = Component(type=ComponentType.LIBRARY, name=name, version=version, purl=purl, bom_ref=str(purl))
        yield component, name in wanted


def render_bill(version: str, lib: Path, seconds: int) -> str:
    """Render the bill of a version, whose files are in ``lib``, as of this time: always in the same bytes."""
    packaged = [
        Property(name=f"{NAME}:{form}:depends", value=depends)
        for form, names in read_dependencies().items()
        for depends in names
    ]
    program = Component(
        type=ComponentType.APPLICATION,
        name=NAME,
        version=version,
        bom_ref=f"{NAME}@{version}",
        licenses=[DisjunctiveLicense(id="Apache-2.0")],
        properties=packaged,
    )
    objects, libraries = list(make_objects(lib)), list(make_libraries())
    bom = Bom(
        components=[*objects, *(component for component, _ in libraries)],
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"{NAME}/{version}/{seconds}"),
    )
    bom.metadata.component = program
    bom.metadata.timestamp = datetime.fromtimestamp(seconds, UTC)
    bom.register_dependency(program, [*objects, *(component for component, is_direct in libraries if is_direct)])
    return make_outputter(bom, OutputFormat.JSON, SCHEMA).output_as_string(indent=1) + "\n"
