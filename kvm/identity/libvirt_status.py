"""Reads libvirt's status XML: the file in which it notes each running domain.

libvirt writes ``/run/libvirt/qemu/NAME.xml`` (mode 0600, by rename) before QEMU starts, with the pid that it gave to
QEMU and the whole domain, metadata included (qemuDomainSaveStatus in src/qemu/qemu_domain.c). Whoever may write
domains chooses most of this text. Decisions:

* expat and not a tree: only some texts are kept, each cut; elements may nest 64 deep, and a file have 256 KiB and
  16,384 elements at most: parsing one takes some 10 ms (a domain with 100 disks has 90 KiB).
* The file may lie in a container's mount namespace: no link leads out of the directory that is taken for its root, and
  what is no regular file is never opened.
* A document type is refused before anything in it is read: no entities, so none that expand or fetch files.
* The encoding is UTF-8 whatever the document says, since libvirt writes nothing else; so a document cannot choose one
  of Python's decoders.
* ``pid`` counts in the pid namespace of that libvirt: it is for the caller to compare.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from xml.parsers import expat

from kvm.errors import MalformedData
from kvm.identity.evidence import is_roots_file
from kvm.identity.root_path import open_in_root

DEPTH_LIMIT = 64
ELEMENTS_LIMIT = 16_384
TEXT_CHARACTERS = 4096
STATUS_BYTES = 256 << 10
_FILE_NAME_BYTES = 255

# nova/virt/libvirt/config.py: 1.0 and 1.1 so far
_NOVA_NAMESPACE = "http://openstack.org/xmlns/libvirt/nova/"
# pkg/virt-launcher/virtwrap/api/schema.go
_KUBEVIRT_NAMESPACE = "http://kubevirt.io"

_DOMAIN = ("domstatus", "domain")
_METADATA = (*_DOMAIN, "metadata")
_NAME = (*_DOMAIN, "name")
_UUID = (*_DOMAIN, "uuid")
_NOVA_NAME = (*_METADATA, "nova:instance", "nova:name")
_NOVA_PROJECT = (*_METADATA, "nova:instance", "nova:owner", "nova:project")
_TEXTS = frozenset({_NAME, _UUID, _NOVA_NAME, _NOVA_PROJECT})


@dataclass(frozen=True, slots=True)
class DomainStatus:
    """What a running domain's status tells; "" where it does not.

    ``project_id`` and ``project_name`` are OpenStack's project, ``display_name`` the name that its user gave to the
    instance. ``is_kubevirt`` says that KubeVirt made the domain, ``is_roots`` that file and directory are root's and
    nobody else can write them.
    """

    pid: int
    name: str
    uuid: str = ""
    project_id: str = ""
    project_name: str = ""
    display_name: str = ""
    is_kubevirt: bool = False
    is_roots: bool = False


def parse_domain_status(document: bytes, origin: str) -> DomainStatus:
    """Return what a status XML tells; raises MalformedData where it is none, with ``origin``."""
    contents = _Contents()
    parser = expat.ParserCreate("utf-8", namespace_separator=" ")
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = contents.refuse_doctype
    parser.StartElementHandler = contents.start_element
    parser.EndElementHandler = contents.end_element
    parser.CharacterDataHandler = contents.add_text
    try:
        parser.Parse(document, True)
    except expat.ExpatError as err:
        raise MalformedData(origin, f"not XML: {err}") from err
    except _RefusedError as err:
        raise MalformedData(origin, str(err)) from err
    if re.fullmatch(r"[1-9][0-9]{0,9}", contents.pid) is None:
        raise MalformedData(origin, f"no pid in <domstatus>: {contents.pid[:40]!r}")
    if not contents.texts.get(_NAME):
        raise MalformedData(origin, "no name of a domain")
    return DomainStatus(
        pid=int(contents.pid),
        name=contents.texts[_NAME],
        uuid=contents.texts.get(_UUID, ""),
        project_id=contents.project_id,
        project_name=contents.texts.get(_NOVA_PROJECT, ""),
        display_name=contents.texts.get(_NOVA_NAME, ""),
        is_kubevirt=contents.is_kubevirt,
    )


def read_domain_status(root: Path, directory: str, name: str) -> DomainStatus | None:
    """Read the status of domain ``name`` in ``directory`` below ``root``; None where there is none.

    The name may be any text. Raises OSError, and MalformedData where the file is no status.
    """
    file_name = f"{name}.xml"
    # libvirt has no domain with such a name: it calls the file by the name, and XML cannot hold U+FFFD's origins.
    if not name or "/" in name or "\0" in name or "\ufffd" in name or len(file_name.encode()) > _FILE_NAME_BYTES:
        return None
    origin = f"{root}/{directory}/{file_name}"
    found = _read_regular_file(root, directory, file_name, origin)
    return None if found is None else replace(parse_domain_status(found[0], origin), is_roots=found[1])


def _read_regular_file(root: Path, directory: str, file_name: str, origin: str) -> tuple[bytes, bool] | None:
    """Return what a file holds, and whether it and its directory are root's."""
    try:
        root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        directory_fd = open_in_root(root_fd, directory, is_directory=True)
        try:
            is_roots = is_roots_file(directory_fd)
        finally:
            os.close(directory_fd)
        file_fd = open_in_root(root_fd, f"{directory}/{file_name}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    finally:
        os.close(root_fd)
    try:
        found = os.fstat(file_fd)
        # To open a device or a FIFO can do things, or wait; O_PATH has opened nothing yet.
        if not stat.S_ISREG(found.st_mode):
            raise MalformedData(origin, "no regular file")
        if found.st_size > STATUS_BYTES:
            raise MalformedData(origin, f"{found.st_size} bytes are more than a status has")
        return read_limited(Path(f"/proc/self/fd/{file_fd}"), STATUS_BYTES), is_roots and is_roots_file(file_fd)
    finally:
        os.close(file_fd)


def read_limited(path: Path, limit: int) -> bytes:
    """Read a file up to ``limit`` bytes; proc's files come in pieces and have no size. Raises OSError."""
    pieces = []
    with path.open("rb", buffering=0) as file:
        while limit > 0 and (piece := file.read(min(limit, 1 << 16))):
            pieces.append(piece)
            limit -= len(piece)
    return b"".join(pieces)


class _RefusedError(Exception):
    """Well-formed, and still not to be read."""


class _Contents:
    """Keeps what is wanted while expat walks through a document."""

    def __init__(self) -> None:
        self.pid = ""
        self.project_id = ""
        self.is_kubevirt = False
        self.texts: dict[tuple[str, ...], str] = {}
        self._path: tuple[str, ...] = ()
        self._text: str | None = None
        self._elements = 0

    def refuse_doctype(self, *_declaration: object) -> None:
        raise _RefusedError("it declares a document type, which libvirt never does")

    def start_element(self, tag: str, attributes: dict[str, str]) -> None:
        if len(self._path) >= DEPTH_LIMIT:
            raise _RefusedError(f"elements nest more than {DEPTH_LIMIT} deep")
        self._elements += 1
        if self._elements > ELEMENTS_LIMIT:
            raise _RefusedError(f"it has more than {ELEMENTS_LIMIT} elements")
        self._path = (*self._path, _shorten_namespace(tag))
        if self._path == ("domstatus",):
            self.pid = attributes.get("pid", "")
        elif self._path[:-1] == _METADATA and self._path[-1].startswith("kubevirt:"):
            self.is_kubevirt = True
        elif self._path == _NOVA_PROJECT:
            self.project_id = self.project_id or attributes.get("uuid", "")[:TEXT_CHARACTERS]
        # The first one counts, so that nothing later in a document can take its place.
        self._text = "" if self._path in _TEXTS and self._path not in self.texts else None

    def add_text(self, text: str) -> None:
        if self._text is not None and len(self._text) < TEXT_CHARACTERS:
            self._text = (self._text + text)[:TEXT_CHARACTERS]

    def end_element(self, _tag: str) -> None:
        if self._text is not None:
            self.texts[self._path] = self._text
            self._text = None
        self._path = self._path[:-1]


def _shorten_namespace(tag: str) -> str:
    """Return an element's name with a short prefix for its namespace: ``nova:name``, ``kubevirt:uid``, ``name``."""
    namespace, space, name = tag.rpartition(" ")
    if not space:
        return name
    if namespace.startswith(_NOVA_NAMESPACE):
        return f"nova:{name}"
    return f"kubevirt:{name}" if namespace == _KUBEVIRT_NAMESPACE else f"{namespace} {name}"
