"""The agent that the package has installed reads every vCPU by bpf, traces, and outlives what is done to it."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from exporter.commands.agent_socket import UnixConnection
from tests.live import GuestProcess, open_guest_process
from tests.waiting import wait_until

UNIT = "kvm-notify-exporter.service"
SOCKET = "/run/kvm-notify-exporter/agent.sock"
TOTAL = "kvm_host_notify_window_exits_total"
# Emulated CPUs take turns, and each agent loads its eBPF programs anew.
SECONDS = 240.0


def run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def show(name: str) -> str:
    return run("systemctl", "show", "--value", f"--property={name}", UNIT)


def find_journal() -> str:
    return run("journalctl", "--no-pager", "--lines=60", f"--unit={UNIT}")


def read_samples(name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """Scrape, as a Prometheus does: the values of a metric by their labels; nothing where nobody listens."""
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", 9750, timeout=60)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
    except ConnectionError:
        return {}
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def read_total() -> float | None:
    return read_samples(TOTAL).get(())


def read_vcpus() -> list[dict[str, Any]]:
    """What root is told at the socket."""
    with closing(UnixConnection(SOCKET)) as connection:
        connection.request("GET", "/api/v1/vcpus")
        found: list[dict[str, Any]] = json.loads(connection.getresponse().read())["vcpus"]
    return found


@pytest.fixture(scope="module", autouse=True)
def guest() -> Iterator[GuestProcess]:
    with open_guest_process(vcpus=2, name="stuck", stats_fds=True, port_writes=23) as guest:
        yield guest


def wait_for_reading() -> None:
    """Until both vCPUs are read, by bpf."""

    def has_all() -> bool:
        sources = {dict(labels)["source"] for labels in read_samples("kvm_vm_source_info")}
        return sources == {"bpf"} and len(read_samples("kvm_vcpu_exits_total")) == 2

    wait_until(has_all, find_journal, SECONDS, pause_seconds=1)


def check_tracing(guest: GuestProcess) -> str:
    """Have a vCPU stall, and wait until the agent has seen at which RIP; returns that."""

    def find_stalled() -> list[dict[str, Any]]:
        return [vcpu for vcpu in read_vcpus() if (vcpu["vcpu"], vcpu["state"]) == (1, "stalled")]

    guest.notify(1, exits=0)
    try:
        wait_until(find_stalled, lambda: f"{read_vcpus()}\n{find_journal()}", SECONDS, pause_seconds=1)
        (found,) = find_stalled()
    finally:
        guest.stop()
        guest.wait_for("done")
    assert found["evidence"] == "trace"
    assert found["traced_exits"] > 0
    return str(found["rip"])


def test_it_is_a_user_of_its_own_that_has_seen_every_vcpu(guest: GuestProcess, tell: Callable[[str], None]) -> None:
    wait_for_reading()
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{show('MainPID')}/status").read_text().splitlines())
    uids = status["Uid"].split()
    assert set(uids) == {run("id", "--user", "kvm-notify-exporter")}
    assert "0" not in uids
    exits = read_samples("kvm_vcpu_exits_total")
    assert min(exits.values()) >= 23
    assert read_samples("kvm_exporter_complete") == {(): 1.0}
    assert read_total() == 0
    wait_until(lambda: show("StatusText") == "1 VM", lambda: show("StatusText"), SECONDS, pause_seconds=1)
    paranoid = Path("/proc/sys/kernel/perf_event_paranoid").read_text().strip()
    tell(f"uid {uids[0]}, capabilities {status['CapEff'].strip()}, paranoid {paranoid}: 2 vCPUs by bpf")


def test_it_tells_of_a_stall_and_where_it_is(guest: GuestProcess, tell: Callable[[str], None]) -> None:
    rip = check_tracing(guest)
    assert "vCPU makes no forward progress" in find_journal()
    assert (read_total() or 0) > 0
    tell(f"a stall at {rip}, {read_total():.0f} notify exits counted")


def reload() -> None:
    run("systemctl", "reload", UNIT)


def restart() -> None:
    run("systemctl", "restart", UNIT)


def upgrade() -> None:
    run("dpkg", "--install", "/srv/package.deb")


def kill() -> None:
    run("systemctl", "kill", "--signal=KILL", UNIT)


@pytest.mark.parametrize(
    ("act", "is_new", "keeps_total"),
    [(reload, False, True), (restart, True, True), (upgrade, True, True), (kill, True, False)],
    ids=["HUP", "TERM", "upgrade", "KILL"],
)
def test_it_outlives_that_and_reads_and_traces(
    act: Callable[[], None], is_new: bool, keeps_total: bool, guest: GuestProcess, tell: Callable[[str], None]
) -> None:
    pid, began = show("MainPID"), time.monotonic()
    before = read_total()
    assert before
    act()
    wait_until(lambda: (show("MainPID") != pid) == is_new and show("ActiveState") == "active", find_journal, SECONDS)
    wait_for_reading()
    back, after = time.monotonic() - began, read_total()
    assert after is not None
    assert after >= before if keeps_total else after < before
    rip = check_tracing(guest)
    tell(f"after {act.__name__}: read again after {back:.0f} s, total {before:.0f} -> {after:.0f}, a stall at {rip}")
