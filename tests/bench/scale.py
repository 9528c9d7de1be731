"""``make scale``: rules and dashboards on a real Prometheus with 300 hosts and 50,000 VMs, beside simple queries.

Prometheus scrapes 300 simulated agents (`large_fleet`) each 15 s, so its head holds every series; a day of what rules
and dashboards read over hours stands in blocks. It evaluates the rules as they are shipped, and counts iterations that
it misses. Then each query of the dashboards is asked as Grafana asks it, three times, and the fastest counts: on a
machine that is shared the others tell how busy that was. Beside them stand queries as any dashboard of node_exporter
has them, in the same run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from exporter.prometheus import metrics as m
from grafana.builder.queries import UP
from tests.agents import ROOT
from tests.bench.large_fleet import LARGEST_HOST_VMS, make_host, make_hosts
from tests.grafana.dashboard_queries import find_panels, read_dashboards, substitute
from tests.live.history_writer import JOB, Sampling, Series, write_history
from tests.live.monitored_hosts import find_rule_files
from tests.live.prometheus_server import Prometheus, open_prometheus
from tests.live.simulated_fleet import Host, make_series
from tests.pictures.answers import View

SCRAPE_SECONDS: Final = 15
# So that rates over 5 minutes are whole, and rules have been evaluated some times.
LIVE_SECONDS: Final = 7 * 60
# More often than any group is evaluated, as Prometheus tells of the last evaluation alone.
EVALUATIONS_SECONDS: Final = 5
ASKED: Final = 3
MISSED: Final = r'^prometheus_rule_group_iterations_missed_total\{rule_group="[^;]*;([^"]+)"\} (\S+)'
SLOWEST: Final = 6
HISTORY: Final = Sampling(hours=25.0, step_seconds=120)
# What is read over hours: of every host, and of the VMs that take notify exits or are on the largest host.
OF_HOSTS: Final = (
    UP,
    m.HOST_INFO,
    m.HOST_NOTIFY_WINDOW_EXITS,
    m.HOST_VMS,
    m.HOST_VCPUS,
    m.HOST_NO_PROGRESS,
    m.COMPLETE,
)
OF_VMS: Final = (m.VM_INFO, m.VM_NOTIFY_WINDOW_EXITS, m.VM_NOTIFY_WINDOW, m.VM_SOURCE_INFO, m.VCPU_NO_PROGRESS)
BASELINES: Final = {
    "count(up)": "count(up)",
    "rates of 300 hosts, now": "sum by (instance) (rate(kvm_host_notify_window_exits_total[5m]))",
    "rates of 200,000 vCPUs, now": "sum by (instance) (rate(kvm_vcpu_exits_total[5m]))",
}


@dataclass(frozen=True)
class Timing:
    """How long a question took at best, in seconds, and how many series it found."""

    place: str
    seconds: float
    found: int


def make_history(hosts: int, vms: int, end: float) -> Iterator[Series]:
    """Yield the series of the day before."""
    for number, host in enumerate(make_hosts(hosts, vms)):
        counted = {vm.vm for vm in host.vms if vm.spells or number == 0}
        for series in make_series(host, end):
            if series.metric in OF_HOSTS or (series.metric in OF_VMS and series.labels["vm"] in counted):
                yield series


@contextmanager
def open_agents(hosts: int, vms: int, end: float) -> Iterator[tuple[int, int]]:
    """Serve the simulated agents; their port and how many series they have."""
    words = [sys.executable, "-m", "tests.bench.large_fleet", str(hosts), str(vms), str(end)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port, series = process.stdout.readline().split()
            yield int(port), int(series)
        finally:
            process.terminate()


def build_config(port: int, hosts: int) -> dict[str, Any]:
    """A Prometheus that scrapes the agents and evaluates the rules as they are shipped."""
    interval = f"{SCRAPE_SECONDS}s"
    targets = [
        {
            "targets": [f"127.0.0.1:{port}"],
            "labels": {"instance": f"kvm{number:04}:9750", "__metrics_path__": f"/{number}"},
        }
        for number in range(hosts)
    ]
    return {
        "global": {"scrape_interval": interval, "evaluation_interval": "1m"},
        "rule_files": [str(path) for path in find_rule_files()],
        "scrape_configs": [{"job_name": JOB, "static_configs": targets}],
    }


def ask(prometheus: Prometheus, place: str, *parameters: tuple[str, str]) -> Timing:
    """Ask a question some times; raises ServerError where it fails."""
    path = "query_range" if len(parameters) > 2 else "query"
    times, found = [], 0
    for _ in range(ASKED):
        started = time.perf_counter()
        found = len(prometheus.ask(path, *parameters)["result"])
        times.append(time.perf_counter() - started)
    return Timing(place, min(times), found)


def ask_dashboards(prometheus: Prometheus, largest: Host, now: float) -> Iterator[tuple[str, list[Timing]]]:
    """Yield each dashboard with the times of its panels' queries, as Grafana asks them; collapsed rows are left out."""
    choices = {
        "kvm-notify-fleet": {},
        "kvm-notify-host": {"instance": largest.instance},
        "kvm-notify-vm": {"instance": largest.instance, "vm": largest.vms[1].vm},
    }
    for dashboard in read_dashboards():
        view = View(dashboard, now, choices[dashboard["uid"]])
        values = view.find_values() | {"__rate_interval": f"{max(view.step + SCRAPE_SECONDS, 4 * SCRAPE_SECONDS)}s"}
        hidden = {panel["id"] for row in dashboard["panels"] for panel in row.get("panels", ())}
        timings = []
        for panel in find_panels(dashboard):
            for target in () if panel["id"] in hidden else panel["targets"]:
                times = [("time", f"{now:.3f}")]
                if not target["instant"]:
                    start = f"{now - view.seconds:.3f}"
                    times = [("start", start), ("end", f"{now:.3f}"), ("step", str(view.step))]
                question = ("query", substitute(target["expr"], values))
                timings.append(ask(prometheus, f"{panel['title']} {target['refId']}", question, *times))
        yield dashboard["uid"], timings


def ask_rules(prometheus: Prometheus, now: float) -> Iterator[tuple[str, float, float, int]]:
    """Yield each group: its name, interval, how long its rules take together when asked, and iterations missed."""
    text = prometheus.server.fetch("/metrics")[1].decode()
    missed = dict(re.findall(MISSED, text, re.MULTILINE))
    for group in prometheus.ask("rules")["groups"]:
        seconds = sum(
            ask(prometheus, rule["name"], ("query", rule["query"]), ("time", f"{now:.3f}")).seconds
            for rule in group["rules"]
        )
        yield group["name"], group["interval"], seconds, int(float(missed[group["name"]]))


def watch_rules(prometheus: Prometheus, seconds: float) -> dict[str, list[float]]:
    """Wait, and return how long each evaluation of each group took."""
    found: dict[str, dict[str, float]] = {}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(EVALUATIONS_SECONDS)
        for group in prometheus.ask("rules")["groups"]:
            found.setdefault(group["name"], {})[group["lastEvaluation"]] = group["evaluationTime"]
    return {name: [took for at, took in times.items() if not at.startswith("0001")] for name, times in found.items()}


def report(title: str, rows: Sequence[Sequence[object]]) -> None:
    print(f"\n{title}")
    for row in rows:
        print("  " + "  ".join(f"{cell:>8.3f}" if isinstance(cell, float) else f"{cell!s}" for cell in row))


def measure(prometheus: Prometheus, hosts: int, largest: Host, live_seconds: float) -> None:
    """Print all times."""
    evaluations = watch_rules(prometheus, live_seconds)
    health = [rule for rule in prometheus.find_rules() if rule["health"] == "err"]
    scraped = prometheus.query("count(up == 1)")[0]["value"][1]
    took = prometheus.query("quantile(0.99, scrape_duration_seconds)")[0]["value"][1]
    head = prometheus.query("sum(scrape_samples_scraped)")[0]["value"][1]
    memory = psutil.Process(prometheus.server.process.pid).memory_info().rss / 2**30
    print(f"scraped: {scraped} of {hosts} hosts, {head} samples each {SCRAPE_SECONDS} s; 99 % within {took} s")
    print(f"Prometheus: {memory:.1f} GiB resident; rules in error: {[rule['name'] for rule in health]}")
    now = time.time()
    baselines = [ask(prometheus, name, ("query", query), ("time", f"{now:.3f}")) for name, query in BASELINES.items()]
    day = (("start", f"{now - 86400:.3f}"), ("end", f"{now:.3f}"), ("step", "300"))
    graph = ("query", BASELINES["rates of 300 hosts, now"])
    baselines.append(ask(prometheus, "rates of 300 hosts, a graph of a day", graph, *day))
    report("simple queries: seconds, series", [(one.seconds, one.found, one.place) for one in baselines])
    groups = list(ask_rules(prometheus, now))
    rows = [
        (max(evaluations[name], default=float("nan")), len(evaluations[name]), missed, interval, seconds, name)
        for name, interval, seconds, missed in groups
    ]
    report("groups of rules: slowest evaluation, how many, missed, interval, seconds when asked", rows)
    for uid, timings in ask_dashboards(prometheus, largest, now):
        slowest = sorted(timings, key=lambda one: -one.seconds)[:SLOWEST]
        total = sum(one.seconds for one in timings)
        report(
            f"{uid}: {len(timings)} queries, {total:.2f} s one after another; the slowest: seconds, series",
            [(one.seconds, one.found, one.place) for one in slowest],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=300)
    parser.add_argument("--vms", type=int, default=50_000)
    parser.add_argument("--seconds", type=int, default=LIVE_SECONDS, help="how long agents are scraped before")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scale-") as temporary:
        end = float(int(time.time()))
        directory = Path(temporary)
        # What was is written up to the first scrape; the head begins there.
        write_history(directory, find_rule_files(), end, make_history(options.hosts, options.vms, end), HISTORY)
        print(f"history: {time.time() - end:.0f} s")
        with open_agents(options.hosts, options.vms, end) as (port, series):
            print(f"{options.hosts} hosts, {options.vms} VMs, {series} series")
            with open_prometheus(directory, build_config(port, options.hosts)) as prometheus:
                measure(prometheus, options.hosts, make_host(0, LARGEST_HOST_VMS), options.seconds)


if __name__ == "__main__":
    main()
