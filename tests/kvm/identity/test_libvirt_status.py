"""libvirt's status XML, real and hostile."""

from __future__ import annotations

import os
import re
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.errors import MalformedData
from kvm.identity.libvirt_status import (
    DEPTH_LIMIT,
    STATUS_BYTES,
    TEXT_CHARACTERS,
    DomainStatus,
    parse_domain_status,
    read_domain_status,
)

# Files of a test belong to whoever runs it.
IS_ROOT = os.geteuid() == 0
FIXTURES = Path(__file__).parents[2] / "fixtures" / "owners"
UUID = "6c1b3a86-60c5-4d0a-9b22-1d7c5d8f6a01"


def read_fixture(name: str) -> bytes:
    return (FIXTURES / name / "status.xml").read_bytes()


def domstatus(inside: str, attributes: str = "pid='7'") -> bytes:
    return f"<domstatus {attributes}><domain><name>n</name>{inside}</domain></domstatus>".encode()


def test_openstack_domain() -> None:
    document = read_fixture("libvirt-openstack")
    pid = re.search(rb" pid='(\d+)'", document)
    assert pid is not None
    assert parse_domain_status(document, "f") == DomainStatus(
        pid=int(pid[1]),
        name="instance-0000002a",
        uuid=UUID,
        project_id="0f5b5f7d2a6e4d55a1d0d25a7e6f0002",
        project_name="payments",
        display_name='web "blue" & co',
    )


def test_kubevirt_domain() -> None:
    status = parse_domain_status(read_fixture("libvirt-kubevirt"), "f")
    assert (status.name, status.is_kubevirt, status.project_id) == ("shop_cart-7", True, "")


def test_domain_without_metadata() -> None:
    status = parse_domain_status(read_fixture("libvirt"), "f")
    assert (status.name, status.uuid, status.is_kubevirt) == ("under_score", UUID, False)


def test_older_nova_namespace_and_a_kubevirt_element_of_another_name() -> None:
    metadata = (
        '<metadata><x:instance xmlns:x="http://openstack.org/xmlns/libvirt/nova/1.0"><x:owner>'
        '<x:project uuid="p">q</x:project></x:owner></x:instance><graceperiod xmlns="http://kubevirt.io"/></metadata>'
    )
    status = parse_domain_status(domstatus(metadata), "f")
    assert (status.project_id, status.project_name, status.is_kubevirt) == ("p", "q", True)


@pytest.mark.parametrize(
    "inside",
    [
        "<metadata><instance><owner><project uuid='p'>q</project></owner></instance></metadata>",
        "<kubevirt xmlns='http://kubevirt.io'/>",
        "<metadata><a><kubevirt xmlns='http://kubevirt.io'/></a></metadata>",
        "<metadata><kubevirt xmlns='http://kubevirt.io.example'/></metadata>",
        "<devices><name>other</name></devices><name>second</name>",
    ],
)
def test_looks_alike_and_is_not(inside: str) -> None:
    assert parse_domain_status(domstatus(inside), "f") == DomainStatus(pid=7, name="n")


BILLION_LAUGHS = (
    b"<!DOCTYPE d [<!ENTITY a 'ha'>"
    + b"".join(b"<!ENTITY %c '%s'>" % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(9))
    + b"]><domstatus pid='7'><domain><name>&j;</name></domain></domstatus>"
)
EXTERNAL = b"""<!DOCTYPE d [<!ENTITY e SYSTEM "file:///etc/passwd">]>
<domstatus pid='7'><domain><name>&e;</name></domain></domstatus>"""


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"", "not XML"),
        (b"\0\0\0", "not XML"),
        (read_fixture("libvirt")[:-20], "not XML"),
        (b"<domstatus pid='7'><domain><name>\xff\xfe</name></domain></domstatus>", "not XML"),
        (b"<?xml version='1.0' encoding='rot13'?>" + domstatus("")[:-1], "not XML"),
        (b"<domstatus pid='7'><domain><name>&nbsp;</name></domain></domstatus>", "not XML"),
        (BILLION_LAUGHS, "document type"),
        (EXTERNAL, "document type"),
        (b"<!DOCTYPE domstatus SYSTEM 'http://127.0.0.1:1/x.dtd'>" + domstatus(""), "document type"),
        (domstatus("<a>" * DEPTH_LIMIT + "</a>" * DEPTH_LIMIT), "deep"),
        (domstatus("", ""), "no pid"),
        (domstatus("", "pid='-7'"), "no pid"),
        (domstatus("", "pid='\u0667'"), "no pid"),
        (domstatus("", f"pid='{'7' * 4000}'"), "no pid"),
        (b"<domain><name>n</name></domain>", "no pid"),
        (b"<domstatus pid='7'><domain/></domstatus>", "no name"),
    ],
)
def test_what_makes_no_sense_is_refused(document: bytes, reason: str) -> None:
    with pytest.raises(MalformedData, match=reason) as caught:
        parse_domain_status(document, "that file")
    assert caught.value.origin == "that file"
    assert len(str(caught.value)) < 500


def test_no_declaration_chooses_a_decoder() -> None:
    document = b"<?xml version='1.0' encoding='latin-1'?>" + domstatus(f"<uuid>{'ü'}</uuid>")
    assert parse_domain_status(document, "f").uuid == "ü"


def test_long_texts_are_cut() -> None:
    status = parse_domain_status(domstatus(f"<uuid>{'x' * 100_000}</uuid>"), "f")
    assert len(status.uuid) == TEXT_CHARACTERS


@given(st.binary(max_size=300))
def test_any_bytes_are_a_status_or_malformed(document: bytes) -> None:
    try:
        parse_domain_status(document, "f")
    except MalformedData as err:
        assert err.origin == "f"


MARKUP = st.sampled_from(
    "<domstatus pid='7'>|</domstatus>|<domain>|</domain>|<name>|</name>|<metadata>|</metadata>|<!DOCTYPE x [|]>|"
    "<!ENTITY a 'b'>|&a;|&amp;|<![CDATA[|]]>|<!--|-->|<?x?>|text|\x01|<a xmlns='http://kubevirt.io'>|</a>|'|>|é".split(
        "|"
    )
)


@given(st.lists(MARKUP, max_size=30).map("".join))
def test_any_markup_is_a_status_or_malformed(document: str) -> None:
    try:
        status = parse_domain_status(document.encode(), "f")
    except MalformedData:
        return
    assert status.pid == 7
    assert status.name


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn"]), min_size=1, max_size=200))
def test_any_name_comes_back(name: str) -> None:
    document = f"<domstatus pid='7'><domain><name>{escape(name)}</name></domain></domstatus>"
    assert parse_domain_status(document.encode(), "f").name == name


def test_read_finds_the_file_of_that_name_only(tmp_path: Path) -> None:
    (tmp_path / "qemu").mkdir()
    (tmp_path / "qemu" / "n.xml").write_bytes(domstatus(""))
    assert read_domain_status(tmp_path, "qemu", "n") == DomainStatus(pid=7, name="n", is_roots=IS_ROOT)
    assert read_domain_status(tmp_path, "nowhere", "n") is None
    assert read_domain_status(tmp_path / "nowhere", "qemu", "n") is None
    assert read_domain_status(tmp_path, "qemu/n.xml", "n") is None


@pytest.mark.parametrize("name", ["", "../out", "qemu/n", "/etc/passwd", "n\0", "n\ufffd", "x" * 252, "ü" * 126])
def test_names_that_are_no_file_names_are_not_looked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "out.xml").write_bytes(b"not to be read")
    (tmp_path / "qemu").mkdir()
    assert read_domain_status(tmp_path, "qemu", name) is None


def test_links_stay_below_the_root(tmp_path: Path) -> None:
    outside = tmp_path / "secret.xml"
    outside.write_bytes(domstatus(""))
    root = tmp_path / "root"
    (root / "run").mkdir(parents=True)
    (root / "run" / "absolute.xml").symlink_to(outside)
    (root / "run" / "up.xml").symlink_to("../../secret.xml")
    assert read_domain_status(root, "run", "absolute") is None
    assert read_domain_status(root, "run", "up") is None
    # Within the root a link is as good as a file, also an absolute one: /var/run is such a link.
    (root / "secret.xml").write_bytes(domstatus("<uuid>inner</uuid>"))
    (root / "var").mkdir()
    (root / "var" / "run").symlink_to("/run")
    (root / "run" / "inner.xml").symlink_to("/secret.xml")
    assert read_domain_status(root, "var/run", "inner") == DomainStatus(pid=7, name="n", uuid="inner", is_roots=IS_ROOT)


def test_no_fifo_and_no_directory_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.xml")
    (tmp_path / "directory.xml").mkdir()
    for name in ("fifo", "directory"):
        with pytest.raises(MalformedData, match="no regular file"):
            read_domain_status(tmp_path, ".", name)


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "big.xml").open("wb") as file:
        file.truncate(STATUS_BYTES + 1)
    with pytest.raises(MalformedData, match="more than a status has"):
        read_domain_status(tmp_path, ".", "big")


def test_reading_leaves_no_file_open(tmp_path: Path) -> None:
    (tmp_path / "n.xml").write_bytes(domstatus(""))
    (tmp_path / "bad.xml").write_bytes(b"<")
    (tmp_path / "dir.xml").mkdir()
    before = os.listdir("/proc/self/fd")
    read_domain_status(tmp_path, ".", "n")
    read_domain_status(tmp_path, ".", "absent")
    for name in ("bad", "dir"):
        with pytest.raises(MalformedData):
            read_domain_status(tmp_path, ".", name)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.skipif(not IS_ROOT, reason="only root can make files of root's")
@pytest.mark.parametrize("which", ["file", "directory"])
@pytest.mark.parametrize("how", ["another's", "group can write", "all can write"])
def test_a_file_that_others_can_write_is_not_roots(tmp_path: Path, which: str, how: str) -> None:
    directory = tmp_path / "qemu"
    directory.mkdir()
    file = directory / "n.xml"
    file.write_bytes(domstatus(""))
    found = read_domain_status(tmp_path, "qemu", "n")
    assert found is not None
    assert found.is_roots
    path = file if which == "file" else directory
    if how == "another's":
        os.chown(path, 64055, 64055)
    else:
        path.chmod(0o770 if how == "group can write" else 0o707)
    found = read_domain_status(tmp_path, "qemu", "n")
    assert found is not None
    assert not found.is_roots


@pytest.mark.parametrize(
    "document",
    [
        domstatus("<metadata " + " ".join(f"a{number}='1'" for number in range(60_000)) + "/>"),
        domstatus("<a/>" * 20_000),
    ],
    ids=["too many attributes", "too many elements"],
)
def test_a_status_that_costs_too_much_is_refused(tmp_path: Path, document: bytes) -> None:
    (tmp_path / "qemu").mkdir()
    (tmp_path / "qemu" / "n.xml").write_bytes(document)
    with pytest.raises(MalformedData, match="more than"):
        read_domain_status(tmp_path, "qemu", "n")
