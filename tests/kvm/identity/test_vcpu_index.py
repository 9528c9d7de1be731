"""vCPUs are numbered as their VMM numbers them, or by rank where names tell nothing or lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.identity.vcpu_index import find_cpu_index, number_vcpus, parse_cgroup, parse_thread_name, read_index
from kvm.model import CpuTopology


@pytest.mark.parametrize(
    ("comm", "index"),
    [
        ("CPU 0/KVM\n", 0),
        ("CPU 127/KVM", 127),
        ("fc_vcpu 3\n", 3),
        ("vcpu11\n", 11),
        ("crosvm_vcpu1000\n", 1000),
        ("CPU /KVM", None),
        ("CPU 0/TCG", None),
        ("CPU 0/KVM\n\n", None),
        ("xCPU 0/KVM", None),
        ("vcpu999999", None),
        ("qemu-system-x86", None),
        ("", None),
    ],
)
def test_thread_names(comm: str, index: int | None) -> None:
    assert parse_thread_name(comm) == index


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("0::/machine.slice/machine-qemu\\x2d1\\x2dweb.scope/libvirt/vcpu5\n", 5),
        ("11:cpuset:/machine/qemu-1-web.libvirt-qemu/vcpu2\n1:name=systemd:/\n", 2),
        ("0::/machine.slice/machine-qemu\\x2d1\\x2dweb.scope/libvirt/emulator\n", None),
        ("0::/vcpu5/other\n", None),
        ("", None),
    ],
)
def test_cgroups(text: str, index: int | None) -> None:
    assert parse_cgroup(text) == index


@given(st.text())
def test_foreign_text_is_an_index_or_none(text: str) -> None:
    for index in (parse_thread_name(text), parse_cgroup(text)):
        assert index is None or 0 <= index < 10**5


def test_own_indexes_win_over_ranks() -> None:
    # Three cores of one thread under QEMU with two sockets: APIC ids have a hole.
    vcpus = number_vcpus([0, 1, 4], [100, 101, 102], {100: 0, 101: 1, 102: 2})
    assert [(vcpu.index, vcpu.vcpu_id, vcpu.tid) for vcpu in vcpus] == [(0, 0, 100), (1, 1, 101), (2, 4, 102)]
    assert [vcpu.index for vcpu in number_vcpus([0, 1], [100, 101], {100: 7, 101: 3})] == [7, 3]


@pytest.mark.parametrize(
    ("tids", "indexes"),
    [
        ([100, 101], {100: 0, 101: 0}),  # forged: two threads with one name
        ([100, 101], {100: 5, 101: None}),  # one thread without an index
        ([100, None], {100: 5}),  # one vCPU that never ran
        ([100, 100], {100: 5}),  # one thread for two vCPUs
    ],
)
def test_vcpu_ids_where_indexes_do_not_tell_every_vcpu_apart(
    tids: list[int | None], indexes: dict[int, int | None]
) -> None:
    assert [vcpu.index for vcpu in number_vcpus([8, 9], tids, indexes)] == [8, 9]


@pytest.mark.parametrize("plugged", [[0, 1, 2, 9], [0, 1, 2, 4, 9]])
def test_a_number_does_not_pass_to_another_vcpu_when_one_is_plugged(plugged: list[int]) -> None:
    """QEMU without debug-threads, ``-smp 3,maxcpus=9,sockets=3,cores=3,threads=1``: cpu-index 7 has APIC id 9."""
    topology = CpuTopology(dies=1, cores=3, threads=1)
    vcpus = number_vcpus(plugged, [None] * len(plugged), {}, topology)
    assert {vcpu.vcpu_id: vcpu.index for vcpu in vcpus}[9] == 7
    unknown = number_vcpus(plugged, [None] * len(plugged), {})
    assert {vcpu.vcpu_id: vcpu.index for vcpu in unknown}[9] == 9


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4))
def test_every_cpu_of_a_topology_has_its_index(sockets: int, cores: int, threads: int, dies: int) -> None:
    topology = CpuTopology(dies, cores, threads)
    widths = [(count - 1).bit_length() for count in (threads, cores, dies)]
    apic_ids = [
        (((socket << widths[2] | die) << widths[1] | core) << widths[0]) | thread
        for socket in range(sockets)
        for die in range(dies)
        for core in range(cores)
        for thread in range(threads)
    ]
    assert [find_cpu_index(apic_id, topology) for apic_id in apic_ids] == list(range(len(apic_ids)))
    assert all(find_cpu_index(hole, topology) is None for hole in set(range(max(apic_ids))) - set(apic_ids))


def test_an_index_is_read_from_the_name_and_then_from_the_cgroup(tmp_path: Path) -> None:
    task = tmp_path / "7" / "task" / "8"
    task.mkdir(parents=True)
    assert read_index(tmp_path, 7, 8) is None
    (task / "comm").write_text("qemu-system-x86\n")
    (task / "cgroup").write_text("0::/a/libvirt/vcpu4\n")
    assert read_index(tmp_path, 7, 8) == 4
    (task / "comm").write_text("CPU 2/KVM\n")
    assert read_index(tmp_path, 7, 8) == 2
