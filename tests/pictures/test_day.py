"""What the pictures show, read by Grafana's own library from the same answers: a picture cannot say something else."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import pytest

from grafana.builder.colors import BAD, GOOD, WARN
from tests.grafana.dashboard_queries import read_dashboards
from tests.grafana.grafana_library import Cell, Reading, read_dashboard
from tests.live.history_writer import write_history
from tests.live.monitored_hosts import find_rule_files
from tests.live.prometheus_server import Prometheus, open_prometheus
from tests.pictures import day

pytestmark = pytest.mark.display

DASHBOARDS = {dashboard["uid"]: dashboard for dashboard in read_dashboards()}
# That of the components that draw the pictures.
RELEASE = "grafana-data-11"


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    directory = tmp_path_factory.mktemp("day")
    write_history(directory, find_rule_files(), day.END, day.make_day(), day.SAMPLING, alerts=True)
    with open_prometheus(directory, {}) as found:
        yield found


def read(prometheus: Prometheus, uid: str, instance: str = ".+", seconds: int = 86400) -> dict[str, Reading]:
    variables = {"datasource": "prometheus", "job": ".+", "instance": instance, "vm": day.find_stalled_vm()}
    ranges = {"__rate_interval": "4m", "__range": f"{seconds}s", "__range_s": str(seconds)}
    return read_dashboard(RELEASE, DASHBOARDS[uid], prometheus, day.END, variables, ranges=ranges)


@pytest.fixture(scope="module")
def fleet(prometheus: Prometheus) -> dict[str, Reading]:
    return read(prometheus, "kvm-notify-fleet")


def test_the_fleet_names_who_is_stuck_whose_it_is_since_when_and_where(fleet: dict[str, Reading]) -> None:
    (row,) = fleet["table Stalled now"].rows
    texts = [row[title].text for title in ("VM", "Owner", "vCPU", "Stalled for", "Exits/s of VM", "Host")]
    assert texts == ["ledger-7", "payments", "5", "42 mins", "9,100", day.STALLED_HOST]


def test_the_numbers_say_how_bad_it_is(fleet: dict[str, Reading]) -> None:
    assert fleet["Stalled vCPUs"].cells == (Cell("1", BAD),)
    assert fleet["Blind to stalls"].cells == (Cell("2", WARN),)
    assert fleet["Agents down"].cells == (Cell("1", BAD),)


def test_whoever_is_counted_is_named(fleet: dict[str, Reading]) -> None:
    rows = fleet["table Agents down or blind"].rows
    assert sorted((row["Host"].text, row["State"], row["Reason"].text) for row in rows) == [
        (day.DEAD_HOST, Cell("down", BAD), "does not answer"),
        ("kvm13.fra1:9750", Cell("blind", WARN), "no RIPs: kernel lockdown"),
        ("kvm14.fra1:9750", Cell("blind", WARN), "pid_namespace"),
    ]
    assert "" not in {row["Since"].text for row in rows} and "-" not in {row["Since"].text for row in rows}


def test_the_microcode_is_first_although_others_have_more_exits(fleet: dict[str, Reading]) -> None:
    rows = sorted(fleet["table Groups of hosts"].rows, key=lambda row: -int(row["Hosts with exits"].text))
    assert [rows[0][title].text for title in ("Microcode", "Hosts", "Hosts with exits")] == [day.NEW, "5", "5"]
    medians = {row["Microcode"].text: row["Median per vCPU-day"].text for row in rows}
    assert float(medians.pop(day.NEW)) > 1
    assert set(medians.values()) == {"0", "-"}
    exits = {row["Microcode"].text: int(row["Notify exits"].text.replace(",", "")) for row in rows}
    assert exits[day.NEW] < exits[day.OLD]
    alert = fleet["table Firing alerts"].find_row(Alert="KvmMicrocodeNotifyExits")
    assert alert["Microcode"].text == day.NEW


def test_an_alert_about_many_hosts_leads_to_the_fleet(fleet: dict[str, Reading]) -> None:
    row = fleet["table Firing alerts"].find_row(Alert="KvmMicrocodeNotifyExits")
    assert row["Host"].text == "(many hosts)"
    for cell in (row["Host"], row["VM"]):
        (link,) = cell.links
        query = parse_qs(urlsplit(link).query)
        assert urlsplit(link).path == "/d/kvm-notify-fleet"
        assert (query["var-job"], query["var-instance"]) == (["All"], ["All"])


def test_an_alert_about_a_host_and_no_vm_leads_to_the_host(fleet: dict[str, Reading]) -> None:
    row = fleet["table Firing alerts"].find_row(Alert="KvmNotifyExporterDown")
    assert {urlsplit(link).path for cell in (row["Host"], row["VM"]) for link in cell.links} == {"/d/kvm-notify-host"}


def test_the_one_that_floods_has_the_most_exits_and_is_not_stalled(fleet: dict[str, Reading]) -> None:
    rows = fleet["table Top VMs"].rows
    most = max(rows, key=lambda row: int(row["Notify exits"].text.replace(",", "")))
    assert most["VM"].text == "crawler-9"
    assert fleet["table Hosts"].find_row(Host="kvm09.fra1:9750")["vCPUs stalled"] == Cell("0", GOOD)


def test_no_0_of_a_host_is_green_that_may_be_blind(fleet: dict[str, Reading]) -> None:
    hosts = fleet["table Hosts"]
    for host in ("kvm13.fra1:9750", "kvm14.fra1:9750"):
        assert hosts.find_row(Host=host)["vCPUs stalled"].text == "-"
    problems = fleet["table Agents with problems"]
    assert problems.find_row(Host="kvm14.fra1:9750")["VMs may be missing"] == Cell("yes", BAD)


def test_a_healthy_host_looks_healthy(prometheus: Prometheus) -> None:
    shown = read(prometheus, "kvm-notify-fleet", "kvm06.fra1:9750")
    for title in ("Stalled vCPUs", "Blind to stalls", "Agents down"):
        assert shown[title].cells == (Cell("0", GOOD),)
    empty = {title: shown[title].no_value for title in shown if title.startswith("table") and not shown[title].rows}
    assert empty == {
        "table Agents down or blind": "no agent is known to be down or blind",
        "table Stalled now": "no vCPU is known to be stalled",
        "table Shortest interval between notify exits": "no interval has been seen",
        "table Top VMs": "no VM is known to take notify exits",
        "table Agents with problems": "no problem is known",
    }
    # Alerts about many hosts are shown with whatever host is chosen.
    assert {row["Host"].text for row in shown["table Firing alerts"].rows} == {"(many hosts)"}


def test_a_dead_host_says_that_its_agent_is_down(prometheus: Prometheus) -> None:
    shown = read(prometheus, "kvm-notify-host", day.DEAD_HOST, 6 * 3600)
    assert shown["Agent"].cells == (Cell("down", BAD),)
    others = {title: reading.cells for title, reading in shown.items() if reading.cells and title != "Agent"}
    assert {cell.text.removeprefix("no VMs, or ") for cells in others.values() for cell in cells} == {"not known"}
