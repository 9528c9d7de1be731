"""Asks every surface of an agent that runs in one of the ways."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import psutil
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.agents import AgentProcess
from tests.blind.ways import PYTHON, Way
from tests.waiting import wait_until

ANSWER_SECONDS: Final = 240.0
# What is asked: the agent that is installed, where one is named.
PROGRAM: Final = shlex.split(os.environ.get("KVM_NOTIFY_EXPORTER", f"{PYTHON} -m exporter"))


@dataclass(frozen=True, slots=True)
class Said:
    """What a command said: its exit code, stdout and stderr."""

    code: int
    text: str
    log: str


@dataclass(frozen=True, slots=True)
class Answers:
    """What every surface of one agent says. ``scraped`` is the text of /metrics, ``ready`` a status and a body."""

    once: Said
    once_json: Said
    check: Said
    scraped: str
    ready: tuple[int, str]
    page: str
    api: dict[str, Any]
    log: tuple[str, ...]

    @property
    def snapshot(self) -> dict[str, Any]:
        """The document that ``once --format=json`` has printed."""
        document: dict[str, Any] = json.loads(self.once_json.text)
        return document

    @property
    def families(self) -> dict[str, Metric]:
        """The families of /metrics by name."""
        return {family.name: family for family in text_string_to_metric_families(self.scraped)}


def run(way: Way, stage: Path, *words: str) -> Said:
    """Run a command of the program to its end."""
    command = [*way.build_prefix(stage), *PROGRAM, *words, *way.flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return Said(done.returncode, done.stdout, done.stderr)


@contextmanager
def open_agent(way: Way, stage: Path) -> Iterator[AgentProcess]:
    """Run ``serve`` until it has taken its first snapshot, blind or not."""
    words = ["serve", "--web.listen-address=127.0.0.1:0", *way.flags]
    command = [*way.build_prefix(stage), *PROGRAM, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        agent = AgentProcess(process)
        try:
            agent.wait(blind=True)
            yield agent
        finally:
            # unshare --fork waits for its child, and has no ear for signals meanwhile.
            for child in psutil.Process(process.pid).children():
                child.terminate()
            agent.close()


def ask(way: Way, stage: Path) -> Answers:
    """Ask all surfaces."""
    with open_agent(way, stage) as agent:
        return ask_agent(agent, way, stage)


class Served(Protocol):
    """An agent that runs, whoever has started it: its log, and status, headers and body of an answer."""

    @property
    def log(self) -> list[str]: ...

    def get(self, path: str = "/metrics") -> tuple[int, dict[str, str], bytes]: ...


def ask_agent(agent: Served, way: Way, stage: Path) -> Answers:
    """Ask all surfaces, those of ``serve`` of an agent that runs."""
    once, once_json = run(way, stage, "once"), run(way, stage, "once", "--format=json")
    check = run(way, stage, "check")
    # The monitor tries what it traces by once it has read the host.
    wait_until(lambda: b"not tried yet" not in agent.get("/api/v1/vcpus")[2], "what can be traced is known")
    scraped = agent.get()[2].decode()
    status, _headers, body = agent.get("/-/ready")
    page, api = agent.get("/")[2].decode(), json.loads(agent.get("/api/v1/vcpus")[2])
    return Answers(once, once_json, check, scraped, (status, body.decode()), page, api, tuple(agent.log))


def make_stage(directory: Path) -> Path:
    """Make what `Way.build_prefix` takes."""
    directory.chmod(0o755)
    for name in ("repository", "packages", "btf"):
        (directory / name).mkdir(exist_ok=True)
        (directory / name).chmod(0o755)
    return directory
