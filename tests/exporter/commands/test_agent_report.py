"""``once --from-agent``: what a running agent is asked, and what is said where none answers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from exporter.commands.agent_report import is_all_known, read_agent_report, render_report
from exporter.commands.agent_socket import MAX_ANSWER_BYTES, AgentUnreachable, ask_agent
from exporter.commands.drill import ask_for_drill
from exporter.stalls.verdicts import MonitorReport
from exporter.web.listeners import TcpAddress, UnixAddress
from exporter.web.vcpus_json import build_document
from kvm.model import Snapshot
from tests.agents import ROOT, open_agent, run_agent
from tests.reports import make_report
from tests.snapshots import HIDDEN, make_reading, make_snapshot, make_unread


def build(snapshot: Snapshot | None, *, with_details: bool = True, problem: str = "") -> dict[str, Any]:
    """What the agent answers, by the code that makes it, as a client reads it."""
    report = MonitorReport(vcpus=(make_report(),), problem=problem)
    document = build_document(report, snapshot, 1000.0, 1_800_000_000.0, with_details)
    found: dict[str, Any] = json.loads(json.dumps(document))
    return found


def test_the_table_says_who_is_stuck_whose_it_is_and_since_when() -> None:
    document = build(make_snapshot(make_reading()))
    assert render_report(document) == (
        "VM         NAME  OWNER  VMM    PID  VCPU  STATE    STUCK SINCE           RIP                 NOTIFY EXITS  "
        "REASON\n"
        "uuid-4242  web   shop   qemu  4242     0  stalled  2027-01-15T07:44:59Z  0xffffffff81012345          1234  "
        "it took 40 notify exits in a row at one RIP\n"
    )
    assert is_all_known(document)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (build(None), "the agent has not read the host yet"),
        (build(make_snapshot(blind_spots=HIDDEN)), "VMs may be missing: "),
        (build(make_snapshot(make_reading(), make_unread())), "VMs that could not be read: 1"),
        (build(make_snapshot(make_reading()), problem="perf is closed"), "stalls are not found: perf is closed"),
    ],
)
def test_what_the_agent_cannot_tell_is_no_all_clear(document: dict[str, Any], said: str) -> None:
    assert said in render_report(document)
    assert said in render_report(document | {"vcpus": []})
    assert not is_all_known(document)


def test_who_is_not_known_sees_states_and_is_told_what_is_left_out() -> None:
    document = build(make_snapshot(make_reading()), with_details=False)
    table = render_report(document)
    assert "stalled" in table
    assert "names, owners and RIPs are for root" in table
    assert "shop" not in table
    assert is_all_known(document)


def test_the_command_prints_what_a_running_agent_knows() -> None:
    with open_agent(command="demo") as agent:
        ask_for_drill(agent.socket, "gateway-1")
        table = run_agent("once", f"--from-agent={agent.socket}")
        printed = json.loads(run_agent("once", f"--from-agent={agent.socket}", "--format=json"))
    (row,) = (line for line in table.splitlines() if " gateway-1 " in line)
    assert "stalled (drill)" in row
    (vcpu,) = (vcpu for vcpu in printed["vcpus"] if vcpu["drill"])
    assert (vcpu["name"], vcpu["state"], printed["details"]) == ("gateway-1", "stalled", True)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ["--from-agent=unix:/nowhere/agent.sock"],
            1,
            "No such file or directory; start it (systemctl start kvm-notify-exporter), or name the socket that it "
            "has (unix:PATH)",
        ),
        (["--from-agent=127.0.0.1:9750"], 1, "want unix:PATH"),
        (["--from-agent=unix:/nowhere/agent.sock", "--format=prometheus"], 2, "prints a table or JSON"),
        (["--from-agent=unix:/nowhere/agent.sock", "--output=/nowhere/a.prom"], 2, "prints a table or JSON"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_an_exit_code(words: list[str], code: int, said: str) -> None:
    command = [sys.executable, "-m", "exporter", "once", *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (code, "")
    assert said in run.stderr
    assert len(run.stderr.splitlines()) == 1


@contextmanager
def open_impostor(path: Path, *pieces: bytes) -> Iterator[UnixAddress]:
    """Answer one client with these bytes, whatever it asks."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def answer() -> None:
            client, _address = listener.accept()
            with client:
                client.recv(65536)
                try:
                    for piece in pieces:
                        client.sendall(piece)
                except OSError:  # it has heard enough
                    return

        thread = threading.Thread(target=answer)
        thread.start()
        yield UnixAddress(str(path))
        thread.join()


OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        (b"SSH-2.0-OpenSSH\r\n",),
        (b"",),
        (OK, b"<html>"),
        (OK, b"[]"),
        (OK, b"[" * 20_000),
        (OK, b'{"vcpus": [1]}'),
        (OK, b'{"complete": true, "unread_vms": 0, "problem": null, "vcpus": []}'),
        (OK, *[b" " * (1 << 20)] * ((MAX_ANSWER_BYTES >> 20) + 2)),
        (b"HTTP/1.1 503 Later\r\nConnection: close\r\n\r\nlater",),
    ],
)
def test_what_is_no_agent_is_said_to_be_none(pieces: tuple[bytes, ...], tmp_path: Path) -> None:
    with open_impostor(tmp_path / "s", *pieces) as address, pytest.raises(AgentUnreachable, match=r"no agent|not tell"):
        read_agent_report(address)


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[1]", b"[" * 20_000])
def test_what_is_no_agent_begins_no_drill(body: bytes, tmp_path: Path) -> None:
    with open_impostor(tmp_path / "s", OK, body) as address, pytest.raises(AgentUnreachable, match="no agent"):
        ask_for_drill(address, "web")


def test_an_address_that_is_no_socket_is_refused() -> None:
    with pytest.raises(ValueError, match="want unix:PATH"):
        ask_agent(TcpAddress("127.0.0.1", 9750), "GET", "/")
