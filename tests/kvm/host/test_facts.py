"""What the host is and offers; unknown is not no."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.errors import SourceUnavailable
from kvm.host import facts, kvm_device, lockdown
from kvm.host.private_mount import PrivateMount

FIXTURES = Path(__file__).parents[2] / "fixtures" / "host"


def test_captured_cpuinfo_gives_every_field() -> None:
    fields = facts.parse_cpuinfo((FIXTURES / "cpuinfo").read_text())
    assert {fields[name] for name in ("vendor_id", "cpu family", "model", "stepping", "microcode")} == {
        "AuthenticAMD",
        "25",
        "17",
        "1",
        "0x1000065",
    }
    assert facts.parse_vmx_flags((FIXTURES / "cpuinfo").read_text()) is None


def test_a_flag_counts_only_if_every_processor_has_it() -> None:
    text = "vmx flags\t: vnmi notify_vm_exiting\n\nvmx flags\t: vnmi preemption_timer\n"
    assert facts.parse_vmx_flags(text) == frozenset({"vnmi"})
    assert facts.parse_vmx_flags("vmx flags : vnmi notify_vm_exiting\n") == frozenset({"vnmi", "notify_vm_exiting"})


@given(st.text())
def test_untrusted_text_parses(text: str) -> None:
    facts.parse_cpuinfo(text)
    facts.parse_vmx_flags(text)
    assert " " not in lockdown.parse_lockdown(text)


@pytest.mark.parametrize(
    ("text", "mode"),
    [("[none] integrity confidentiality\n", "none"), ("none [integrity] confidentiality\n", "integrity"), ("", "")],
)
def test_lockdown(text: str, mode: str) -> None:
    assert lockdown.parse_lockdown(text) == mode


def test_a_host_without_anything_readable_is_unknown_and_not_unsupported(tmp_path: Path) -> None:
    def refuse(file_system: str) -> PrivateMount:
        raise PermissionError(file_system)

    found = facts.read_host(tmp_path, tmp_path, tmp_path / "kvm", refuse)
    assert found.notify_supported is None
    assert "does not exist" in found.notify_unknown_reason
    assert (found.cpu_vendor, found.microcode, found.lockdown, found.kvm_module) == ("", "", "", "")
    assert found.initial_pid_namespace is None
    assert "/proc/cpuinfo cannot be read" in found.cpu_unknown_reason
    assert facts.read_host().cpu_unknown_reason == ""


@pytest.mark.parametrize("text", ["", "processor : 0\n", "vendor_id :\nmodel name :\n"])
def test_a_cpuinfo_that_names_no_cpu_is_no_answer(text: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert facts.read_host(proc=tmp_path).cpu_unknown_reason == "/proc/cpuinfo does not name the CPU"


def test_a_device_that_is_not_kvm_is_not_asked_in_vain(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match="does not answer"):
        kvm_device.read_notify_supported(Path("/dev/null"))
    with pytest.raises(SourceUnavailable, match="load kvm_intel or kvm_amd"):
        kvm_device.read_notify_supported(tmp_path / "kvm")


def test_the_back_end_is_named_before_the_common_module(tmp_path: Path) -> None:
    assert kvm_device.find_kvm_module(tmp_path) == ""
    (tmp_path / "module" / "kvm").mkdir(parents=True)
    assert kvm_device.find_kvm_module(tmp_path) == "kvm"
    (tmp_path / "module" / "kvm_amd").mkdir()
    assert kvm_device.find_kvm_module(tmp_path) == "kvm_amd"


@pytest.mark.parametrize(("text", "may"), [(None, False), ("N\n", False), ("Y\n", True), ("", True), ("?", True)])
def test_tds_may_run_where_kvm_intel_does_not_say_no(text: str | None, may: bool, tmp_path: Path) -> None:
    path = tmp_path / "module" / "kvm_intel" / "parameters" / "tdx"
    path.parent.mkdir(parents=True)
    if text is not None:
        path.write_text(text)
    assert kvm_device.may_run_tds(tmp_path) is may


def test_tds_may_run_where_kvm_intel_cannot_be_asked(tmp_path: Path) -> None:
    (tmp_path / "module" / "kvm_intel" / "parameters" / "tdx").mkdir(parents=True)
    assert kvm_device.may_run_tds(tmp_path)
