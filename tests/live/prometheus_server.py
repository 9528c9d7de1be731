"""Debian's Prometheus and Alertmanager as processes of a test.

Each server has a directory of its own and listens on 127.0.0.1, on a port that was free a moment before; should another
process be quicker, the next port is tried. Who opens one ends it and waits for it. What a server wrote to stderr is
part of every `ServerError`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import socket
import subprocess
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_until

START_SECONDS = 60.0
STOP_SECONDS = 60.0
ANSWER_SECONDS = 60.0
PORTS_TO_TRY = 5
LAST_WORDS = 4000
PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "amtool": "prometheus-alertmanager",
}

Labels = dict[str, str]
Parameters = Sequence[tuple[str, str]]


class ServerError(Exception):
    """A server did not start, or answered with an error."""


def find_program(name: str) -> str:
    """The path of one of Debian's programs; skips the test where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name} here: apt-get install {PACKAGES[name]}")
    return found


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A running server; made by `open_server`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._log = log

    def read_log(self) -> str:
        """What it has written to stderr."""
        return self._log.read_text(errors="replace")

    def fail(self, reason: str) -> ServerError:
        return ServerError(f"{reason}; its last words:\n{self.read_log()[-LAST_WORDS:]}")

    def fetch(self, path: str, parameters: Parameters = ()) -> tuple[int, bytes]:
        """Ask once, with the parameters in the body if there are any; the status and the body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        with contextlib.closing(connection):
            if parameters:
                form = {"Content-Type": "application/x-www-form-urlencoded"}
                connection.request("POST", path, urllib.parse.urlencode(parameters), form)
            else:
                connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def is_ready(self) -> bool:
        try:
            return self.fetch("/-/ready")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def wait(self) -> bool:
        """Wait until it is ready; False if its port was taken."""
        wait_until(lambda: self.process.poll() is not None or self.is_ready(), self.read_log, START_SECONDS)
        if self.process.poll() is None:
            return True
        if "address already in use" in self.read_log():
            return False
        raise self.fail(f"ended with {self.process.returncode}")


def end_process(process: subprocess.Popen[Any], seconds: float = STOP_SECONDS) -> int:
    """End a process as an operator would, kill one that does not listen; returns its exit code."""
    process.terminate()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@contextmanager
def open_server(make_words: Callable[[int], list[str]], directory: Path) -> Iterator[Server]:
    """Run a server until it is ready; `make_words` gives its command line for a port."""
    log = directory / "stderr"
    for _attempt in range(PORTS_TO_TRY):
        port = find_free_port()
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                make_words(port), cwd=directory, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr
            )
        server = Server(process, port, log)
        try:
            if not server.wait():
                continue
            yield server
            return
        finally:
            end_process(process)
    raise ServerError(f"{PORTS_TO_TRY} free ports were all taken by others")


@dataclass(frozen=True)
class Target:
    """What is to be scraped: where it listens, and the labels that its series get."""

    port: int
    instance: str
    job: str = "kvm-notify-exporter"


def build_prometheus_config(
    targets: Sequence[Target],
    rule_files: Sequence[Path],
    alertmanager_port: int | None = None,
    interval_seconds: int = 1,
    access: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A configuration for a Prometheus that scrapes and evaluates so often; ``access`` is how, by TLS say."""
    interval = f"{interval_seconds}s"
    managers = [] if alertmanager_port is None else [f"127.0.0.1:{alertmanager_port}"]
    return {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(path) for path in rule_files],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": managers}]}]},
        "scrape_configs": [
            {
                "job_name": job,
                **(access or {}),
                # As any Prometheus does by default: a label that a target has as well would be renamed by it.
                "honor_labels": False,
                "static_configs": [
                    {"targets": [f"127.0.0.1:{target.port}"], "labels": {"instance": target.instance}}
                    for target in targets
                    if target.job == job
                ],
            }
            for job in sorted({target.job for target in targets})
        ],
    }


class Prometheus:
    """Questions to a running Prometheus. An answer with a warning is an error."""

    def __init__(self, server: Server, config_file: Path) -> None:
        self.server = server
        self._config_file = config_file

    def forget(self, instance: str) -> None:
        """Take a target out of the configuration, as service discovery would, and wait until it is gone."""
        config = json.loads(self._config_file.read_text())
        for job in config["scrape_configs"]:
            job["static_configs"] = [one for one in job["static_configs"] if one["labels"]["instance"] != instance]
        self._config_file.write_text(json.dumps(config))
        self.server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: instance not in self.find_targets(), f"{instance} is forgotten", ANSWER_SECONDS)

    def find_targets(self) -> dict[str, str]:
        """What is scraped: the health (``up``, ``down``, ``unknown``) of each instance."""
        targets = self.ask("targets")["activeTargets"]
        return {target["labels"]["instance"]: target["health"] for target in targets}

    def ask(self, path: str, *parameters: tuple[str, str]) -> Any:  # noqa: ANN401 - JSON
        """What its HTTP API answers; raises ServerError for an error or a warning."""
        _status, body = self.server.fetch(f"/api/v1/{path}", parameters)
        answer = json.loads(body)
        if answer["status"] != "success" or answer.get("warnings"):
            raise ServerError(f"{path} {parameters}: {answer.get('error') or answer.get('warnings')}")
        return answer["data"]

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """The series of an instant query, each with ``metric`` and ``value``; at some Unix time, by default now."""
        data = self.ask("query", ("query", expression), *([] if at is None else [("time", f"{at:.3f}")]))
        return [] if data["resultType"] == "scalar" else list(data["result"])

    def query_range(self, expression: str, start: float, end: float, step: float = 1.0) -> list[dict[str, Any]]:
        """The series of an expression in a window of time, each with ``metric`` and ``values``."""
        window = (("start", f"{start:.3f}"), ("end", f"{end:.3f}"), ("step", f"{step:.3f}"))
        return list(self.ask("query_range", ("query", expression), *window)["result"])

    def find_values(self, label: str, selector: str = "") -> list[str]:
        """The values of a label, as a dashboard's variable asks for them."""
        match = f"?match[]={urllib.parse.quote(selector)}" if selector else ""
        return list(self.ask(f"label/{label}/values{match}"))

    def find_rules(self) -> list[dict[str, Any]]:
        """All rules, each with its ``health`` and, where it failed, ``lastError``."""
        return [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]

    def find_alerts(self) -> list[dict[str, Any]]:
        """The alerts that are pending or firing."""
        return list(self.ask("alerts")["alerts"])


@contextmanager
def open_prometheus(directory: Path, config: Mapping[str, Any], *flags: str) -> Iterator[Prometheus]:
    """Run a Prometheus on a configuration; its data stay in ``directory/data``."""
    program = find_program("prometheus")
    path = directory / "prometheus.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    check = subprocess.run(
        [find_program("promtool"), "check", "config", str(path)], capture_output=True, text=True, check=False
    )
    if check.returncode:
        raise ServerError(f"promtool check config: {check.stdout}{check.stderr}")

    def make_words(port: int) -> list[str]:
        return [
            program,
            f"--config.file={path}",
            f"--storage.tsdb.path={directory}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            *flags,
        ]

    with open_server(make_words, directory) as server:
        yield Prometheus(server, path)


def create_blocks(directory: Path, openmetrics: Iterable[str]) -> None:
    """Write lines of history into the data of a Prometheus that is to be opened on this directory."""
    source = directory / "history.om"
    with source.open("w") as file:
        file.writelines(openmetrics)
        file.write("# EOF\n")
    # Few blocks are written faster than one for every two hours.
    options = ["--max-block-duration=162h"]
    command = [find_program("promtool"), "tsdb", "create-blocks-from", "openmetrics", *options]
    words = [*command, str(source), f"{directory}/data"]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    if run.returncode:
        raise ServerError(f"promtool tsdb create-blocks-from: {run.stdout[-LAST_WORDS:]}{run.stderr[-LAST_WORDS:]}")


@contextmanager
def open_alertmanager(directory: Path, config: Mapping[str, Any]) -> Iterator[Server]:
    """Run an Alertmanager on a configuration, alone: without a cluster."""
    program = find_program("prometheus-alertmanager")
    path = directory / "alertmanager.yml"
    path.write_text(json.dumps(config))

    def make_words(port: int) -> list[str]:
        return [
            program,
            f"--config.file={path}",
            f"--storage.path={directory}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
        ]

    with open_server(make_words, directory) as server:
        yield server
