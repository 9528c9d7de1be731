"""Runs the real agent as a process and asks it over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from exporter.commands.agent_socket import UnixConnection
from exporter.web.listeners import UnixAddress
from tests.users import HEADERS, write_web_config
from tests.waiting import wait_until

T = TypeVar("T")
Connect = Callable[[int], http.client.HTTPConnection]
ROOT = Path(__file__).parent.parent
# Far above what is usual: under emulation it takes a minute to load eBPF programs.
START_SECONDS = 240.0


def connect_plain(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=60)


class AgentProcess:
    """A running agent; made by `open_agent`. ``connect`` is how to talk to it at a port, ``headers`` what to say."""

    def __init__(
        self,
        process: subprocess.Popen[str],
        socket_path: str = "",
        connect: Connect = connect_plain,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.process = process
        self.socket = UnixAddress(socket_path)
        self._connect, self._headers = connect, dict(headers or {})
        self.pid = process.pid
        self.log: list[str] = []
        self._news = threading.Condition()
        self._listening = threading.Event()
        self.port = 0
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.log.append(line.rstrip("\n"))
                self._news.notify_all()
            if match := re.search(r"msg=listening address=127\.0\.0\.1:(\d+)", line):
                self.port = int(match[1])
                self._listening.set()
        self._listening.set()

    def wait(self, *, blind: bool = False) -> None:
        """Wait until it listens and has taken its first snapshot, in which one that is ``blind`` sees nothing."""
        if not self._listening.wait(START_SECONDS) or not self.port:
            raise RuntimeError(f"the agent does not listen: {self.log}")

        def has_seen() -> bool:
            status, _headers, body = self.get("/-/ready")
            return status == 200 or (blind and b"nothing of this host can be seen" in body)

        wait_until(has_seen, lambda: f"the agent is ready: {self.log}", START_SECONDS)

    def wait_for_log(self, find: Callable[[], T], seconds: float) -> T:
        """Return what is found in the log, as soon as a line makes it something; after so long, whatever it is."""
        with self._news:
            return self._news.wait_for(find, seconds)

    def get_text(self, path: str) -> str:
        """Ask once at the Unix socket: there the agent sees that it is root who asks."""
        with contextlib.closing(UnixConnection(self.socket.path)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        assert answer.status == 200
        return body.decode()

    def get_json(self, path: str) -> dict[str, Any]:
        """Ask once for JSON, at the Unix socket."""
        document: dict[str, Any] = json.loads(self.get_text(path))
        return document

    def get(self, path: str = "/metrics", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Ask once: status, headers in lower case, body."""
        connection = self._connect(self.port)
        with contextlib.closing(connection):
            words = self._headers | {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request("GET", path, headers=words)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def has_answer(self, path: str, seconds: float) -> bool:
        """Whether it answers within so many seconds, as a Prometheus would ask."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        with contextlib.closing(connection):
            try:
                connection.request("GET", path)
                connection.getresponse().read()
            except TimeoutError:
                return False
            return True

    def scrape(self, path: str = "/metrics") -> dict[str, Metric]:
        """Scrape once; families by name, as prometheus-client's own parser reads them."""
        status, _headers, body = self.get(path)
        assert status == 200, body
        return {family.name: family for family in text_string_to_metric_families(body.decode())}

    def samples(self, name: str, **labels: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Scrape once; the values of one metric's samples that have these labels, by their other labels."""
        family = self.scrape().get(name.removesuffix("_total"))
        return {
            tuple(sorted((key, value) for key, value in sample.labels.items() if key not in labels)): sample.value
            for sample in (family.samples if family else ())
            if labels.items() <= sample.labels.items()
        }

    def find_vm(self, pid: int) -> dict[str, str]:
        """The labels of a process's VM, once it is shown: a new VM may have to wait for a second snapshot.

        Its process may have been looked at just before it made the VM, and slowly, or its owner is not known at once.
        """

        def find() -> list[dict[str, str]]:
            info = self.scrape().get("kvm_vm_info")
            return [sample.labels for sample in (info.samples if info else ()) if sample.labels["pid"] == str(pid)]

        wait_until(find, f"the VM of process {pid}")
        (labels,) = find()
        return labels

    def fds(self) -> set[str]:
        """The numbers of its open fds."""
        return set(os.listdir(f"/proc/{self.pid}/fd"))

    def close(self) -> int:
        """End it as an operator would; returns its exit code."""
        self.process.terminate()
        code = self.process.wait(30)
        self._reader.join()
        return code


@contextmanager
def open_agent(
    *flags: str,
    command: str = "serve",
    prefix: Sequence[str] = (),
    connect: Connect = connect_plain,
    headers: Mapping[str, str] | None = None,
) -> Iterator[AgentProcess]:
    """Run the agent on a free port until it is ready; end it on the way out. ``prefix`` is a command that runs it."""
    with ExitStack() as stack:
        path = f"{stack.enter_context(tempfile.TemporaryDirectory(prefix='agent-'))}/agent.sock"
        addresses = ["--web.listen-address=127.0.0.1:0", f"--web.listen-address=unix:{path}"]
        words = [*prefix, sys.executable, "-m", "exporter", command, *addresses, *flags]
        process = stack.enter_context(subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        agent = AgentProcess(process, path, connect, headers)
        try:
            agent.wait()
            yield agent
        finally:
            agent.close()


@contextmanager
def open_known_agent(*flags: str, command: str = "serve") -> Iterator[AgentProcess]:
    """Run an agent that asks for a password, which we and the browser of tests know: so it shows us names over TCP."""
    with tempfile.TemporaryDirectory(prefix="web-") as directory:
        flag = f"--web.config.file={write_web_config(directory)}"
        with open_agent(flag, *flags, command=command, headers=HEADERS) as agent:
            yield agent


def run_agent(*words: str, expect: Sequence[int] = (0,), prefix: Sequence[str] = ()) -> str:
    """Run a command of the agent to its end; returns what it prints. ``prefix`` is a command that runs it."""
    command = [*prefix, sys.executable, "-m", "exporter", *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode in expect, (run.returncode, run.stdout, run.stderr)
    assert "Traceback" not in run.stderr
    return run.stdout


def run_once_json(*flags: str) -> dict[int, list[dict[str, object]]]:
    """Take one snapshot with the real command; VMs by pid."""
    vms: dict[int, list[dict[str, object]]] = {}
    for vm in json.loads(run_agent("once", "--format=json", *flags))["vms"]:
        vms.setdefault(vm["pid"], []).append(vm)
    return vms
