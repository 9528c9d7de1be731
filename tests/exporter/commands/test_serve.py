"""A real agent at sockets that it was given, as systemd gives them."""

from __future__ import annotations

import fcntl
import http.client
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from exporter.cli import parse_command_line
from exporter.commands.agent_socket import UnixConnection
from exporter.commands.serve import choose_addresses
from exporter.web.listeners import TcpAddress
from tests.agents import ROOT
from tests.exporter.service.listening_manager import open_manager

SERVE_THEM = "--web.systemd-socket"
# What systemd does between fork() and execve().
PASS_ON = """
import os, sys
fds = [int(word) for word in sys.argv[1].split(",")]
for number, fd in enumerate(fds):
    os.dup2(fd, 3 + number, inheritable=True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": "http:local"}
os.execv(sys.executable, [sys.executable, "-m", "exporter", *sys.argv[2:]])
"""


def test_an_address_that_is_named_twice_is_listened_on_once() -> None:
    twice = parse_command_line(["--web.listen-address=:9751", "--web.listen-address=:9751"]).listen_addresses
    assert choose_addresses(twice, is_protected=False) == (TcpAddress("", 9751),)


def get(connection: http.client.HTTPConnection) -> int:
    with closing(connection):
        connection.request("GET", "/-/healthy")
        return connection.getresponse().status


@contextmanager
def start(*sockets: socket.socket, flag: str = SERVE_THEM) -> Iterator[subprocess.Popen[str]]:
    """Run an agent from the moment at which it is ready."""
    with open_manager() as manager:
        fds = [fcntl.fcntl(sock, fcntl.F_DUPFD, 100) for sock in sockets]
        words = [sys.executable, "-c", PASS_ON, ",".join(map(str, fds)), "demo", flag]
        environment = {**os.environ, "NOTIFY_SOCKET": manager.address}
        with subprocess.Popen(
            words, cwd=ROOT, env=environment, pass_fds=fds, stderr=subprocess.PIPE, text=True
        ) as process:
            for fd in fds:
                os.close(fd)
            try:
                manager.take_until(READY="1")
                yield process
            finally:
                process.terminate()


def test_it_serves_at_all_of_them_and_leaves_them_open(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        port = tcp.getsockname()[1]
        for _ in range(2):  # the second agent takes over
            with start(tcp, unix) as process:
                assert get(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) == 200
                assert get(UnixConnection(str(path))) == 200
                process.terminate()
                _, log = process.communicate(timeout=30)
            assert process.returncode == 0
            assert f"msg=listening address=127.0.0.1:{port}" in log
            assert f"msg=listening address=unix:{path}" in log
        # Between two agents, clients wait.
        with socket.create_connection(("127.0.0.1", port)) as waiting:
            waiting.sendall(b"GET /-/healthy HTTP/1.0\r\n\r\n")
            with start(tcp):
                assert waiting.recv(100).startswith(b"HTTP/1.0 200")


def test_sockets_that_are_not_wanted_are_told_of() -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        port = tcp.getsockname()[1]
        with start(tcp, flag="--web.listen-address=127.0.0.1:0") as process:
            process.terminate()
            _, log = process.communicate(timeout=30)
    assert f'msg="systemd\'s sockets are not served, and whoever connects there waits" address=127.0.0.1:{port}' in log


def test_without_a_socket_it_says_what_is_missing() -> None:
    words = [sys.executable, "-m", "exporter", "demo", SERVE_THEM]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no socket was passed on; is a .socket of the agent's unit active?" in done.stderr


def test_one_cannot_have_both() -> None:
    words = [sys.executable, "-m", "exporter", "demo", SERVE_THEM, "--web.listen-address=:9750"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not allowed with argument" in done.stderr
