"""The binding of libbpf: what it says when it fails, and that nothing of it goes to stderr."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kvm.bpf import vcpu_programs
from kvm.bpf.bpf_object import BpfObject
from kvm.bpf.libbpf import Library, open_library
from kvm.errors import SourceUnavailable


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        return open_library()
    except SourceUnavailable as err:
        pytest.skip(str(err))


def test_it_is_the_first_series(library: Library) -> None:
    assert library.version.startswith("v1.")


def test_an_absent_library_is_a_reason_with_a_remedy() -> None:
    with pytest.raises(SourceUnavailable) as refused:
        open_library("libbpf.so.99")
    assert refused.value.reason.startswith("libbpf.so.99 cannot be loaded")
    assert refused.value.remedy == "apt install libbpf1, or dnf install libbpf"


def test_messages_go_to_our_log_and_are_kept(
    library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.bpf.o"
    path.write_bytes(vcpu_programs.OBJECT.read_bytes()[:1000])
    with caplog.at_level(logging.DEBUG), pytest.raises(OSError, match="bpf_object__open_mem"):
        BpfObject(library, path)
    assert [message for message in library.messages.kept() if "is not a valid" in message or "elf" in message]
    assert len(caplog.records) >= 1
    assert capfd.readouterr() == ("", "")


def test_a_success_forgets_the_messages_of_failures(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "broken.bpf.o"
    path.write_bytes(b"\x7fELF")
    with pytest.raises(OSError, match="bpf_object__open_mem"):
        BpfObject(library, path)
    assert library.messages.kept()
    assert library.version
    assert not library.messages.kept()


def test_an_object_is_opened_without_rights_and_closed_twice(library: Library) -> None:
    opened = BpfObject(library, vcpu_programs.OBJECT)
    opened.set_entries("vcpus", 4)
    opened.skip_program("read_batch")
    with pytest.raises(OSError, match="find_program_by_name"):
        opened.skip_program("no_such_program")
    opened.close()
    opened.close()
