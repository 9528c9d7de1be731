"""What the tests of blind agents inside the lab have in common; alerts are judged outside, where promtool is."""

from __future__ import annotations

from collections.abc import Callable

from tests.blind.claims import Truth
from tests.blind.scene import Scene, ask_beside_root, judge_sight
from tests.blind.surfaces import Answers
from tests.blind.table import ROW_PROPERTY, make_row, pack_row
from tests.blind.ways import Sees, Way

Record = Callable[[str, object], None]


def check_row(way: str, sees: Sees, truth: Truth, answers: Answers, record: Record) -> None:
    """Put a row into the report; fails where a surface claims something falsely, or the agent is less or more blind."""
    row = make_row(way, judge_sight(truth, answers), truth, answers)
    record(ROW_PROPERTY, pack_row(row))
    assert not row.wrong, row.wrong
    assert sees in (row.sees, Sees.ANY)


def check_way(way: Way, scene: Scene, record: Record) -> Answers:
    """Ask all surfaces of an agent that is blind in this way, beside root."""
    truth, answers = ask_beside_root(scene, way)
    check_row(way.name, way.sees, truth, answers, record)
    return answers
