"""The simulated day: fifteen hosts, on which much goes wrong at once.

================= ===================================================================================================
``kvm01``-``05``  a microcode since 14 hours, since when all their guests take a few notify exits
``kvm06`` ``10``  nothing
``kvm07``         a guest has been stuck for 42 minutes; another one was for four minutes, three hours ago
``kvm08``         its agent has been dead for three hours
``kvm09``         a guest floods: it takes very many notify exits, and makes progress
``kvm11`` ``12``  cannot have notify exits: an older Intel CPU, and AMD
``kvm13``         counts notify exits and cannot have their RIPs, so nobody knows whether a guest is stuck
``kvm14``         its agent runs in a container's pid namespace and does not see every VM
``kvm15``         a VMM that does not ask for notify exits
================= ===================================================================================================
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Final

from kvm.model import Protection
from tests.live.history_writer import Sampling, Series
from tests.live.simulated_fleet import Host, Spell, Vm, make_series, make_uuid

# The whole day, and what rates and sums over a day ask for besides.
SAMPLING: Final = Sampling(hours=27.0)
END: Final = 1_773_930_000.0  # 2026-03-19, 14:20 UTC
OLD, NEW = "0x2b000643", "0x2b000661"
NEW_SINCE: Final = -14.0
FOREVER: Final = 1.0
INTEL: Final = {
    "cpu_vendor": "GenuineIntel",
    "cpu_family": "6",
    "kvm_module": "kvm_intel",
    "kernel": "6.8.0-48-generic",
}
SAPPHIRE_RAPIDS: Final = INTEL | {
    "cpu_model": "143",
    "cpu_stepping": "8",
    "cpu_model_name": "Intel(R) Xeon(R) Platinum 8480+",
}
EMERALD_RAPIDS: Final = INTEL | {
    "cpu_model": "207",
    "cpu_stepping": "2",
    "cpu_model_name": "INTEL(R) XEON(R) PLATINUM 8592+",
}
ICE_LAKE: Final = INTEL | {
    "cpu_model": "106",
    "cpu_stepping": "6",
    "cpu_model_name": "Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz",
}
GENOA: Final = {
    "cpu_vendor": "AuthenticAMD",
    "cpu_family": "25",
    "cpu_model": "17",
    "cpu_stepping": "1",
    "cpu_model_name": "AMD EPYC 9654 96-Core Processor",
    "kvm_module": "kvm_amd",
    "kernel": "6.1.0-26-amd64",
}
# By owner: what its VMs do. Two are projects of OpenStack, one a namespace of KubeVirt.
OWNERS: Final = (("payments", "ledger"), ("web-shop", "cart"), ("research", "crawler"), ("ci", "runner"))
VCPUS: Final = (8, 16, 4, 8, 8, 4)
STALLED: Final = (7, 0, "ledger-7")
FLOODING: Final = (9, 2, "crawler-9")
STALLED_HOST: Final = "kvm07.fra1:9750"
# What the choice of VMs shows of it: names, owner and eight digits of its id.
STALLED_VM_TEXT: Final = "ledger-7"
DEAD_HOST: Final = "kvm08.fra1:9750"

Spells = Mapping[tuple[int, int], Mapping[int, list[Spell]]]


def _find_spells(chance: random.Random) -> Spells:
    """What happens, by the numbers of host and VM, and by vCPU."""
    found: dict[tuple[int, int], dict[int, list[Spell]]] = {
        STALLED[:2]: {5: [Spell(-0.7, FOREVER, 9100, stalled=True)]},
        FLOODING[:2]: {1: [Spell(-5.2, FOREVER, 4300)]},
        (7, 1): {3: [Spell(-3.1, -3.1 + 4 / 60, 8900, stalled=True)]},
    }
    for host in range(1, 6):
        for vm, vcpus in enumerate(VCPUS):
            spells = found.setdefault((host, vm), {})
            for _ in range(chance.randint(3, 7)):
                start = chance.uniform(NEW_SINCE + 0.2, -0.2)
                spells.setdefault(chance.randrange(vcpus), []).append(Spell(start, start + 1 / 60, 0.05))
    return found


def _make_vm(host: int, number: int, protection: Protection, spells: Mapping[int, list[Spell]], vm: str) -> Vm:
    owner, does = OWNERS[number % len(OWNERS)]
    suffix = f"{host}" if number < len(OWNERS) else f"{host}b"
    names = {"uuid": vm, "name": f"{does}-{suffix}", "vm_namespace": owner}
    if owner != "ci":
        names = {"uuid": vm, "name": f"instance-{vm[:8]}", "display_name": f"{does}-{suffix}", "project": owner}
    return Vm(vm, "qemu", VCPUS[number], -24.0 * (3 + host + number), names, protection, spells)


def _make_vms(host: int, supported: bool, spells: Spells, chance: random.Random) -> Iterator[Vm]:
    for number in range(len(VCPUS)):
        uuid = make_uuid(chance)
        state = Protection.ARMED if supported else Protection.UNSUPPORTED
        if host == 15 and number >= 4:  # a VMM that does not ask for them
            yield Vm(f"fc-{uuid[:8]}", "firecracker", VCPUS[number], -30.0, {"uid": "1001"}, Protection.OFF)
        else:
            yield _make_vm(host, number, state, spells.get((host, number), {}), uuid)


def _make_host(number: int, spells: Spells, chance: random.Random) -> Host:
    always = (-SAMPLING.hours, FOREVER)
    cpu, microcodes = SAPPHIRE_RAPIDS, [(OLD, *always)]
    if number <= 5:
        microcodes = [(OLD, -SAMPLING.hours, NEW_SINCE), (NEW, NEW_SINCE, FOREVER)]
    elif number in (9, 10, 15):
        cpu, microcodes = EMERALD_RAPIDS, [("0x21000291", *always)]
    elif number == 11:
        cpu, microcodes = ICE_LAKE, [("0xd0003e7", *always)]
    elif number == 12:
        cpu, microcodes = GENOA, [("0xa101148", *always)]
    supported = number not in (11, 12)
    return Host(
        f"kvm{number:02}.fra1:9750",
        cpu,
        microcodes,
        tuple(_make_vms(number, supported, spells, chance)),
        supported=supported,
        traceable=number != 13,
        blind_spot="pid_namespace" if number == 14 else "",
        gone=-3.0 if number == 8 else FOREVER,
        lockdown="confidentiality" if number == 13 else "integrity" if number % 2 else "none",
        every_vcpu=number == 7,
        version="0.9.0" if number in (11, 12) else "1.0.0",
    )


def make_hosts() -> list[Host]:
    """Return the hosts, always the same."""
    chance = random.Random(13)
    spells = _find_spells(chance)
    return [_make_host(number, spells, chance) for number in range(1, 16)]


def make_day() -> Iterator[Series]:
    """Yield every series of the day."""
    for host in make_hosts():
        yield from make_series(host, END)


def find_stalled_vm() -> str:
    """Return the id of the VM that is stuck at the end of the day."""
    host, number, _name = STALLED
    return make_hosts()[host - 1].vms[number].vm
