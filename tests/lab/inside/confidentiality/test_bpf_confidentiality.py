"""lockdown=confidentiality closes kernel memory to BPF, and that is what we say."""

from __future__ import annotations

import pytest

from kvm.bpf.notify_trigger import NotifyTrigger
from kvm.counters.bpf import BpfSource
from kvm.errors import SourceUnavailable
from tests.lab.inside.conftest import LOCKDOWN

REASON = "lockdown=confidentiality: BPF may not read kernel memory"


@pytest.fixture(scope="module", autouse=True)
def locked_down() -> None:
    """Raises the state, which root may do at any time; it never falls again before the next boot."""
    if "[confidentiality]" not in LOCKDOWN.read_text(encoding="ascii"):
        LOCKDOWN.write_text("confidentiality", encoding="ascii")


def test_the_source_names_lockdown() -> None:
    with pytest.raises(SourceUnavailable) as refused:
        BpfSource().open()
    assert refused.value.reason == REASON


def test_the_trigger_names_lockdown() -> None:
    with pytest.raises(SourceUnavailable) as refused:
        NotifyTrigger(lambda call: None, function="kvm_arch_vcpu_ioctl_run").open()
    assert refused.value.reason == REASON
