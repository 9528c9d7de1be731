"""The outputs that documents show are what the code prints of the same facts, to the letter.

They were captured (``python -m tests.live.samples``, ``make demo``). Here the facts are read out of them and go through
the code once more: so a column, a word or a field that changes is noticed on every machine.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from exporter.build_info import BuildInfo
from exporter.commands.agent_report import render_report
from exporter.commands.once import render_table
from exporter.host_summary import render_check
from exporter.logs.formatters import build_fields, render_logfmt
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.exposition import render_text
from exporter.prometheus.selection import CollectorSettings
from exporter.stalls.stall_log import StallLog
from kvm.host.privileges import Privileges
from kvm.model import (
    EXITS,
    NOTIFY_WINDOW_EXITS,
    Host,
    Identity,
    Owner,
    Protection,
    Snapshot,
    SourceReport,
    Vcpu,
    Vm,
    VmCounters,
    VmKey,
    VmReading,
)
from tests.documents import DOCS, README, ROOT, find_blocks, find_table
from tests.live.samples import METRICS
from tests.reports import make_report
from tests.snapshots import make_snapshot

WARNING_FIELDS_OF_EVERY_LINE = {"time", "level", "msg"}


def find_sample(document: Path, start: str) -> str:
    """Return the one block of a document that begins so, without its first line where that is a command."""
    (sample,) = (block for block in find_blocks(document, "") if block.startswith(start))
    return sample.partition("\n")[2] if sample.startswith("$ ") else sample


def make_reading(vm: Vm, rows: Sequence[tuple[int, int, int, int]]) -> VmReading:
    """Return what was read of a VM: for each vCPU its index, thread, notify exits and exits."""
    vcpus = tuple(Vcpu(index, index, tid) for index, tid, _notify, _exits in rows)
    columns = {NOTIFY_WINDOW_EXITS: tuple(row[2] for row in rows), EXITS: tuple(row[3] for row in rows)}
    counters = VmCounters(tuple(v.vcpu_id for v in vcpus), tuple(v.tid for v in vcpus), columns)
    return VmReading(vm, "bpf", vcpus, len(vcpus), counters, Protection.UNSUPPORTED)


def test_once() -> None:
    sample = find_sample(README, "$ kvm-notify-exporter once\n")
    vms: dict[str, tuple[Vm, list[tuple[int, int, int, int]]]] = {}
    for line in sample.splitlines()[1:]:
        vm, name, _owner, vmm, pid, vcpu, _state, tid, notify, exits, _protection, _source = line.split()
        owner = Owner(vmm, name=name)
        found = vms.setdefault(vm, (Vm(vm, VmKey(int(pid), 1, 9), owner, None), []))
        found[1].append((int(vcpu), int(tid), int(notify), int(exits)))
    assert render_table(make_snapshot(*(make_reading(vm, rows) for vm, rows in vms.values()))) == sample


class OneSnapshot:
    """A host of which one snapshot is known."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def read(self) -> Snapshot:
        return self._snapshot

    def close(self) -> None:
        """Nothing is held."""


def test_metrics() -> None:
    sample = find_sample(DOCS / "metrics.md", "$ curl -s localhost:9750/metrics")
    series = [one for family in text_string_to_metric_families(sample) for one in family.samples]
    readings = []
    for info in (one for one in series if one.name == "kvm_vm_info"):
        labels = dict(info.labels)
        vm_id, pid = labels.pop("vm"), int(labels.pop("pid"))
        owner = Owner(
            labels.pop("vmm"),
            name=labels.pop("name"),
            uuid=labels.pop("uuid"),
            identity=Identity(labels.pop("identity")),
            uid=int(labels.pop("uid")),
        )
        assert not any(labels.values()), labels
        counts = {
            name: {
                one.labels["vcpu"]: int(one.value) for one in series if one.name == name and one.labels["vm"] == vm_id
            }
            for name in ("kvm_vcpu_notify_window_exits_total", "kvm_vcpu_exits_total")
        }
        notify, exits = counts.values()
        assert notify.keys() == exits.keys()
        rows = [(int(vcpu), 5000 + int(vcpu), notify[vcpu], exits[vcpu]) for vcpu in notify]
        readings.append(make_reading(Vm(vm_id, VmKey(pid, 1, 9), owner, None), rows))
    host = OneSnapshot(make_snapshot(*readings))
    collector = HostCollector(host, CollectorSettings(), BuildInfo("1", "2", "3"), time.perf_counter)
    printed = [line for line in render_text(collector.collect()).splitlines() if re.match(METRICS, line)]
    assert printed == sample.splitlines()


def test_check() -> None:
    sample = find_sample(README, "$ kvm-notify-exporter check\n")
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in sample.splitlines())
    cpu = re.fullmatch(
        r"Linux (\S+), (.+) \((\w+) family (\d+) model (\d+) stepping (\d+), microcode (\w+)\)", lines["host"]
    )
    closed = re.fullmatch(r"does not work: (.*) -> (.*)", lines["source debugfs"])
    assert cpu and closed
    host = Host(
        **dict(
            zip(
                ("kernel", "cpu_model_name", "cpu_vendor", "cpu_family", "cpu_model", "cpu_stepping", "microcode"),
                cpu.groups(),
                strict=True,
            )
        ),
        lockdown="integrity",
        lockdown_note=lines["lockdown"].partition("; ")[2],
        kvm_module="kvm_pvm",
        notify_supported=False,
        initial_pid_namespace=True,
    )
    sources = (SourceReport("bpf", up=True), SourceReport("stats_fd", up=True))
    vms = [make_reading(Vm(name, VmKey(1, 1, 9), Owner("qemu"), None), [(0, 1, 0, 0)]) for name in ("one", "two")]
    snapshot = make_snapshot(*vms, host=host, sources=(*sources, SourceReport("debugfs", False, *closed.groups())))
    root = Privileges(
        uid=0,
        capabilities=2**41 - 1,
        security_modules=tuple(lines["security"].split(",")),
        label="unconfined",
        initial_user_namespace=True,
        is_seccomp_filtered=False,
        kvm_is_module=False,
        mounted=frozenset(),
    )
    assert render_check(snapshot, root, None, lines["stalls"], series=lines["series"]) == sample


def parse_warning() -> tuple[str, dict[str, str]]:
    """Return the warning that is shown, as a line and as fields."""
    sample = find_sample(DOCS / "reading-a-warning.md", "time=").strip()
    pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)', sample)
    return sample, {key: value.strip('"') for key, value in pairs}


def test_warning(caplog: pytest.LogCaptureFixture) -> None:
    sample, shown = parse_warning()
    report = make_report(
        vm=Vm(
            shown["vm"],
            VmKey(int(shown["pid"]), 1, 9),
            Owner(shown["vmm"], name=shown["name"], project=shown["owner"]),
            None,
        ),
        source="simulated",
        rip=int(shown["rip"], 16),
        exits=int(shown["exits_at_rip"]),
        stuck_since_seconds=100.0,
        cpu_percent=float(shown["cpu_percent_of_thread"]),
        idt_vectoring=1 << 31 | 17,
    )
    report = replace(report, vcpu=Vcpu(int(shown["vcpu"]), 0, int(shown["tid"])))
    since = time.strptime(shown["since"], "%Y-%m-%dT%H:%M:%SZ")
    seconds = float(shown["seconds"])
    StallLog().tell(report, 100.0 + seconds, time.mktime(since) - time.timezone + seconds)
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    fields = build_fields(record) | {"time": shown["time"]}
    assert render_logfmt(fields) == sample


def test_every_field_of_the_warning_is_explained() -> None:
    _sample, shown = parse_warning()
    rows = find_table(DOCS / "reading-a-warning.md", "field", "says")
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert named == shown.keys() - WARNING_FIELDS_OF_EVERY_LINE


def test_make_demo() -> None:
    script = (ROOT / "grafana" / "demo").read_text()
    for line in find_sample(README, "$ make demo\n").splitlines():
        text, _, url = line.partition("http://127.0.0.1:975")
        assert url
        assert f'"{text}http://' in script


def test_alert() -> None:
    """The annotations of the alert, with anything where they have a template."""
    document = yaml.safe_load((ROOT / "grafana" / "alerts" / "kvm-notify-alerts.rules.yml").read_text())
    rules = [rule for group in document["groups"] for rule in group["rules"]]
    (rule,) = (rule for rule in rules if rule.get("alert") == "KvmVcpuNoForwardProgress")
    sample = find_sample(DOCS / "alerts.md", "VM batch-1").splitlines()
    for line, name in zip(sample, ("summary", "description"), strict=True):
        of_drills = r"\{\{ if \$labels\.drill \}\}(?:[^{]*\{\{ end \}\}|.*?\{\{ else \}\})"
        text = re.sub(of_drills, "", rule["annotations"][name], flags=re.DOTALL)
        parts = re.split(r"\{\{.*?\}\}", text, flags=re.DOTALL)
        assert re.fullmatch(".*".join(map(re.escape, parts)), line), line


def test_the_table_of_a_running_agent() -> None:
    sample = find_sample(DOCS / "reading-a-warning.md", "$ kvm-notify-exporter once --from-agent\n")
    vcpus = []
    for line in sample.splitlines()[1:]:
        vm, name, project, vmm, pid, vcpu, state, stuck, rip, exits, reason = re.split(r" {2,}", line)
        since = None if stuck == "-" else datetime.fromisoformat(stuck).timestamp()
        who = {"vm": vm, "name": name, "project": project, "vmm": vmm, "pid": int(pid), "vcpu": int(vcpu)}
        what = {"state": state, "drill": False, "stuck_since_unix_seconds": since, "reason": reason}
        vcpus.append(who | what | {"rip": None if rip == "-" else rip, "notify_window_exits": int(exits)})
    whole = {"complete": True, "unread_vms": 0, "problem": None, "details": True}
    assert render_report({"vcpus": vcpus, **whole}) == sample
