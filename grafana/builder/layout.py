"""The dashboard around its panels: variables, annotations, links, and where each panel stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from exporter.prometheus import metrics as m
from grafana.builder.queries import FLEET_UID, HOST_UID, VM_UID, select

Json = dict[str, Any]

DATASOURCE: Final[Json] = {"type": "prometheus", "uid": "${datasource}"}
# Grafana 10's: what is newer is brought up to date by Grafana; Grafana 9 shows it too, without colours in tables.
SCHEMA_VERSION: Final = 38
COLUMNS: Final = 24
# A unit of the grid's height in pixels, with the gap below it (Grafana's GRID_CELL_HEIGHT and GRID_CELL_VMARGIN).
GRID_GAP: Final = 8
GRID_UNIT: Final = 30 + GRID_GAP

# What the three of them have, and no other dashboard.
TAG: Final = "kvm-notify"


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel of any kind; ``number`` is its id, which stays the same wherever it is moved."""

    number: int
    kind: str
    title: str
    description: str
    width: int
    height: int
    body: Json


@dataclass(frozen=True, slots=True)
class Pile:
    """Lines of panels, one upon the other, that stand beside a higher panel; all lines are equally wide."""

    lines: Sequence[Sequence[Panel]]

    @property
    def width(self) -> int:
        """How many columns it takes."""
        return sum(panel.width for panel in self.lines[0])

    @property
    def height(self) -> int:
        """How high it is, in units of the grid."""
        return sum(max(panel.height for panel in line) for line in self.lines)


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and the panels below it.

    Those of a ``collapsed`` row are seen, and asked for, once it is opened. A row with ``repeat`` is there once for
    each chosen value of that variable.
    """

    number: int
    title: str
    panels: Sequence[Panel | Pile]
    collapsed: bool = False
    repeat: str = ""


def link_to(uid: str, title: str, **variables: str) -> Json:
    """Return a data link to another dashboard; ``variables`` are where the values come from: ``__data.fields.vm``."""
    values = "".join(f"&var-{name}=${{{source}:percentencode}}" for name, source in variables.items())
    return {"title": title, "url": f"/d/{uid}?var-datasource=${{datasource}}{values}&${{__url_time_range}}"}


def link_to_host(place: str = "__data.fields", uid: str = HOST_UID) -> Json:
    """Return a link to the host's dashboard, from a table's row or (``__field.labels``) a line of a graph."""
    return link_to(uid, "Host", job=f"{place}.job", instance=f"{place}.instance")


def link_to_vm(place: str = "__data.fields", uid: str = VM_UID) -> Json:
    """Return a link to the VM's dashboard, from a table's row or (``__field.labels``) a line of a graph."""
    return link_to(uid, "VM", job=f"{place}.job", instance=f"{place}.instance", vm=f"{place}.vm")


def render_dashboard(
    *,
    uid: str,
    title: str,
    description: str,
    time_from: str,
    variables: Sequence[Json],
    annotations: Sequence[Json],
    rows: Sequence[Row],
    refresh: str = "1m",
) -> Json:
    """Return a dashboard as Grafana imports it."""
    back = [] if uid == FLEET_UID else [_link_to_fleet()]
    return {
        "annotations": {"list": [_builtin_annotation(), *annotations]},
        "description": description,
        "editable": False,
        "fiscalYearStartMonth": 0,
        "graphTooltip": 1,
        "links": [_link_to_all(), *back],
        "liveNow": False,
        "panels": _place(rows),
        "refresh": refresh,
        "schemaVersion": SCHEMA_VERSION,
        "style": "dark",
        "tags": ["kvm", TAG],
        "templating": {"list": [_datasource_variable(), *variables]},
        "time": {"from": time_from, "to": "now"},
        "timepicker": {},
        "timezone": "",
        "title": title,
        "uid": uid,
        "version": 1,
        "weekStart": "",
    }


def job_variable() -> Json:
    """Return the choice of Prometheus jobs."""
    return _query_variable("job", "Job", f"label_values({m.HOST_INFO.name}, job)", multi=True, all_first=True)


def instance_variable(*, all_first: bool) -> Json:
    """Return the choice of hosts; with ``all_first`` it starts with all of them, else with the first one."""
    query = f'label_values({m.HOST_INFO.name}{{job=~"$job"}}, instance)'
    return _query_variable("instance", "Instance", query, multi=True, all_first=all_first)


def vm_variable() -> Json:
    """Return the choice of VMs, by whatever they are known by, with what tells ids apart: 8 digits of a UUID.

    The text starts with names, which are not unique and belong to strangers; so the value comes from the end of what
    Prometheus answers, where no name can reach.
    """
    known_by = ", ".join(f'"{label}"' for label in ("display_name", "name", "project", "vm_namespace", "short"))
    short = f'label_replace({select(m.VM_INFO)}, "short", "$1$2$3", "vm", "([0-9a-f]{{8}})-[0-9a-f-]{{27}}(.*)|(.*)")'
    query = f'query_result(max by (label, vm) (label_join({short}, "label", " ", {known_by})))'
    regex = r'/^\{label="\s*(?<text>.*)",vm="(?<value>[^"]+)"\} /'
    return _query_variable("vm", "VM", query, multi=True, all_first=False, regex=regex)


def _place(rows: Sequence[Row]) -> list[Json]:
    placed: list[Json] = []
    y = 0
    for row in rows:
        head = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        below, end = _place_panels(row.panels, y + 1)
        placed.append(
            {
                "collapsed": row.collapsed,
                "gridPos": head,
                "id": row.number,
                "panels": below if row.collapsed else [],
                "title": row.title,
                "type": "row",
                **({"repeat": row.repeat} if row.repeat else {}),
            }
        )
        if row.collapsed:
            y += 1
        else:
            placed += below
            y = end
    return placed


def _place_panels(panels: Sequence[Panel | Pile], y: int) -> tuple[list[Json], int]:
    """Return panels with their places from ``y`` on, and where they end."""
    placed: list[Json] = []
    for line in _break_lines(panels):
        placed += _place_line(line, 0, y)
        y += max(panel.height for panel in line)
    return placed, y


def _place_line(line: Sequence[Panel | Pile], x: int, y: int) -> list[Json]:
    placed: list[Json] = []
    height = max(panel.height for panel in line)
    for panel in line:
        if isinstance(panel, Pile):
            below = y
            for part in panel.lines:
                placed += _place_line(part, x, below)
                below += max(one.height for one in part)
        else:
            placed.append(_place_panel(panel, {"h": height, "w": panel.width, "x": x, "y": y}))
        x += panel.width
    return placed


def _break_lines(panels: Sequence[Panel | Pile]) -> list[list[Panel | Pile]]:
    """Return the panels by lines; those of one line are made equally high."""
    lines: list[list[Panel | Pile]] = [[]]
    for panel in panels:
        if sum(placed.width for placed in lines[-1]) + panel.width > COLUMNS:
            lines.append([])
        lines[-1].append(panel)
    return lines


def _place_panel(panel: Panel, place: Json) -> Json:
    return {
        "datasource": DATASOURCE,
        "description": panel.description,
        **panel.body,
        "gridPos": place,
        "id": panel.number,
        "pluginVersion": "10.0.0",  # without one Grafana takes it for a panel of the time before versions
        "title": panel.title,
        "type": panel.kind,
    }


def _datasource_variable() -> Json:
    return {
        "current": {},
        "hide": 0,
        "includeAll": False,
        "label": "Data source",
        "multi": False,
        "name": "datasource",
        "options": [],
        "query": "prometheus",
        "refresh": 1,
        "regex": "",
        "skipUrlSync": False,
        "type": "datasource",
    }


def _query_variable(name: str, label: str, query: str, *, multi: bool, all_first: bool, regex: str = "") -> Json:
    return {
        **({"allValue": ".+"} if multi else {}),
        "current": {"selected": True, "text": "All", "value": "$__all"} if all_first else {},
        "datasource": DATASOURCE,
        "definition": query,
        "hide": 0,
        "includeAll": all_first,
        "label": label,
        "multi": multi,
        "name": name,
        "options": [],
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "refresh": 2,  # when the time range changes: hosts and VMs come and go
        "regex": regex,
        "skipUrlSync": False,
        "sort": 5,  # by name, upper and lower case alike
        "type": "query",
    }


def _builtin_annotation() -> Json:
    return {
        "builtIn": 1,
        "datasource": {"type": "grafana", "uid": "-- Grafana --"},
        "enable": True,
        "hide": True,
        "iconColor": "rgba(0, 211, 255, 1)",
        "name": "Annotations & Alerts",
        "type": "dashboard",
    }


def _link_to_all() -> Json:
    """Return a menu of the three dashboards, which keeps what was chosen."""
    return {
        "asDropdown": True,
        "icon": "external link",
        "includeVars": True,
        "keepTime": True,
        "tags": [TAG],
        "targetBlank": False,
        "title": "KVM notify exits",
        "tooltip": "Fleet, host and VM",
        "type": "dashboards",
    }


def _link_to_fleet() -> Json:
    return {
        "asDropdown": False,
        "icon": "dashboard",
        "includeVars": False,
        "keepTime": True,
        "tags": [],
        "targetBlank": False,
        "title": "Fleet",
        "tooltip": "All hosts",
        "type": "link",
        "url": f"/d/{FLEET_UID}?var-datasource=${{datasource}}",
    }
