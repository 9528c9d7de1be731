"""A monitoring system for two or three minutes: real agents, a real Prometheus with our rules, an Alertmanager.

`record_episode` plays it once and writes down what two of the test files judge: who was notified, and what each
expression found. Everything is closed by then. The targets, all of one job:

========= ========================================================================================================
``demo``  the demo: from its 15th to its 75th second a vCPU of ``batch-1`` is stuck
``twin``  another demo, with the same VM ids, as if each VM migrated; a drill is raised there
``real``  the agent on this host, with two guests of our own on /dev/kvm
``blind`` the agent on this host with debugfs as its only source and no debugfs: no VM can be read
``gone``  a demo that is ended when it has been scraped
``lost``  the twin under another name, a target that Prometheus is told to forget
========= ========================================================================================================

A second Prometheus has the simulated history (`simulated_history`) and scrapes nobody.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.prometheus.metrics import VCPU_NO_PROGRESS as NO_PROGRESS
from tests.agents import ROOT, AgentProcess, open_agent, run_agent
from tests.live import open_guest_process
from tests.live.prometheus_server import (
    Labels,
    Prometheus,
    ServerError,
    Target,
    build_prometheus_config,
    open_alertmanager,
    open_prometheus,
)
from tests.live.receiver import Notification, Receiver, open_receiver
from tests.live.simulated_history import write_simulated_history
from tests.waiting import wait_until

RULES = ROOT / "grafana" / "alerts"
PAGE = "KvmVcpuNoForwardProgress"
STUCK_VM, DRILL_VM = "batch-1", "gateway-1"
REAL_UUIDS = ("6f1c3c52-0d7a-4a4f-9a4e-0d8f9f2c7b11", "6f1c3c52-0d7a-4a4f-9a4e-0d8f9f2c7b12")
# How long a stalled vCPU may take to be delivered, and its recovery: the demo's next stall would be too late.
FIRING_SECONDS, RESOLVED_SECONDS = 110.0, 140.0
SCRAPED_SECONDS = 60.0
# What an operator would set as the text of a chat message.
MESSAGE = "{{ range .Alerts }}{{ .Annotations.summary }}\n{{ .Annotations.description }}\n{{ end }}"


@dataclass(frozen=True)
class Question:
    """An expression and where it stands; with ``label`` it asks for that label's values."""

    place: str
    expr: str
    label: str = ""


@dataclass(frozen=True)
class Answer:
    """The label sets that an expression found at any second of the time it was asked for, or the error."""

    found: list[Labels]
    error: str = ""

    @property
    def instances(self) -> set[str]:
        return {labels["instance"].partition(":")[0] for labels in self.found if "instance" in labels}


@dataclass
class Episode:
    """What was written down."""

    notifications: list[Notification] = field(default_factory=list)
    stuck_at: list[float] = field(default_factory=list)
    """When the demo's vCPU was stuck, as Prometheus has seen it: Unix time, each second."""
    agents: dict[Question, Answer] = field(default_factory=dict)
    history: dict[Question, Answer] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    """Errors, by place and variables, of questions about one instance or some."""
    rules: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    metric_names: set[str] = field(default_factory=set)
    replayed_rules: int = 0
    prometheus_log: str = ""
    seconds: float = 0.0


def find_rule_files() -> list[Path]:
    """The rules as they are shipped."""
    return sorted(RULES.glob("*.rules.yml"))


def build_alertmanager_config(receiver: Receiver) -> dict[str, Any]:
    """Each alert by itself and at once: to a webhook as JSON, to a chat as text that Alertmanager has rendered."""
    url = f"http://127.0.0.1:{receiver.port}"
    return {
        "route": {"receiver": "test", "group_by": ["..."], "group_wait": "0s", "group_interval": "1s"},
        "receivers": [
            {
                "name": "test",
                "webhook_configs": [{"url": f"{url}/webhook", "send_resolved": True}],
                "slack_configs": [
                    {"api_url": f"{url}/chat", "channel": "#vms", "send_resolved": True, "text": MESSAGE},
                ],
            }
        ],
    }


@contextmanager
def open_blind_agent() -> Iterator[AgentProcess]:
    """Run the agent where debugfs, its only source, is not there."""
    serve = f"{sys.executable} -m exporter serve --collector.source=debugfs --web.listen-address=127.0.0.1:0"
    script = f"mount -t tmpfs none /sys/kernel/debug && exec {serve}"
    words = ["unshare", "--mount", "sh", "-c", script]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        agent = AgentProcess(process)
        try:
            agent.wait(blind=True)
            yield agent
        finally:
            agent.close()


def is_alert(notification: Notification, status: str, **labels: str) -> bool:
    """Tell whether a webhook's message has an alert with this status and these labels, "" for one that is not there."""
    return notification.path == "/webhook" and any(
        alert["status"] == status and all(alert["labels"].get(name, "") == value for name, value in labels.items())
        for alert in notification.document["alerts"]
    )


def wait_for_alert(receiver: Receiver, seconds: float, status: str, **labels: str) -> Notification | None:
    return receiver.wait_for(lambda notification: is_alert(notification, status, **labels), seconds)


def ask(prometheus: Prometheus, questions: Sequence[Question], start: float, end: float) -> dict[Question, Answer]:
    """Ask each question for every second of a window."""
    answers = {}
    for question in questions:
        try:
            if question.label:
                found = [{question.label: value} for value in prometheus.find_values(question.label, question.expr)]
            else:
                found = [series["metric"] for series in prometheus.query_range(question.expr, start, end)]
            answers[question] = Answer(found)
        except ServerError as err:
            answers[question] = Answer([], str(err))
    return answers


def find_errors(prometheus: Prometheus, choices: Mapping[str, Sequence[Question]]) -> dict[str, str]:
    """Ask what a dashboard asks for each choice of its variables; the errors by choice and place."""
    now = time.time()
    return {
        f"{choice}: {question.place}": answer.error
        for choice, questions in choices.items()
        for question, answer in ask(prometheus, questions, now - 2, now).items()
        if answer.error
    }


def record_episode(questions: Sequence[Question], choices: Mapping[str, Sequence[Question]]) -> Episode:
    """Play everything once, ask all questions at the end, and leave no process and no file behind."""
    begun, start, episode = time.monotonic(), time.time(), Episode()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        receiver = stack.enter_context(open_receiver())
        prometheus = _open_monitored_hosts(stack, directory, receiver)
        historian = _open_historian(stack, directory / "history", questions, episode)
        wait_for_alert(receiver, FIRING_SECONDS, "firing", name=STUCK_VM, instance="demo:9750")
        wait_for_alert(receiver, FIRING_SECONDS, "firing", name=DRILL_VM, instance="twin:9750")
        episode.choices = find_errors(prometheus, choices)
        wait_for_alert(receiver, RESOLVED_SECONDS, "resolved", name=STUCK_VM, instance="demo:9750")
        episode.agents = ask(prometheus, questions, start, time.time())
        for server in (prometheus, historian):
            episode.rules += server.find_rules()
            episode.alerts += server.find_alerts()
        episode.prometheus_log = prometheus.server.read_log()
        episode.stuck_at = _find_stuck_times(prometheus, start)
        episode.metric_names = set(prometheus.find_values("__name__"))
        episode.notifications = receiver.notifications
    episode.seconds = time.monotonic() - begun
    return episode


def _open_monitored_hosts(stack: ExitStack, directory: Path, receiver: Receiver) -> Prometheus:
    """Start guests, agents and servers; then raise the drill and end or forget who is to be missed."""
    for number, uuid in enumerate(REAL_UUIDS):
        guest = open_guest_process(name=f"tiny-{number}", uuid=uuid, vcpus=2, stats_fds=True, port_writes=1)
        stack.enter_context(guest).run(1000)
    statistics = ("--collector.stats", "--collector.stats.level=vcpu")
    # Only our own guests: whatever else runs here would make its scrapes too long.
    real = open_agent(f"--state.file={directory / 'state.json'}", "--collector.stats", "--vm.include=^tiny-")
    agents = {"real": stack.enter_context(real), "blind": stack.enter_context(open_blind_agent())}
    leaving = stack.enter_context(ExitStack())
    agents["gone"] = leaving.enter_context(open_agent(command="demo"))
    web_config = directory / "web.yml"
    web_config.write_text("http_server_config: {http2: true}\n")
    for name in ("twin", "demo"):
        words = (f"--web.config.file={web_config}", *statistics)
        agents[name] = stack.enter_context(open_agent(*words, command="demo"))
    agents["lost"] = agents["twin"]

    for name in ("alertmanager", "prometheus"):
        (directory / name).mkdir()
    config = build_alertmanager_config(receiver)
    alertmanager = stack.enter_context(open_alertmanager(directory / "alertmanager", config))
    targets = [Target(agent.port, f"{name}:9750") for name, agent in agents.items()]
    prometheus_config = build_prometheus_config(targets, find_rule_files(), alertmanager.port)
    prometheus = stack.enter_context(open_prometheus(directory / "prometheus", prometheus_config))

    wait_until(lambda: set(prometheus.find_targets().values()) == {"up"}, "all agents are scraped", SCRAPED_SECONDS)
    run_agent("drill", f"--vm={DRILL_VM}", f"--url={agents['twin'].socket}")
    leaving.close()
    prometheus.forget("lost:9750")
    return prometheus


def _open_historian(stack: ExitStack, directory: Path, questions: Sequence[Question], episode: Episode) -> Prometheus:
    """Start the Prometheus with the history, which scrapes nobody, and ask it."""
    directory.mkdir()
    end = float(int(time.time()))
    episode.replayed_rules = write_simulated_history(directory, find_rule_files(), end)
    historian = stack.enter_context(open_prometheus(directory, build_prometheus_config([], find_rule_files())))
    episode.history = ask(historian, questions, end - 60, end)
    return historian


def _find_stuck_times(prometheus: Prometheus, start: float) -> list[float]:
    """When the demo's vCPU was stuck, as Prometheus has seen it: Unix time, a value a second."""
    stuck = prometheus.query_range(f'{NO_PROGRESS.name}{{instance="demo:9750"}} == 1', start, time.time())
    return [seconds for series in stuck for seconds, _value in series["values"]]
