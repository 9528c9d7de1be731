"""The whole exposition of the real process over HTTP, against a golden file.

The simulated host says the same every time but for what depends on the time; those values are masked. Made anew, after
a look at the difference, with ``python -m tests.exporter.prometheus.test_golden``.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from pathlib import Path

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from tests.agents import AgentProcess, open_agent
from tests.waiting import wait_until

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "demo.prom"
# Samples whose values depend on time, on the machine or on the version.
VARIES = re.compile(
    r"^(kvm_(?:vcpu_\w+|vm_notify_window_exits_total|vm_start_time_seconds|host_notify_\w+_total"
    r"|host_notify_interval_min_seconds|exporter_scrape_collector_duration_seconds|exporter_trace\w+"
    r"|exporter_thread\w+|exporter_context_switches_total"
    r"|exporter_snapshot_timestamp_seconds"
    r"|exporter_warnings\w+|exporter_poll_period_seconds|host_vcpus_no_forward_progress)(?:\{.*\})?) \S+$",
    re.MULTILINE,
)
BUILD = re.compile(r"^kvm_exporter_build_info\{.*\} 1$", re.MULTILINE)
# Series that are there or not depending on the moment of the simulated host.
COMES_AND_GOES = re.compile(
    r"^(?:# (?:HELP|TYPE) )?kvm_(?:vcpu_last_notify_exit_timestamp_seconds|vcpu_no_forward_progress"
    r"|vcpu_notify_\w*rip\w*|vcpu_notify_traced\w+|vcpu_notify_context\w+|host_notify_interval_min_seconds).*\n",
    re.MULTILINE,
)


def mask(exposition: str) -> str:
    text = COMES_AND_GOES.sub("", exposition)
    return BUILD.sub("kvm_exporter_build_info{...} 1", VARIES.sub(r"\1 ...", text))


def wait_monitored(agent: AgentProcess) -> None:
    """Wait until the stall monitor has been round once, so that all that it reports is there."""
    wait_until(lambda: "kvm_exporter_threads" in agent.scrape(), "the monitor's first report")


def ask(agent: AgentProcess) -> str:
    wait_monitored(agent)
    status, headers, body = agent.get()
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    return mask(body.decode())


def test_the_exposition_is_the_golden_one_and_promtool_agrees() -> None:
    promtool = shutil.which("promtool")
    assert promtool, "Debian's package prometheus has it"
    with open_agent("--web.disable-exporter-metrics", command="demo") as agent:
        assert ask(agent) == GOLDEN.read_text()
        _status, _headers, body = agent.get()
    run = subprocess.run([promtool, "check", "metrics"], input=body, capture_output=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def test_openmetrics_and_gzip_say_the_same() -> None:
    with open_agent(command="demo") as agent:
        wait_monitored(agent)
        accept = "application/openmetrics-text; version=1.0.0"
        _status, headers, body = agent.get(Accept=accept, Accept_Encoding="gzip")
        assert headers["content-encoding"] == "gzip"
        assert headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        text = gzip.decompress(body).decode()
        assert text.endswith("# EOF\n")
        names = {family.name for family in parse_openmetrics(text)}  # type: ignore[no-untyped-call]
        assert {"kvm_vcpu_exits", "kvm_vm_info", "process_cpu_seconds", "python_info"} <= names
        assert names >= {name.removesuffix("_total") for name in agent.scrape()}


if __name__ == "__main__":
    with open_agent("--web.disable-exporter-metrics", command="demo") as made:
        GOLDEN.parent.mkdir(parents=True, exist_ok=True)
        GOLDEN.write_text(ask(made))
