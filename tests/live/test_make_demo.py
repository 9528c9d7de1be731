"""``make demo``: the agent on a simulated host, a Prometheus with our rules beside it, and an end by Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.agents import ROOT
from tests.live.monitored_hosts import PAGE
from tests.live.prometheus_server import end_process, find_free_port, find_program
from tests.waiting import wait_until

pytestmark = pytest.mark.live

START_SECONDS = 60.0
AGENT = Path(sys.executable).with_name("kvm-notify-exporter")
# What the script calls, for a PATH without Prometheus.
TOOLS = ("cat", "dirname", "grep", "mktemp", "rm", "sleep", "tail")


@dataclass(frozen=True)
class Demo:
    process: subprocess.Popen[bytes]
    agent: str
    prometheus: str
    output: Path
    temporary: Path

    def wait_for(self, text: str) -> None:
        wait_until(
            lambda: text in self.output.read_text(), lambda: f"{text!r} in {self.output.read_text()}", START_SECONDS
        )

    def is_gone(self) -> bool:
        """Whether none of its processes is left, and no file."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return os.listdir(self.temporary) == []
        return False


@contextmanager
def open_demo(directory: Path, prometheus_port: int = 0, **environment: str) -> Iterator[Demo]:
    """Run the script in a process group of its own, as a shell would."""
    temporary, output = directory / "tmp", directory / "output"
    temporary.mkdir()
    agent, prometheus = f"127.0.0.1:{find_free_port()}", f"127.0.0.1:{prometheus_port or find_free_port()}"
    environment = {**os.environ, "TMPDIR": str(temporary), "KVM_NOTIFY_EXPORTER": str(AGENT), **environment}
    # A shell cannot trap what was ignored when it began, as SIGHUP is where nohup has started the tests.
    with_signals = [str(shutil.which("env")), "--default-signal=HUP,INT,TERM"]
    words = [*with_signals, str(ROOT / "grafana" / "demo"), agent, prometheus]
    with output.open("wb") as file, subprocess.Popen(
        words, stdout=file, stderr=file, env=environment, start_new_session=True
    ) as process:  # fmt: skip
        demo = Demo(process, agent, prometheus, output, temporary)
        try:
            yield demo
        finally:
            end_process(process)
    wait_until(demo.is_gone, "nothing is left of the demo", 10)


def fetch(address: str, path: str) -> bytes:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=60) as answer:
        body: bytes = answer.read()
        return body


def ask(demo: Demo, path: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(fetch(demo.prometheus, f"/api/v1/{path}"))["data"]
    return data


def press_ctrl_c(demo: Demo) -> None:
    os.killpg(demo.process.pid, signal.SIGINT)  # the terminal sends it to the whole group


def test_agent_and_prometheus_run_until_ctrl_c(tmp_path: Path) -> None:
    find_program("prometheus")
    with open_demo(tmp_path) as demo:
        demo.wait_for("Prometheus with the rules")
        assert f"status page and metrics:   http://{demo.agent}/\n" in demo.output.read_text()
        assert f"Prometheus with the rules: http://{demo.prometheus}/alerts\n" in demo.output.read_text()
        names = {rule["name"] for group in ask(demo, "rules")["groups"] for rule in group["rules"]}
        assert PAGE in names
        wait_until(lambda: ask(demo, "query?query=kvm_vm_info")["result"] != [], "it has the demo's VMs", START_SECONDS)
        assert b"kvm_vm_info{" in fetch(demo.agent, "/metrics")
        assert len(os.listdir(demo.temporary)) == 1
        press_ctrl_c(demo)
        assert demo.process.wait(60) == 0
        assert demo.is_gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_to_the_script_alone_end_all_of_it(tmp_path: Path, number: signal.Signals) -> None:
    find_program("prometheus")
    with open_demo(tmp_path) as demo:
        demo.wait_for("Prometheus with the rules")
        demo.process.send_signal(number)
        assert demo.process.wait(60) == 0
        assert demo.is_gone()


def test_without_prometheus_the_agent_runs_alone(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(str(shutil.which(tool)))
    with open_demo(tmp_path, PATH=str(tools)) as demo:
        demo.wait_for("msg=listening")
        assert "no Prometheus here, so none with the rules: apt-get install prometheus" in demo.output.read_text()
        assert f"http://{demo.agent}/\n" in demo.output.read_text()
        assert demo.prometheus not in demo.output.read_text()
        press_ctrl_c(demo)
        assert demo.process.wait(60) == 0


def test_where_its_port_is_taken_prometheus_says_so_and_the_agent_goes_on(tmp_path: Path) -> None:
    find_program("prometheus")
    with socket.create_server(("127.0.0.1", 0)) as taken, open_demo(tmp_path, taken.getsockname()[1]) as demo:
        demo.wait_for("status page and metrics")
        demo.wait_for("msg=listening")
        assert "Prometheus does not start; its last words" in demo.output.read_text()
        assert "address already in use" in demo.output.read_text()
        assert b"kvm_vm_info{" in fetch(demo.agent, "/metrics")
        press_ctrl_c(demo)
        assert demo.process.wait(60) == 0


def test_an_agent_that_does_not_start_ends_the_demo(tmp_path: Path) -> None:
    find_program("prometheus")
    with open_demo(tmp_path, KVM_NOTIFY_EXPORTER="false") as demo:
        assert demo.process.wait(60) == 1
        assert "status page" not in demo.output.read_text()


def test_make_calls_it() -> None:
    words = ["make", "--dry-run", "--no-print-directory", "demo"]  # `make test` may be who runs us
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == (
        "exec env KVM_NOTIFY_EXPORTER=.venv/bin/kvm-notify-exporter grafana/demo 127.0.0.1:9750 127.0.0.1:9751"
    )
