"""A real agent of a simulated host, started as systemd starts one: what it says of itself, and how it ends."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.commands.lifetime import STOP_SECONDS
from tests.agents import ROOT
from tests.exporter.service.listening_manager import ListeningManager, open_manager
from tests.users import write_web_config

# The third snapshot of this host does not end, as with a kernel that hangs.
HANGS = """
import sys, threading
from exporter.cli import main
from kvm.simulated.host import SimulatedHost
read, reads = SimulatedHost.read, []
def hang(host):
    reads.append(host)
    if len(reads) > 2:
        print('hangs', file=sys.stderr)
        threading.Event().wait()
    return read(host)
SimulatedHost.read = hang
sys.exit(main())
"""
PROGRAM = "import sys; from exporter.cli import main; sys.exit(main())"


class Agent:
    """A process and what it tells its service manager."""

    def __init__(self, process: subprocess.Popen[str], manager: ListeningManager) -> None:
        self.process, self.manager = process, manager
        self.log = ""

    def end(self, number: signal.Signals = signal.SIGTERM) -> float:
        """End it; after how many seconds it has."""
        began = time.monotonic()
        self.process.send_signal(number)
        _, self.log = self.process.communicate(timeout=60)
        return time.monotonic() - began


@contextmanager
def start(*flags: str, program: str = PROGRAM, **environment: str) -> Iterator[Agent]:
    with open_manager() as manager:
        words = [sys.executable, "-c", program, "demo", "--web.listen-address=127.0.0.1:0", *flags]
        variables = {**os.environ, "NOTIFY_SOCKET": manager.address, **environment}
        with subprocess.Popen(words, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True) as process:
            try:
                yield Agent(process, manager)
            finally:
                process.kill()


def test_it_is_ready_when_it_listens_and_says_how_the_host_is() -> None:
    wanted = re.compile(r"\d+ VMs(, \d+ [a-z ]+)*")
    with start() as agent:
        agent.manager.take_until(READY="1")
        while not any(wanted.fullmatch(told.get("STATUS", "")) for told in agent.manager.told):
            agent.manager.take()
        agent.end()
        assert agent.manager.take_waiting()[-1] == {"STOPPING": "1"}
        assert agent.process.returncode == 0
    assert {"WATCHDOG": "1"} not in agent.manager.told, "nobody has asked for signs of life"


def test_a_reload_begins_and_ends(tmp_path: Path) -> None:
    with start(f"--web.config.file={write_web_config(str(tmp_path))}") as agent:
        agent.manager.take_until(READY="1")
        agent.process.send_signal(signal.SIGHUP)
        assert set(agent.manager.take_until(RELOADING="1")) == {"RELOADING", "MONOTONIC_USEC"}
        agent.manager.take_until(READY="1")
        agent.end()
    assert "web configuration reloaded" in agent.log


def test_a_reload_that_fails_ends_too(tmp_path: Path) -> None:
    config = Path(write_web_config(str(tmp_path)))
    with start(f"--web.config.file={config}") as agent:
        agent.manager.take_until(READY="1")
        config.write_text("nonsense: 1\n")
        agent.process.send_signal(signal.SIGHUP)
        agent.manager.take_until(RELOADING="1")
        agent.manager.take_until(READY="1")
        agent.end()
    assert "web configuration not reloaded, the old one stays" in agent.log


def test_a_child_gets_none_of_the_variables() -> None:
    program = (
        "import os, exporter.commands.lifetime; from exporter.service.manager import open_service_manager;"
        "open_service_manager(os.environ, os.getpid()); os.execvp('env', ['env'])"
    )
    variables = {**os.environ, "NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )
    assert "NOTIFY_SOCKET" not in done.stdout
    assert "WATCHDOG" not in done.stdout


def test_signs_of_life_come_as_often_as_asked_for() -> None:
    with start(WATCHDOG_USEC="300000") as agent:
        agent.manager.take_until(READY="1")
        for _ in range(5):
            agent.manager.take_until(WATCHDOG="1")
        agent.end()


def ask_slowly(port: int) -> socket.socket:
    """A client that asks for metrics and takes none of them."""
    client = socket.create_connection(("127.0.0.1", port), timeout=30)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
    return client


def find_port(agent: Agent) -> int:
    assert agent.process.stderr is not None
    for line in agent.process.stderr:
        if match := re.search(r"msg=listening address=127\.0\.0\.1:(\d+)", line):
            return int(match[1])
    raise AssertionError("the agent does not listen")


def wait_for_hang(agent: Agent) -> None:
    assert agent.process.stderr is not None
    assert any(line == "hangs\n" for line in agent.process.stderr)


def test_clients_do_not_hold_it_up() -> None:
    """Idle, half-way through a request, and reading slowly. How long it took, a busy machine decides."""
    with start() as agent:
        port = find_port(agent)
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for client in clients[:10]:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")
        clients += [ask_slowly(port) for _ in range(5)]
        agent.manager.take_until(READY="1")
        agent.end()
        for client in clients:
            client.close()
    assert agent.process.returncode == 0


def test_a_snapshot_that_hangs_ends_neither_signs_at_once_nor_the_agent_late() -> None:
    with start("--poll=always", program=HANGS) as agent:
        port = find_port(agent)
        agent.manager.take_until(READY="1")
        wait_for_hang(agent)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("GET", "/-/healthy")
            assert connection.getresponse().status == 200
        seconds = agent.end()
        assert agent.process.returncode == 0
    assert STOP_SECONDS <= seconds < 30, "it waits for the snapshot as long as there is time, and not for ever"
    assert "ended before all of it had" in agent.log
    assert "Traceback" not in agent.log


def test_an_agent_that_is_aborted_says_where_it_hung() -> None:
    """What systemd does when signs of life stay away."""
    with start("--poll=always", program=HANGS) as agent:
        agent.manager.take_until(READY="1")
        wait_for_hang(agent)
        agent.end(signal.SIGABRT)
        assert agent.process.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in agent.log
    assert "in hang" in agent.log
