"""Statistics of a real QEMU's guest as parsers, promtool and a real Prometheus read them from a scrape."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from tests.agents import AgentProcess, open_agent
from tests.lab.debian import find_qemu10
from tests.live.prometheus_server import Target, build_prometheus_config, find_program, open_prometheus
from tests.live.test_qemu import UUID, Qemu, open_qemu
from tests.qmp_statistics import keep_statistics, order_buckets, read_expected_series
from tests.waiting import wait_until

pytestmark = pytest.mark.live

HISTOGRAM = "kvm_vcpu_stat_halt_wait_hist_seconds"
QUANTILES = (0.1, 0.5, 0.9, 0.99)


def read_buckets(qemu: Qemu) -> list[int]:
    """How long the guest's vCPUs waited after halts, as QEMU reads it: counts of all vCPUs, bucket by bucket."""
    wanted = [{"provider": "kvm", "names": ["halt_wait_hist"]}]
    answers: Any = qemu.ask("query-stats", target="vcpu", providers=wanted)
    columns = zip(*(order_buckets(answer["stats"][0]["value"]) for answer in answers), strict=True)
    return [sum(counts) for counts in columns]


@pytest.fixture(scope="module")
def qemu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qemu]:
    """A QEMU whose guest has halted now and then, and is stopped."""
    with open_qemu(find_qemu10(), "web", tmp_path_factory.mktemp("qemu")) as qemu:
        wait_until(lambda: len([count for count in read_buckets(qemu) if count]) >= 2, "waits of two lengths", 120)
        qemu.ask("stop")
        yield qemu


@pytest.fixture(scope="module")
def agent(qemu: Qemu) -> Iterator[AgentProcess]:
    del qemu  # it is there before
    with open_agent("--collector.stats", "--collector.stats.level=vcpu") as agent:
        yield agent


def find_quantile(quantile: float, counts: Sequence[int]) -> float:
    """What Prometheus documents for histogram_quantile: linear within the bucket that the rank falls into.

    KVM's buckets end at powers of two in nanoseconds (Documentation/virt/kvm/api.rst, KVM_STATS_TYPE_LOG_HIST); of the
    last one only the beginning is known.
    """
    rank, before = quantile * sum(counts), 0
    for number, count in enumerate(counts):
        if before + count >= rank and count:
            if number == len(counts) - 1:
                return 2.0 ** (number - 1) / 1e9
            low, high = (2.0 ** (number - 1) / 1e9 if number else 0.0), 2.0**number / 1e9
            return low + (high - low) * (rank - before) / count
        before += count
    raise AssertionError("nothing was counted")


def test_prometheus_clients_parser_of_openmetrics_reads_what_qemu_reads(agent: AgentProcess, qemu: Qemu) -> None:
    status, headers, body = agent.get(Accept="application/openmetrics-text; version=1.0.0")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "application/openmetrics-text")
    found = keep_statistics(body.decode(), f"{UUID}-{qemu.pid}", parse_openmetrics)
    assert found == pytest.approx(read_expected_series(qemu.ask), rel=1e-12)
    assert len(found) > 200


def test_promtool_has_nothing_against_it_but_the_kernels_own_names(agent: AgentProcess) -> None:
    body = agent.get()[2]
    assert b"# TYPE " + HISTOGRAM.encode() + b" histogram\n" in body
    run = subprocess.run([find_program("promtool"), "check", "metrics"], input=body, capture_output=True, check=False)
    said = (run.stdout + run.stderr).decode().splitlines()
    abbreviated = re.compile(
        r"kvm_vcpu_stat_halt_\w+_ns_seconds_total metric names should not contain abbreviated units"
    )
    assert len(said) == 3
    assert all(map(abbreviated.fullmatch, said)), said


def test_a_prometheus_finds_the_quantiles_that_are_computed_by_hand(
    agent: AgentProcess, qemu: Qemu, tmp_path: Path
) -> None:
    counts = read_buckets(qemu)
    config = build_prometheus_config([Target(agent.port, "here")], [], interval_seconds=5)
    selector = f'{HISTOGRAM}_bucket{{vm="{UUID}-{qemu.pid}"}}'
    with open_prometheus(tmp_path, config) as prometheus:
        wait_until(lambda: prometheus.query(selector), "a scrape", 60)
        for quantile in QUANTILES:
            (found,) = prometheus.query(f"histogram_quantile({quantile}, sum by (le) ({selector}))")
            assert float(found["value"][1]) == pytest.approx(find_quantile(quantile, counts), rel=1e-9)
        (total,) = prometheus.query(f'sum({HISTOGRAM}_bucket{{vm="{UUID}-{qemu.pid}",le="+Inf"}})')
        assert float(total["value"][1]) == sum(counts)
        metadata = prometheus.ask(f"metadata?metric={HISTOGRAM}")
        assert metadata[HISTOGRAM][0]["type"] == "histogram"
        assert metadata[HISTOGRAM][0]["unit"] == "seconds"
