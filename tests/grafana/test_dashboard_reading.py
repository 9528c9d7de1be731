"""What a person reads on the dashboards and in which colour, by Grafana's own library of three releases.

The answers are those of a real Prometheus that holds the simulated history (`tests/live/simulated_history.py`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Final
from urllib.parse import parse_qs, urlsplit

import pytest

from grafana.builder.colors import BAD, GOOD, NEUTRAL, WARN
from tests.grafana.dashboard_queries import find_panels, read_dashboards
from tests.grafana.grafana_library import RELEASES, Cell, Reading, read_dashboard
from tests.live.history_writer import JOB
from tests.live.monitored_hosts import find_rule_files
from tests.live.prometheus_server import Prometheus, open_prometheus
from tests.live.simulated_history import write_simulated_history

pytestmark = pytest.mark.display

FLEET, HOST, VM = "kvm-notify-fleet", "kvm-notify-host", "kvm-notify-vm"
DASHBOARDS: Final = {dashboard["uid"]: dashboard for dashboard in read_dashboards()}
STALLED_VM: Final = "5107a7ed-0000-4000-8000-000000000101"
TEXT: Final = ""

Read = Callable[..., dict[str, Reading]]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, float]]:
    directory, end = tmp_path_factory.mktemp("history"), float(int(time.time()))
    write_simulated_history(directory, find_rule_files(), end)
    with open_prometheus(directory, {}) as prometheus:
        yield prometheus, end


@pytest.fixture(params=RELEASES)
def read(request: pytest.FixtureRequest, history: tuple[Prometheus, float]) -> Read:
    """Reads a dashboard with one release of the library."""

    def read(uid: str, instance: str = ".+", vm: str = STALLED_VM) -> dict[str, Reading]:
        prometheus, end = history
        variables = {"datasource": "prometheus", "job": ".+", "instance": instance, "vm": vm}
        return read_dashboard(request.param, DASHBOARDS[uid], prometheus, end, variables)

    return read


def test_the_first_screen_says_how_many_and_how_bad(read: Read) -> None:
    shown = {title: reading.cells for title, reading in read(FLEET).items() if reading.cells}
    assert shown == {
        "Stalled vCPUs": (Cell("1", BAD),),
        "Blind to stalls": (Cell("4", WARN),),
        "Notify exits": (Cell("1,080", TEXT),),
        "VMs protected": (Cell("100%", TEXT),),
        "Hosts": (Cell("6", TEXT),),
        "Agents down": (Cell("2", BAD),),
    }


def test_it_names_the_hosts_where_nobody_can_tell(read: Read) -> None:
    table = read(FLEET)["table Agents down or blind"]
    assert table.find_row(Host="gone:9750")["State"] == table.find_row(Host="lost:9750")["State"] == Cell("down", BAD)
    assert table.find_row(Host="lost:9750")["Reason"].text == "no target now"
    blind = {row["Host"].text: row["Reason"].text for row in table.rows if row["State"] == Cell("blind", WARN)}
    assert blind == {
        "changed:9750": "no RIPs",
        "crowded:9750": "over_budget",
        "hidden:9750": "hidden_processes",
        "untraced:9750": "no RIPs",
    }


def test_it_names_who_is_stalled_and_leads_there(read: Read) -> None:
    for uid, instance in ((FLEET, ".+"), (HOST, "fleet-1:9750")):
        (row,) = read(uid, instance)["table Stalled now"].rows
        assert (row["VM"].text, row["Owner"].text, row["vCPU"].text) == ("guest-1", "research", "0")
        assert row["Host"].text == "fleet-1:9750"
        assert row["VM's id"].text == STALLED_VM
        (link,) = row["VM"].links
        assert urlsplit(link).path == f"/d/{VM}"
        assert parse_qs(urlsplit(link).query) == {
            "var-datasource": ["prometheus"],
            "var-job": [JOB],
            "var-instance": ["fleet-1:9750"],
            "var-vm": [STALLED_VM],
            "from": ["now-1h"],
            "to": ["now"],
        }


def test_a_known_0_is_green_and_what_nobody_knows_is_grey(read: Read) -> None:
    hosts = read(FLEET)["table Hosts"]
    stalled = {row["Host"].text: row["vCPUs stalled"] for row in hosts.rows}
    assert stalled == {
        "fleet-1:9750": Cell("1", BAD),
        "fleet-2:9750": Cell("0", GOOD),
        "fleet-3:9750": Cell("0", GOOD),
        "faulty:9750": Cell("0", GOOD),
        "untraced:9750": Cell("-", NEUTRAL),
        "changed:9750": Cell("-", NEUTRAL),
    }
    assert hosts.find_row(Host="fleet-1:9750")["Support"] == Cell("yes", GOOD)
    assert hosts.find_row(Host="changed:9750")["Support"] == Cell("-", NEUTRAL)


def test_a_dead_host_is_a_problem_and_no_host_of_now(read: Read) -> None:
    fleet = read(FLEET)
    problems = fleet["table Agents with problems"]
    for host in ("gone:9750", "lost:9750"):
        assert problems.find_row(Host=host)["Down"] == Cell("yes", BAD)
        assert host not in {row["Host"].text for row in fleet["table Hosts"].rows}
    assert problems.find_row(Host="faulty:9750")["Down"] == Cell("-", NEUTRAL)
    assert problems.find_row(Host="faulty:9750")["Collectors that fail"].text == "1"
    dead = read(HOST, "gone:9750")
    cells = [cell for reading in dead.values() for cell in reading.cells]
    assert {(cell.text.removeprefix("no VMs, or "), cell.color) for cell in cells} == {("not known", NEUTRAL)}
    assert [title for title, reading in dead.items() if reading.rows] == []


def test_a_host_that_cannot_see_stalls_does_not_look_healthy(read: Read) -> None:
    shown = read(HOST, "untraced:9750")
    assert shown["Stalled vCPUs"].cells == (Cell("not known", NEUTRAL),)
    assert shown["VMs"].cells == (Cell("2", TEXT),)
    assert read(HOST, "faulty:9750")["Stalled vCPUs"].cells == (Cell("0", GOOD),)


@pytest.mark.parametrize("uid", [FLEET, HOST, VM])
def test_where_there_is_nothing_nothing_is_green(read: Read, uid: str) -> None:
    for title, reading in read(uid, "nobody", "no-such-vm").items():
        if title == "table Firing alerts":  # those of a whole fleet have no host
            continue
        assert reading.rows == ()
        assert {cell.color for cell in reading.cells} <= {NEUTRAL}, title
        assert all("known" in cell.text for cell in reading.cells), title
        assert reading.cells or reading.no_value, title


def test_a_green_base_would_be_seen(history: tuple[Prometheus, float]) -> None:
    """What is read is what the library makes of the file: of a worse one, something worse."""
    dashboard = copy.deepcopy(DASHBOARDS[FLEET])
    (panel,) = (panel for panel in find_panels(dashboard) if panel["title"] == "Stalled vCPUs")
    panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["color"] = GOOD
    variables = {"datasource": "prometheus", "job": ".+", "instance": "nobody"}
    shown = read_dashboard(RELEASES[0], dashboard, *history, variables)
    assert shown["Stalled vCPUs"].cells == (Cell("not known", GOOD),)


def test_a_vm_is_described_with_units(read: Read) -> None:
    shown = read(VM, "fleet-1:9750")
    assert shown["Stalled vCPUs"].cells == (Cell("1", BAD),)
    assert shown["Window"].cells == (Cell("128,000", TEXT),)
    assert shown["Guest time lost"].cells == (Cell("198 ms", TEXT),)
    (row,) = shown["table vCPUs"].rows
    assert row["Forward progress"] == Cell("stalled", BAD)
    (row,) = shown["table Who it is"].rows
    assert (row["Name"].text, row["Owner"].text) == ("guest-1", "research")


def test_an_alert_has_its_severity_in_words_and_colour(read: Read) -> None:
    alerts = read(FLEET)["table Firing alerts"]
    row = alerts.find_row(Alert="KvmMicrocodeUpdateNotifyExits")
    assert row["Severity"] == Cell("ticket", WARN)
    assert row["Host"].text == "fleet-1:9750"


@pytest.mark.parametrize(("uid", "instance"), [(FLEET, ".+"), (HOST, "fleet-1:9750"), (VM, "fleet-1:9750")])
def test_every_variable_of_every_link_is_resolved(
    read: Read, uid: str, instance: str, tell: Callable[[str], None]
) -> None:
    links = [
        (cell.text, link)
        for reading in read(uid, instance).values()
        for row in reading.rows
        for cell in row.values()
        for link in cell.links
    ]
    tell(f"{uid}: {len(links)} links resolve")
    assert links
    for text, link in links:
        assert "$" not in link
        assert urlsplit(link).path.removeprefix("/d/") in DASHBOARDS
        query = parse_qs(urlsplit(link).query, keep_blank_values=True)
        empty = [name for name, values in query.items() if values == [""]]
        # An alert about a host, or about many, is about no VM, and leads to no VM's dashboard.
        assert empty == (["var-vm"] if text == "-" and urlsplit(link).path != f"/d/{VM}" else []), link
