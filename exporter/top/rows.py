"""The rows of a table: VMs, vCPUs, or the statistics of one of these; found, searched and sorted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from exporter.top.comparison import Comparison, Subject
from exporter.top.view import Opened, Place, View
from kvm.model import Owner, VmReading
from kvm.statistics import StatScope


class Row(NamedTuple):
    """A VM or vCPU; or one of its statistics, ``key``."""

    subject: Subject
    key: str = ""

    @property
    def identity(self) -> Place | str:
        """What stays the same from snapshot to snapshot."""
        return self.key or find_place(self.subject)


def find_place(subject: Subject) -> Place:
    """Return which VM or vCPU it is."""
    reading, position = subject
    return Place(reading.vm.key, None if position is None else reading.vcpus[position].vcpu_id)


def find_subject(comparison: Comparison, place: Place) -> Subject | None:
    """Return what the newest snapshot has of a VM or vCPU, None if it has gone."""
    for reading in comparison.now.readings:
        if reading.vm.key == place.vm:
            if place.vcpu_id is None:
                return Subject(reading)
            positions = [at for at, vcpu in enumerate(reading.vcpus) if vcpu.vcpu_id == place.vcpu_id]
            return Subject(reading, positions[0]) if positions else None
    return None


def build_rows(view: View, comparison: Comparison) -> list[Row]:
    """Return the rows that match the search, most first; what is not known comes last."""
    opened = view.opened[-1] if view.opened else None
    if opened and opened.has_statistics:
        return _list_statistics(comparison, opened, view.search)
    rows = [Row(subject) for subject in _find_subjects(view, comparison, opened) if _matches(subject, view.search)]
    # Stable: equal ones stay in the order of the snapshot.
    return sorted(rows, key=lambda row: _rank(comparison.find_amount(row.subject, view.sort)))


def _find_subjects(view: View, comparison: Comparison, opened: Opened | None) -> Iterator[Subject]:
    for reading in comparison.now.readings:
        if opened and reading.vm.key != opened.place.vm:
            continue
        if opened or (view.all_vcpus and reading.vcpus):
            yield from (Subject(reading, position) for position in range(len(reading.vcpus)))
        else:
            yield Subject(reading)


def _list_statistics(comparison: Comparison, opened: Opened, search: str) -> list[Row]:
    subject = find_subject(comparison, opened.place)
    if subject is None:
        return []
    keys = [
        key
        for key, descriptor in comparison.statistics.items()
        if search.casefold() in key and (subject.position is None or descriptor.scope is StatScope.VCPU)
    ]

    def rank(key: str) -> tuple[tuple[bool, float], str]:
        return _rank(comparison.find_rate(subject, key)), key

    return [Row(subject, key) for key in sorted(keys, key=rank)]


def _rank(amount: float | None) -> tuple[bool, float]:
    return (True, 0.0) if amount is None else (False, -amount)


def _matches(subject: Subject, search: str) -> bool:
    if not search:
        return True
    vm = subject.reading.vm
    wanted = search.casefold()
    return any(wanted in text.casefold() for text in (vm.id, *list_names(vm.owner)))


def list_names(owner: Owner) -> Sequence[str]:
    """Return what a VM is known by, the name for people first; untrusted."""
    return [name for name in (owner.display_name, owner.name, owner.project, owner.namespace) if name]


def name_vm(reading: VmReading) -> str:
    """Return what a VM is called, untrusted."""
    return reading.vm.owner.display_name or reading.vm.owner.name or reading.vm.id
