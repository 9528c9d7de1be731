"""All attacks at once on one agent, while a real Prometheus scrapes it each second; and what came of it, as a table.

The agent listens on TCP, where it asks for a password, and at its Unix socket. It may have 1,024 fds. Strangers of
an unprivileged uid make VMs, others come over the network; honest VMs are root's, and a new one comes with every
sample. The attackers are nicer than the agent: they have what CPU is left, so that what is measured is the agent and
not a busy machine.

Here KVM never fires ``kvm_exit``, so no real vCPU can stall. What is to be found in time is a drill, asked for by root
at the socket: the detector gets simulated records, and all behind it is real. That a true stall is told of within 5 s
beside 16 vCPUs that flood the tracer, what a guest can do to hide it, is shown where notify exits can be had:
``test_a_flood_hides_nobodys_stall`` of ``tests/lab/inside/verdicts``.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from exporter.commands.drill import ask_for_drill
from exporter.stalls.drill import DRILL_SECONDS
from exporter.web.stall_handlers import PAUSE_SECONDS
from tests.agents import AgentProcess, open_agent
from tests.hostile.births import open_born
from tests.hostile.clients import open_clients
from tests.hostile.held import Attack
from tests.hostile.hung_owner import open_hung_owners
from tests.hostile.impostor import NOBODY, open_impostor
from tests.hostile.vm_flood import open_flood
from tests.live import GuestProcess, open_guest_process
from tests.live.monitored_hosts import find_rule_files
from tests.live.prometheus_server import Prometheus, Target, build_prometheus_config, open_prometheus
from tests.users import HEADERS, PASSWORD, USER, write_web_config
from tests.waiting import wait_until

MAX_FDS: Final = 1024
BIRTHS_A_SECOND: Final = 28  # 100,000 an hour
CLIENTS: Final = {"idle": 1000, "slow": 45, "guess": 2, "drill": 2, "exhaust": 100, "garbage": 4}
HONEST: Final = {f"shop-{number}": f"6c1b3a86-60c5-4d0a-9b22-1d7c5d8f6a0{number}" for number in (1, 2, 3)}
FLOOD_PROCESSES, FLOOD_VMS = 4, 80
HUNG: Final = 33
EVIL_NAME, EVIL_PATTERN = "a" * 127 + "!", "^([a-z]+-?)+$"
# One agent as so many targets, each scraped every so many seconds, for at most so many: one scrape a second.
TARGETS: Final = 10
NICE: Final = 10
PATIENCE_SECONDS: Final = 60.0
APPENDED_SECONDS: Final = 2.0  # until then a scrape has all its series in Prometheus


class Sample(NamedTuple):
    """What the agent uses at some moment, and how long the newest VM took to be shown by its name."""

    seconds: float
    resident_kb: int
    peak_kb: int
    fds: int
    threads: int
    log_lines: int
    shown_seconds: float
    errors: dict[str, int]
    """Why scrapes have failed so far, and how often."""


@dataclass
class Siege:
    """What was seen."""

    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    drills: list[float] = field(default_factory=list)
    """How long each took to be seen by Prometheus, in seconds."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    scrapes: int = 0
    failed_scrapes: int = 0
    longest_scrape_seconds: float = 0.0
    usual_scrape_seconds: float = 0.0
    """What 99 of 100 scrapes do not exceed."""
    honest_scrapes: dict[str, int] = field(default_factory=dict)
    """In how many scrapes each honest VM had all its vCPUs."""
    claimed_owners: int = 0
    stalls: float = 0.0
    alerts: dict[str, str] = field(default_factory=dict)
    """The severity of each alert that fired."""
    over_budget: float = 0.0
    log: list[str] = field(default_factory=list)
    stop_seconds: float = 0.0
    exit_code: int = 0


@contextmanager
def nicer(by: int) -> Iterator[None]:
    """Let what is started inside have what CPU others leave."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, before + by)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def read_sample(agent: AgentProcess, seconds: float, shown_seconds: float, errors: dict[str, int]) -> Sample:
    lines = Path(f"/proc/{agent.pid}/status").read_text().splitlines()
    status = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()}
    sizes = int(status["VmRSS"]), int(status["VmHWM"])
    return Sample(seconds, *sizes, len(agent.fds()), int(status["Threads"]), len(agent.log), shown_seconds, errors)


class _Stage:
    """Where it plays: the agent, Prometheus and the honest VMs."""

    def __init__(self, stack: ExitStack) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="siege-")))
        self.guests = [
            stack.enter_context(open_guest_process(name=name, uuid=uuid, vcpus=2, stats_fds=True, port_writes=1))
            for name, uuid in HONEST.items()
        ]
        flags = (f"--web.config.file={write_web_config(directory)}", f"--vm.exclude={EVIL_PATTERN}")
        prefix = ("sh", "-c", f'ulimit -n {MAX_FDS} && exec "$@"', "sh")
        self.agent = stack.enter_context(open_agent(*flags, prefix=prefix, headers=HEADERS))
        access = {"basic_auth": {"username": USER, "password": PASSWORD}}
        targets = [Target(self.agent.port, f"host-{number}:9750") for number in range(TARGETS)]
        config = build_prometheus_config(targets, find_rule_files(), interval_seconds=TARGETS, access=access)
        (directory / "prometheus").mkdir()
        self.prometheus: Prometheus = stack.enter_context(open_prometheus(directory / "prometheus", config))

    def measure_shown(self, expression: str) -> float:
        """How many seconds pass until Prometheus has a series: infinity where that takes too long."""
        try:
            return wait_until(lambda: self.prometheus.query(expression), seconds=PATIENCE_SECONDS, pause_seconds=0.1)
        except TimeoutError:
            return float("inf")

    @contextmanager
    def note_errors(self, errors: dict[str, int]) -> Iterator[None]:
        """Count why scrapes fail, which Prometheus itself does not remember."""
        ended = threading.Event()

        def note() -> None:
            noted = set[str]()
            while not ended.wait(1.0):
                for target in self.prometheus.ask("targets")["activeTargets"]:
                    if target["lastError"] and target["lastScrape"] not in noted:
                        noted.add(target["lastScrape"])
                        error = re.sub(r'Get "[^"]*": ', "", target["lastError"])
                        errors[error] = errors.get(error, 0) + 1

        thread = threading.Thread(target=note)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextmanager
def open_hung() -> Iterator[None]:
    """Let lookups hang. Not all the time: ``ps`` and ``pgrep -f`` of whoever works on this machine hang with them."""
    with ExitStack() as stack:
        with nicer(NICE):
            stack.enter_context(open_hung_owners(HUNG))
        yield


def open_attacks(stack: ExitStack, port: int, births_a_second: int) -> list[Attack]:
    """Begin everything."""
    name, uuid = next(iter(HONEST.items()))
    stack.enter_context(open_flood(FLOOD_PROCESSES, FLOOD_VMS, NOBODY - 1))
    stack.enter_context(open_impostor(name, uuid))
    stack.enter_context(open_guest_process(name=EVIL_NAME, stats_fds=True, port_writes=1))
    attacks = [stack.enter_context(open_born(births_a_second, name, uuid))]
    attacks += [stack.enter_context(open_clients(way, count, port)) for way, count in CLIENTS.items()]
    return attacks


def run_siege(
    seconds: float, samples: int, tell: Callable[[Sample], None], births_a_second: int = BIRTHS_A_SECOND
) -> Siege:
    """Attack for so long, and take so many samples, each of which is told at once."""
    seen = Siege()
    with ExitStack() as stack:
        stage = _Stage(stack)
        wait_until(lambda: set(stage.prometheus.find_targets().values()) == {"up"}, "the agent is scraped")
        for guest in stage.guests:
            vcpus = TARGETS * len(guest.vcpus)
            stage.measure_shown(f'count(kvm_vcpu_exits_total{{vm=~".*-{guest.pid}"}}) == {vcpus}')
        errors: dict[str, int] = {}
        stack.enter_context(stage.note_errors(errors))
        began, next_drill_at = time.monotonic(), 0.0
        with ExitStack() as attacking:
            with nicer(NICE):
                attacks = open_attacks(attacking, stage.agent.port, births_a_second)
            for number in range(1, samples + 1):
                if time.monotonic() >= next_drill_at:
                    next_drill_at = time.monotonic() + DRILL_SECONDS + PAUSE_SECONDS + 1
                    ask_for_drill(stage.agent.socket, f"{HONEST['shop-2']}-{stage.guests[1].pid}")
                    seen.drills.append(stage.measure_shown("kvm_vcpu_drill == 1"))
                with open_hung(), open_guest_process(name=f"late-{number}", stats_fds=True, port_writes=1):
                    shown_seconds = stage.measure_shown(f'kvm_vm_info{{name="late-{number}"}}')
                elapsed = time.monotonic() - began
                sample = read_sample(stage.agent, elapsed, shown_seconds, dict(errors))
                seen.samples.append(sample)
                tell(sample)
                # Samples are spread evenly over the time that it is to take.
                time.sleep(max(0.0, began + number * seconds / samples - time.monotonic()))
            _ask_what_was_seen(seen, stage, time.monotonic() - began)
            with open_hung():
                stage.agent.get()
                began = time.monotonic()
                seen.exit_code = stage.agent.close()  # with all attackers there
                seen.stop_seconds = time.monotonic() - began
            seen.log = stage.agent.log
            seen.counts = {attack.name: attack.stop() for attack in attacks}
    return seen


def _ask_what_was_seen(seen: Siege, stage: _Stage, seconds: float) -> None:
    """Ask Prometheus about the time of the siege, all at one moment: scrapes go on."""
    query = partial(stage.prometheus.query, at=time.time() - APPENDED_SECONDS)

    def ask(expression: str) -> float:
        found = query(expression)
        return float(found[0]["value"][1]) if found else 0.0

    span = f"[{seconds:.0f}s]"
    seen.seconds = seconds
    seen.scrapes = int(ask(f"sum(count_over_time(up{span}))"))
    seen.failed_scrapes = seen.scrapes - int(ask(f"sum(sum_over_time(up{span}))"))
    seen.longest_scrape_seconds = ask(f"max(max_over_time(scrape_duration_seconds{span}))")
    seen.usual_scrape_seconds = ask(f"max(quantile_over_time(0.99, scrape_duration_seconds{span}))")
    for guest in stage.guests:
        seen.honest_scrapes[str(guest.pid)] = _count_honest(query, guest, span)
    seen.claimed_owners = len(query(f'last_over_time(kvm_vm_info{{project!=""}}{span})'))
    seen.stalls = ask(f"max(max_over_time(kvm_vcpu_no_forward_progress{span}))")
    seen.over_budget = ask("max(kvm_host_vms_over_budget)")
    for series in query(f'last_over_time(ALERTS{{alertstate="firing", drill!="yes"}}{span})'):
        seen.alerts[series["metric"]["alertname"]] = series["metric"]["severity"]


def _count_honest(query: Callable[[str], list[dict[str, Any]]], guest: GuestProcess, span: str) -> int:
    """In how many scrapes an honest VM had all its vCPUs."""
    found = query(f'count_over_time(kvm_vcpu_exits_total{{vm=~".*-{guest.pid}"}}{span})')
    counts = [int(series["value"][1]) for series in found]
    return sum(counts) // len(guest.vcpus) if len(counts) == TARGETS * len(guest.vcpus) else 0
