"""Writes history into the data of a Prometheus, as blocks: samples of a table, and what rules make of them.

The samples are by `exporter.prometheus.metrics`: a name or a label that is not declared there raises. What recording
rules would have made of them, and which alerts they would have raised, is asked of the Prometheus itself, rule by rule,
and written beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from exporter.prometheus.exposition import escape_label_value, render_number, render_series
from exporter.prometheus.metrics import Metric, order_labels
from tests.grafana.promql import find_selectors
from tests.live.prometheus_server import Prometheus, create_blocks, open_prometheus

JOB: Final = "kvm-notify-exporter"
UNITS: Final = {"s": 1, "m": 60, "h": 3600}
# Of alerts, what an instant query finds, and no more.
ALERT_SECONDS: Final = 600

ByHour = Callable[[float], float | None]


@dataclass(frozen=True)
class Sampling:
    """How long a history is, and how far apart its samples are; those of the ``last_seconds`` may be closer."""

    hours: float
    step_seconds: int = 60
    last_seconds: int = 0
    last_step_seconds: int = 15

    def find_times(self) -> tuple[int, ...]:
        """Return when samples are taken, in seconds before the end (so they are negative)."""
        before = range(int(-self.hours * 3600), -self.last_seconds, self.step_seconds)
        return (*before, *range(-self.last_seconds, 1, self.last_step_seconds))


@dataclass(frozen=True)
class Series:
    """One series: its value by the hours since the end of the history (so they are negative), None for no sample."""

    metric: Metric
    instance: str
    value: ByHour
    labels: dict[str, str]

    def render(self, end: float, times: Iterable[int]) -> Iterator[str]:
        """The samples as lines of OpenMetrics."""
        target = {"instance": self.instance, "job": JOB if self.instance else ""}
        metric = replace(self.metric, labels=(*self.metric.labels, *target))
        series = render_series(metric, (*order_labels(self.metric, **self.labels), *target.values()))
        for seconds in times:
            value = self.value(seconds / 3600)
            if value is not None:
                yield f"{series} {render_number(value)} {end + seconds:.0f}\n"


def always(value: float) -> ByHour:
    return lambda _hour: value


def count_from(start: float, per_hour: float) -> ByHour:
    """A counter that begins to move at that hour."""
    return lambda hour: float(int(max(0.0, hour - start) * per_hour))


def between(start: float, end: float, value: float = 1.0) -> ByHour:
    """A series that is there from one hour to another."""
    return lambda hour: value if start <= hour < end else None


def write_history(
    directory: Path,
    rule_files: Sequence[Path],
    end: float,
    series: Iterable[Series],
    sampling: Sampling,
    *,
    alerts: bool = False,
) -> int:
    """Fill ``directory/data`` with the series and with what recording rules make of them; returns how many they are.

    With ``alerts`` also with what `ALERTS` and `ALERTS_FOR_STATE` say at the end.
    """
    times = sampling.find_times()
    create_blocks(directory, (line for one in series for line in one.render(end, times)))
    written = 0
    for level in order_recording_rules(rule_files):
        with ExitStack() as stack:  # a Prometheus finds new blocks when it starts
            prometheus = stack.enter_context(open_prometheus(directory, {}))
            lines = [line for rule in level for line in _replay(prometheus, rule, end, sampling)]
        create_blocks(directory, lines)
        written += len(level)
    if alerts:
        with open_prometheus(directory, {}) as prometheus:
            lines = [
                line
                for rule in _read_rules(rule_files, "alert")
                for line in _raise_alerts(prometheus, rule, end, sampling)
            ]
        create_blocks(directory, lines)
    return written


def read_groups(rule_files: Iterable[Path]) -> list[dict[str, Any]]:
    """The groups of all files, in their order."""
    return [group for path in rule_files for group in yaml.safe_load(path.read_text())["groups"]]


def parse_seconds(duration: str) -> int:
    """The seconds of a duration of one unit, as in ``interval: 2m``."""
    return int(duration[:-1]) * UNITS[duration[-1]]


def order_recording_rules(rule_files: Iterable[Path]) -> list[list[dict[str, Any]]]:
    """The recording rules in steps: each asks only for what is recorded before."""
    left = _read_rules(rule_files, "record")
    levels = []
    while left:
        waited_for = {rule["record"] for rule in left}
        level = [rule for rule in left if not waited_for & {asked.metric for asked in find_selectors(rule["expr"])}]
        if not level:
            raise ValueError(f"recording rules that wait for each other: {sorted(waited_for)}")
        levels.append(level)
        left = [rule for rule in left if rule not in level]
    return levels


def _read_rules(rule_files: Iterable[Path], kind: str) -> list[dict[str, Any]]:
    """The rules that are a ``record`` or an ``alert``, each with its group's ``interval``."""
    return [
        {**rule, "interval": group.get("interval", "1m")}
        for group in read_groups(rule_files)
        for rule in group["rules"]
        if kind in rule
    ]


def _replay(prometheus: Prometheus, rule: dict[str, Any], end: float, sampling: Sampling) -> Iterator[str]:
    """What a rule would have recorded, as lines of OpenMetrics."""
    step = max(sampling.step_seconds, parse_seconds(rule["interval"]))
    for series in prometheus.query_range(rule["expr"], end - sampling.hours * 3600, end, step):
        labels = {**series["metric"], **rule.get("labels", {})}
        labels.pop("__name__", None)
        for seconds, value in series["values"]:
            yield _render(rule["record"], labels, value, seconds)


def _raise_alerts(prometheus: Prometheus, rule: dict[str, Any], end: float, sampling: Sampling) -> Iterator[str]:
    """What Prometheus would have kept of an alert in the last minutes, as lines of OpenMetrics.

    It has had a reason since it was last interrupted; `keep_firing_for` is left out.
    """
    step = max(sampling.step_seconds, parse_seconds(rule["interval"]))
    for series in prometheus.query_range(rule["expr"], end - sampling.hours * 3600, end, step):
        times = [seconds for seconds, _value in series["values"]]
        if times[-1] < end - step:
            continue
        since = next(
            (at for before, at in zip(times[-2::-1], times[::-1], strict=False) if at - before > step), times[0]
        )
        labels = {**series["metric"], **rule["labels"], "alertname": rule["alert"]}
        labels.pop("__name__", None)
        for seconds in range(int(end) - ALERT_SECONDS, int(end) + 1, sampling.step_seconds):
            if seconds >= since:
                state = "firing" if seconds - since >= parse_seconds(rule.get("for", "0s")) else "pending"
                yield _render("ALERTS", {**labels, "alertstate": state}, "1", seconds)
                yield _render("ALERTS_FOR_STATE", labels, f"{since:.0f}", seconds)


def _render(name: str, labels: dict[str, str], value: str, seconds: float) -> str:
    text = ",".join(f'{label}="{escape_label_value(text)}"' for label, text in labels.items())
    return f"{name}{{{text}}} {value} {seconds}\n"
