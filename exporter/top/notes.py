"""What stands above the table because it would be wrong to read it without: what may be missing, and why. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Final, NamedTuple

from exporter.host_summary import describe_blind_spots
from exporter.top.comparison import Comparison
from exporter.untrusted_text import clean_name

MAX_NOTE: Final = 500
# A reading that takes longer than this is told.
SLOW_SECONDS: Final = 3.0


class Status(NamedTuple):
    """What is known beside the snapshots: how long the reading under way takes, and what was logged last."""

    host_name: str = ""
    reading_seconds: float = 0.0
    logged: str = ""


def find_notes(comparison: Comparison | None, status: Status) -> list[str]:
    """Return what has to be said, the most important first; a line each."""
    notes = []
    if status.reading_seconds > SLOW_SECONDS:
        notes.append(f"no news: reading the host has taken {status.reading_seconds:.0f} s so far")
    if comparison is not None:
        notes += _find_gaps(comparison)
    if status.logged:
        notes.append(status.logged)
    return [clean_name(note, MAX_NOTE) for note in notes]


def _find_gaps(comparison: Comparison) -> list[str]:
    snapshot, notes = comparison.now, []
    if not any(source.up for source in snapshot.sources):
        reasons = [f"{source.source}: {source.reason}" for source in snapshot.sources]
        notes.append(f"no source works: {'; '.join(reasons)}")
    if snapshot.blind_spots:
        notes.append(f"VMs may be missing: {describe_blind_spots(snapshot)}")
    unread = Counter(reading.counters.problem for reading in snapshot.readings if not reading.source)
    if unread:
        notes.append(f"VMs that cannot be read: {unread.total()}: {'; '.join(unread)}")
    used = {reading.source for reading in snapshot.readings}
    notes += [source.reason for source in snapshot.sources if source.up and source.reason and source.source in used]
    return notes
