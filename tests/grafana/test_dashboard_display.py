"""What a person reads in the dashboards, and in which colour: values that are missing, 0, one and many."""

from __future__ import annotations

import pytest

from grafana.builder.colors import BAD, GOOD, NEUTRAL, WARN
from tests.grafana.dashboard_queries import Json, find_panels, read_dashboards
from tests.grafana.grafana_display import PLAIN_TEXT, Shown, Value, find_fields, show

FLEET, HOST, VM = "kvm-notify-fleet", "kvm-notify-host", "kvm-notify-vm"
FIELDS: list[tuple[str, str, str, Json]] = [
    (dashboard["uid"], panel["title"], title, field)
    for dashboard in read_dashboards()
    for panel in find_panels(dashboard)
    for title, field in find_fields(panel).items()
]


def find_field(uid: str, panel: str, title: str) -> Json:
    (field,) = (field for *where, field in FIELDS if where == [uid, panel, title])
    return field


@pytest.mark.parametrize(("uid", "panel", "title", "field"), FIELDS)
def test_what_is_not_known_is_neutral(uid: str, panel: str, title: str, field: Json) -> None:
    shown = show(field, None)
    assert shown.color in {NEUTRAL, PLAIN_TEXT}, f"{uid}: {panel}: {title}"
    assert shown.text


@pytest.mark.parametrize(
    ("uid", "panel", "title", "value", "wanted"),
    [
        (HOST, "Stalled vCPUs", "Stalled vCPUs", None, Shown("not known", NEUTRAL)),
        (HOST, "Stalled vCPUs", "Stalled vCPUs", 0, Shown("0", GOOD)),
        (HOST, "Stalled vCPUs", "Stalled vCPUs", 1, Shown("1", BAD)),
        (HOST, "Stalled vCPUs", "Stalled vCPUs", 64, Shown("64", BAD)),
        (HOST, "VMs not read", "VMs not read", None, Shown("no VMs, or not known", NEUTRAL)),
        (HOST, "VMs not read", "VMs not read", 2, Shown("2", WARN)),
        (FLEET, "Agents down", "Agents down", None, Shown("not known", NEUTRAL)),
        (FLEET, "Hosts", "vCPUs stalled", None, Shown("-", NEUTRAL)),
        (FLEET, "Hosts", "vCPUs stalled", 0, Shown("0", GOOD)),
        (FLEET, "Hosts", "vCPUs stalled", 3, Shown("3", BAD)),
        (FLEET, "Notify exits", "Notify exits", 36_933_157, Shown("36,933,157", "text")),
        (FLEET, "Hosts", "Notify exits", 22_932_038.4, Shown("22,932,038", "text")),
        (FLEET, "Groups of hosts", "Median per vCPU-day", 240_992.614, Shown("240,992.61", WARN)),
        (FLEET, "Groups of hosts", "Median per vCPU-day", 0.02, Shown("0.02", WARN)),
        (FLEET, "Groups of hosts", "Median per vCPU-day", 0, Shown("0.00", GOOD)),
        (FLEET, "Groups of hosts", "Median per vCPU-day", None, Shown("-", NEUTRAL)),
        (FLEET, "Agents down or blind", "State", "down", Shown("down", BAD)),
        (FLEET, "Agents down or blind", "State", "blind", Shown("blind", WARN)),
        (HOST, "VMs", "Notify exits", 0, Shown("0", "text")),
        (FLEET, "Stalled now", "Stalled for", None, Shown("-", NEUTRAL)),
        (FLEET, "Stalled now", "Stalled for", 1, Shown("1", BAD)),
        (VM, "vCPUs", "Forward progress", None, Shown("-", NEUTRAL)),
        (VM, "vCPUs", "Forward progress", 0, Shown("not stalled", GOOD)),
        (VM, "vCPUs", "Forward progress", 1, Shown("stalled", BAD)),
    ],
)
def test_value_is_seen_as(uid: str, panel: str, title: str, value: Value, wanted: Shown) -> None:
    assert show(find_field(uid, panel, title), value) == wanted


def test_a_quiet_dashboard_says_what_is_quiet() -> None:
    """Nobody can tell from seven times "nothing found" whether that is well."""
    texts = {
        (dashboard["uid"], panel["title"]): panel["fieldConfig"]["defaults"]["noValue"]
        for dashboard in read_dashboards()
        for panel in find_panels(dashboard)
    }
    assert texts[FLEET, "Stalled now"] == "no vCPU is known to be stalled"
    assert texts[HOST, "Stalled now"] == "no vCPU is known to be stalled; while the agent is down, nobody can tell"
    assert texts[FLEET, "Agents down or blind"] == "no agent is known to be down or blind"
    assert texts[FLEET, "Top VMs"] == "no VM is known to take notify exits"
    assert texts[FLEET, "Agents with problems"] == "no problem is known"
    assert not {"nothing found", "No data", ""} & set(texts.values())
