"""What the stall monitor has found, as metrics: what is 1, what is 0, and what is absent because nobody knows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from exporter.build_info import BuildInfo
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.exposition import render_text
from exporter.prometheus.selection import CollectorSettings
from exporter.prometheus.vm_series import VcpuSeries
from exporter.stalls.verdicts import THREAD_KINDS, Evidence, MonitorReport, State, VcpuReport, VmFigures
from kvm.model import Snapshot, VcpuKey, VmKey, VmReading
from tests.reports import USAGE, make_report, with_figures
from tests.snapshots import make_reading, make_snapshot

NO_PROGRESS = "kvm_vcpu_no_forward_progress"
Series = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


class Fixed:
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def read(self) -> Snapshot:
        return self._snapshot

    def close(self) -> None:
        """Nothing to give back."""


def collect(watch: MonitorReport | None, *readings: VmReading, series: VcpuSeries = VcpuSeries.ALL) -> Series:
    chosen = CollectorSettings(vcpu_series=series)
    reader, build = Fixed(make_snapshot(*readings)), BuildInfo("", "", "")
    read_report = (lambda: with_figures(watch)) if watch else None
    collector = HostCollector(reader, chosen, build, time.perf_counter, read_report)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(render_text(collector.collect()))
        for sample in family.samples
    }


def pick(series: Series, name: str) -> dict[str, float]:
    """Return the values of one metric by vcpu."""
    return {dict(labels).get("vcpu", ""): value for (found, labels), value in series.items() if found == name}


def make_found(reading: VmReading, vcpu: int, state: State, *, drill: bool = False) -> VcpuReport:
    return replace(make_report(state, vm=reading.vm, drill=drill), vcpu=reading.vcpus[vcpu])


@pytest.mark.parametrize("evidence", list(Evidence))
def test_what_tells_rips_is_an_info_and_absent_where_nothing_does(evidence: Evidence) -> None:
    found = collect(MonitorReport(trigger="poll", evidence=evidence))
    assert found["kvm_exporter_evidence_info", frozenset({("evidence", evidence)})] == 1.0
    refused = collect(MonitorReport(trigger="poll", evidence=evidence, problem="lockdown forbids it"))
    assert not any(name == "kvm_exporter_evidence_info" for name, _ in refused)


@pytest.mark.parametrize(
    ("state", "value"),
    [
        (State.STALLED, 1.0),
        (State.SUSPECT, 0.0),
        (State.CONTEXT_LOST, None),
        (State.NOTIFYING, 0.0),
        (State.PROGRESSING, 0.0),
        (State.RECOVERED, 0.0),
        (State.QUIET, 0.0),
        (State.UNKNOWN, None),
    ],
)
def test_no_forward_progress_is_1_while_stalled_and_absent_while_unknown(state: State, value: float | None) -> None:
    reading = make_reading(notify=(3, 0))
    series = collect(MonitorReport(vcpus=(make_found(reading, 0, state),)), reading)
    assert pick(series, NO_PROGRESS) == ({} if value is None else {"0": value})
    assert pick(series, "kvm_host_vcpus_no_forward_progress") == {"": float(state is State.STALLED)}


@pytest.mark.parametrize("state", State)
def test_when_a_stall_began_is_there_while_it_lasts(state: State) -> None:
    reading = make_reading("a", (4,))
    snapshot = make_snapshot(reading)
    found = make_found(reading, 0, state)
    assert found.verdict.stuck_since_seconds == 99.0
    starts = pick(collect(MonitorReport(vcpus=(found,)), reading), "kvm_vcpu_stall_start_timestamp_seconds")
    unix = snapshot.unix_seconds - snapshot.monotonic_seconds + 99.0
    assert starts == ({"0": pytest.approx(unix, abs=0.001)} if state is State.STALLED else {})


def test_a_vcpu_whose_exits_were_before_our_time_is_0_and_one_without_any_is_absent() -> None:
    assert pick(collect(MonitorReport(), make_reading(notify=(3, 0, 7))), NO_PROGRESS) == {"0": 0.0, "2": 0.0}


def test_where_rips_cannot_be_had_nothing_is_said() -> None:
    reading = make_reading(notify=(3, 1))
    found = (make_found(reading, 0, State.NOTIFYING),)
    series = collect(MonitorReport(vcpus=found, problem="no CAP_PERFMON"), reading)
    names = {name for name, _ in series}
    assert not names & {NO_PROGRESS, "kvm_host_vcpus_no_forward_progress", "kvm_vcpu_notify_traced_exits_total"}
    hidden = MonitorReport(vcpus=(replace(make_found(reading, 0, State.NOTIFYING), can_judge=False),))
    assert pick(collect(hidden, reading), NO_PROGRESS) == {"1": 0.0}


def test_without_a_monitor_there_is_none_of_it() -> None:
    names = {name for name, _ in collect(None, make_reading(notify=(3, 1)))}
    assert not {name for name in names if "progress" in name or "trace" in name or "warnings" in name or "poll" in name}


def test_traced_exits_are_of_those_that_were_looked_at() -> None:
    reading = make_reading(notify=(3, 1))
    series = collect(MonitorReport(vcpus=(make_found(reading, 0, State.STALLED),)), reading)
    assert pick(series, "kvm_vcpu_notify_traced_exits_total") == {"0": 64.0}
    assert pick(series, "kvm_vcpu_notify_same_rip_exits_total") == {"0": 63.0}


def test_a_vcpu_that_the_trigger_misses_has_no_count_of_invalid_contexts_but_what_was_counted() -> None:
    reading = make_reading(notify=(3, 1, 5))
    key = reading.vm.key
    missed = frozenset(VcpuKey(key, vcpu_id) for vcpu_id in (0, 4))
    counts = {(key.pid, key.start_ticks, 12, 4): 6}
    series = collect(MonitorReport(context_invalid=counts, missed_vcpus=missed), reading)
    assert pick(series, "kvm_vcpu_notify_context_invalid_exits_total") == {"1": 0.0, "2": 6.0}


def test_a_monitor_that_fails_costs_its_own_series_only(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> MonitorReport:
        raise OSError("the trigger's map is gone")

    def report() -> MonitorReport:
        return reports.pop(0)()

    reading = make_reading(notify=(3, 1))
    reports: list[Callable[[], MonitorReport]] = [lambda: MonitorReport(context_invalid={}), fail, MonitorReport]
    reader, build = Fixed(make_snapshot(reading)), BuildInfo("", "", "")
    collector = HostCollector(reader, CollectorSettings(), build, time.perf_counter, report)
    well, failed, after = ({family.metric.name: family for family in collector.collect()} for _ in range(3))
    lost = well.keys() - failed.keys()
    assert {"kvm_exporter_warnings_total", NO_PROGRESS} < lost
    assert not {name for name in lost if "exits_total" in name} - {"kvm_vcpu_notify_context_invalid_exits_total"}
    assert 'kvm_exporter_scrape_collector_success{collector="monitor"} 0' in render_text(failed.values())
    assert 'kvm_exporter_scrape_collector_success{collector="vcpu"} 1' in render_text(failed.values())
    assert after.keys() == well.keys() - {"kvm_vcpu_notify_context_invalid_exits_total"}
    assert "collector failed" in caplog.messages


def test_without_vcpu_series_what_alerts_need_is_still_there() -> None:
    reading = make_reading(notify=(3, 1))
    watch = MonitorReport(vcpus=(make_found(reading, 0, State.STALLED),), context_invalid={})
    series = collect(watch, reading, series=VcpuSeries.NONE)
    assert {name for name, _ in series if name.startswith("kvm_vcpu_")} == {
        NO_PROGRESS,
        "kvm_vcpu_stall_start_timestamp_seconds",
        "kvm_vcpu_notify_context_invalid_exits_total",
    }
    assert pick(series, NO_PROGRESS) == {"0": 1.0, "1": 0.0}


def test_exits_with_an_invalid_context_are_exact_and_absent_where_nobody_counts() -> None:
    name = "kvm_vcpu_notify_context_invalid_exits_total"
    reading = make_reading(notify=(3, 1, 0))  # KVM's ids are 0, 2, 4
    counts = {(4242, 77, 5000, 0): 2, (4242, 77, 6000, 0): 1, (9999, 77, 5000, 0): 50}
    assert pick(collect(MonitorReport(context_invalid=counts), reading), name) == {"0": 3.0, "1": 0.0}
    assert pick(collect(MonitorReport(), reading), name) == {}


def test_two_vms_of_one_process_are_told_apart_by_their_threads() -> None:
    one = make_reading(notify=(3,))
    key = one.vm.key._replace(vm_fd=20)
    vcpu = replace(one.vcpus[0], tid=7000)
    other = replace(one, vm=replace(one.vm, id="other", key=key), vcpus=(vcpu,))
    counts = {(4242, 77, 5000, 0): 2, (4242, 77, 7000, 0): 5}
    series = collect(MonitorReport(context_invalid=counts), one, other)
    found = {
        dict(labels)["vm"]: value
        for (name, labels), value in series.items()
        if name == "kvm_vcpu_notify_context_invalid_exits_total"
    }
    assert found == {"uuid-4242": 2.0, "other": 5.0}


@pytest.mark.parametrize("state", [None, *State])
@pytest.mark.parametrize("problem", ["", "no CAP_PERFMON"])
def test_a_drill_has_a_metric_of_its_own_and_changes_no_other(state: State | None, problem: str) -> None:
    """A drill on the very vCPU that is in this state, or of which nothing was found."""
    reading = make_reading(notify=(3, 0))
    real = () if state is None else (make_found(reading, 0, state),)
    drill = make_found(reading, 0, State.STALLED, drill=True)
    earlier = replace(drill, verdict=replace(drill.verdict, stuck_since_seconds=5.0))
    without = collect(MonitorReport(vcpus=real, problem=problem), reading)
    for reports in ((*real, earlier), (earlier, *real)):
        series = dict(collect(MonitorReport(vcpus=reports, problem=problem), reading))
        assert series.pop(("kvm_vcpu_drill", frozenset({("vm", reading.vm.id), ("vcpu", "0")}))) == 1.0
        assert series.keys() == without.keys()
        names = (NO_PROGRESS, "kvm_host_vcpus_no_forward_progress", "kvm_vcpu_stall_start_timestamp_seconds")
        assert [pick(series, name) for name in names] == [pick(without, name) for name in names]


def test_a_drill_that_is_over_has_none() -> None:
    reading = make_reading(notify=(0, 3))
    over = make_found(reading, 0, State.RECOVERED, drill=True)
    assert pick(collect(MonitorReport(vcpus=(over,)), reading), "kvm_vcpu_drill") == {}


def test_figures_of_the_monitor() -> None:
    watch = MonitorReport(
        poll_period_seconds=1.5,
        trigger_missed=9,
        traced_vcpus=2,
        armings=3,
        records=4,
        lost_records=5,
        budget_exhausted=6,
        warnings=7,
        warnings_suppressed=8,
        interval_min_seconds={0: 0.001, 128_000: 0.025},
        agent_usage=USAGE,
    )
    series = collect(watch, make_reading())
    values = {
        "poll_period_seconds": 1.5,
        "trigger_missed_total": 9,
        "traced_vcpus": 2,
        "trace_armings_total": 3,
        "trace_records_total": 4,
        "trace_lost_records_total": 5,
        "trace_budget_exhausted_total": 6,
        "warnings_total": 7,
        "warnings_suppressed_total": 8,
        "threads": 9,
    }
    for name, value in values.items():
        assert pick(series, f"kvm_exporter_{name}") == {"": value}
    switches, cpu = "kvm_exporter_context_switches_total", "kvm_exporter_thread_cpu_seconds_total"
    assert series[switches, frozenset({("kind", "involuntary")})] == 7
    assert {dict(labels)["thread"] for name, labels in series if name == cpu} == set(THREAD_KINDS)
    name = "kvm_host_notify_interval_min_seconds"
    assert series[name, frozenset({("window_cycles", "0")})] == 0.001
    assert series[name, frozenset({("window_cycles", "128000")})] == 0.025


VCPUS = 3
STATES = st.lists(st.sampled_from([None, *State]), min_size=VCPUS, max_size=VCPUS)
# Of one VM at one moment: notify exits, states, which vCPUs are in a drill, exits with an invalid context and more.
MOMENTS = st.tuples(
    st.lists(st.sampled_from([0, 0, 5, 2**63]), min_size=VCPUS, max_size=VCPUS),
    STATES,
    st.sets(st.integers(0, VCPUS - 1)),
    st.sampled_from([None, {}, {(4242, 77, 5001, 2): 3}]),
    st.sampled_from(["", "no CAP_PERFMON"]),
    st.sets(st.sampled_from([VcpuKey(make_reading().vm.key, vcpu_id) for vcpu_id in (0, 2, 4)])),
)
Moment = tuple[
    list[int], list[State | None], set[int], Mapping[tuple[int, int, int, int], int] | None, str, set[VcpuKey]
]


@given(st.lists(st.tuples(MOMENTS, st.booleans()), min_size=2, max_size=6), st.sampled_from(VcpuSeries))
def test_lines_that_are_kept_from_scrape_to_scrape_are_those_that_would_be_made_anew(
    moments: list[tuple[Moment, bool]], mode: VcpuSeries
) -> None:
    host, reports, settings = Changing(), [MonitorReport()], CollectorSettings(vcpu_series=mode)

    def open_collector() -> HostCollector:
        return HostCollector(host, settings, BuildInfo("", "", ""), lambda: 0.0, lambda: reports[-1])

    keeps = open_collector()
    figures: dict[VmKey, VmFigures] = {}
    for (notify, states, drills, invalid, problem, missed), is_scraped in moments:
        reading = make_reading(notify=tuple(notify))
        host.snapshot = make_snapshot(reading)
        found = [make_found(reading, at, state) for at, state in enumerate(states) if state is not None]
        found += [make_found(reading, at, State.STALLED, drill=True) for at in sorted(drills)]
        watch = MonitorReport(tuple(found), problem=problem, context_invalid=invalid, missed_vcpus=frozenset(missed))
        watch = with_figures(watch)
        # What has not changed is the same object as before.
        figures = {key: figures[key] if figures.get(key) == now else now for key, now in watch.figures.items()}
        reports.append(replace(watch, figures=figures))
        if not is_scraped:  # as where the status page has asked
            continue
        made_anew = render_text(open_collector().collect())
        kept = render_text(keeps.collect())
        assert drop_history(kept) == drop_history(made_anew)


class Changing(Fixed):
    def __init__(self) -> None:
        super().__init__(make_snapshot())
        self.snapshot = make_snapshot()

    def read(self) -> Snapshot:
        return self.snapshot


def drop_history(text: str) -> list[str]:
    """The lines but those about what only a collector with a past can know."""
    history = ("kvm_host_notify_window_exits_total", "kvm_vcpu_last_notify_exit_timestamp_seconds")
    return [line for line in text.splitlines() if not any(name in line for name in history)]
