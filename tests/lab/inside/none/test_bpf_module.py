"""What BPF programs mean for the kvm module: who holds it, and what happens when it is loaded anew."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm.bpf.notify_trigger import NotifyTrigger
from kvm.counters.bpf import BpfSource
from kvm.errors import SourceUnavailable
from tests.live import open_guest_process

MODULES = ("kvm", "kvm-amd", "notify_inject")


def insert(name: str) -> None:
    subprocess.run(["insmod", f"/lab/modules/{name}.ko"], check=True)


def remove(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["rmmod", name], check=False, capture_output=True, text=True)


def is_loaded(name: str) -> bool:
    return Path("/sys/module", name.replace("-", "_")).exists()


@pytest.fixture(autouse=True)
def without_injector() -> Iterator[None]:
    """The injector uses kvm too; what was loaded before is loaded after."""
    loaded = [name for name in MODULES if is_loaded(name)]
    if "notify_inject" in loaded:
        remove("notify_inject").check_returncode()
    yield
    for name in loaded:
        if not is_loaded(name):
            insert(name)


@pytest.fixture
def source() -> Iterator[BpfSource]:
    source = BpfSource()
    source.open()
    yield source
    source.close()


def test_an_attached_trigger_holds_the_module_until_it_is_closed() -> None:
    trigger = NotifyTrigger(lambda call: None, function="kvm_arch_vcpu_ioctl_run")
    assert trigger.open().attached
    remove("kvm_amd").check_returncode()
    assert remove("kvm").returncode != 0
    trigger.close()
    remove("kvm").check_returncode()


def test_an_open_source_does_not_hold_it_and_finds_it_again(source: BpfSource) -> None:
    source.read()
    for name in ("kvm_amd", "kvm"):
        remove(name).check_returncode()
    with pytest.raises(SourceUnavailable, match="KVM is not loaded"):
        source.read()
    for name in ("kvm", "kvm-amd"):
        insert(name)
    with open_guest_process(vcpus=1, port_writes=1) as guest:
        assert [key.pid for key in source.read()] == [guest.pid]
        assert source.method == "list"


def test_without_its_vendor_module_kvm_has_no_device_to_learn_from_until_it_comes() -> None:
    remove("kvm_amd").check_returncode()
    source = BpfSource()
    source.open()
    assert (source.method, source.read()) == ("names", {})
    assert "/dev/kvm" in source.method_reason
    insert("kvm-amd")
    with open_guest_process(vcpus=1, port_writes=1) as guest:
        assert [key.pid for key in source.read()] == [guest.pid]
        assert source.method == "list"
    source.close()
