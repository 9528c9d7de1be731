"""Decides in which of its four states the notify exits of a VM are. Pure."""

from __future__ import annotations

from kvm import abi
from kvm.model import Protection


def judge_protection(notify_supported: bool | None, notify_flags: int | None) -> Protection:
    """Tell whether a VM's notify exits are on, from what KVM offers and from the VM's ``notify_vmexit_flags``.

    Flags that are clear mean "off" only where KVM could: where it cannot be asked, the CPU may have no notify exits.
    """
    if notify_supported is False:
        return Protection.UNSUPPORTED
    if notify_flags is None:
        return Protection.UNKNOWN
    if notify_flags & abi.NotifyVmexitFlags.KVM_X86_NOTIFY_VMEXIT_ENABLED:
        return Protection.ARMED
    return Protection.OFF if notify_supported else Protection.UNKNOWN
