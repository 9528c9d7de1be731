"""A large simulated fleet, and its agents: ``python -m tests.bench.large_fleet HOSTS VMS UNIX_TIME`` serves them.

All agents are on one port, each at a path of its own: ``/0``, ``/1``, ... The program prints the port and how many
series it has. Most series stand still, as those of a real agent do; they are rendered once.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from exporter.prometheus.exposition import render_number, render_series
from exporter.prometheus.metrics import order_labels
from grafana.builder.queries import UP
from kvm.model import Protection
from tests.live.history_writer import ByHour
from tests.live.simulated_fleet import Host, Spell, Vm, make_series, make_uuid

VCPUS: Final = 4
LARGEST_HOST_VMS: Final = 1000
FOREVER: Final = 10.0
# By CPU: name, family, model, stepping, microcodes, and whether it has notify exits.
CPUS: Final = (
    ("Intel(R) Xeon(R) Platinum 8480+", "6", "143", "8", ("0x2b000643", "0x2b000661"), True),
    ("INTEL(R) XEON(R) PLATINUM 8592+", "6", "207", "2", ("0x21000291", "0x210002b3"), True),
    ("Intel(R) Xeon(R) 6980P", "6", "173", "1", ("0x10003f3", "0xa0000d1"), True),
    ("AMD EPYC 9654 96-Core Processor", "25", "17", "1", ("0xa101148",), False),
)
# One VM in so many takes a notify exit each 100 s; one on each of a few hosts is stalled.
ONE_IN: Final = 100
STALLED_HOSTS: Final = (0, 7, 42)


def make_host(number: int, vms: int) -> Host:
    """Return a host, always the same."""
    chance = random.Random(number)
    name, family, model, stepping, microcodes, supported = CPUS[number % len(CPUS)]
    cpu = {"cpu_model_name": name, "cpu_family": family, "cpu_model": model, "cpu_stepping": stepping}
    cpu |= {"cpu_vendor": "GenuineIntel" if family == "6" else "AuthenticAMD", "kernel": "6.8.0-48-generic"}
    microcode = microcodes[number // len(CPUS) % len(microcodes)]
    return Host(
        f"kvm{number:04}:9750",
        cpu | {"kvm_module": "kvm_intel" if family == "6" else "kvm_amd"},
        [(microcode, -100.0, FOREVER)],
        [_make_vm(number, vm, supported, chance) for vm in range(vms)],
        supported=supported,
        gone=FOREVER,
        every_vcpu=True,
    )


def _make_vm(host: int, number: int, supported: bool, chance: random.Random) -> Vm:
    uuid = make_uuid(chance)
    names = {"uuid": uuid, "name": f"instance-{uuid[:8]}", "display_name": f"web-{number}", "project": f"p-{host % 60}"}
    spells: dict[int, list[Spell]] = {}
    if supported and number == 1 and host in STALLED_HOSTS:
        spells = {3: [Spell(-0.5, FOREVER, 9100, stalled=True)]}
    elif supported and number % ONE_IN == 0:
        spells = {0: [Spell(-20.0, FOREVER, 0.01)]}
    state = Protection.ARMED if supported else Protection.UNSUPPORTED
    return Vm(uuid, "qemu", VCPUS, -24.0 * chance.randint(1, 90), names, state, spells)


def count_vms(hosts: int, vms: int) -> list[int]:
    """Return how many VMs each host has: one very many, the others equally many."""
    others = (vms - LARGEST_HOST_VMS) / max(1, hosts - 1)
    return [LARGEST_HOST_VMS, *(int(others * (n + 1)) - int(others * n) for n in range(hosts - 1))]


class SimulatedAgent:
    """What one agent answers: lines that stand still, and what counts."""

    def __init__(self, host: Host, end: float) -> None:
        still: list[str] = []
        self._moving: list[tuple[str, ByHour]] = []
        for series in make_series(host, end):
            if series.metric is UP:
                continue
            text = render_series(series.metric, order_labels(series.metric, **series.labels))
            now, later = series.value(0.0), series.value(FOREVER / 2)
            if now != later:
                self._moving.append((text, series.value))
            elif now is not None:
                still.append(f"{text} {render_number(now)}\n")
        self._still = "".join(still).encode()
        self.series = len(still) + len(self._moving)

    def render(self, hour: float) -> bytes:
        moving = ((text, value(hour)) for text, value in self._moving)
        return self._still + "".join(f"{text} {value!r}\n" for text, value in moving if value is not None).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    agents: tuple[SimulatedAgent, ...] = ()
    end = 0.0

    def do_GET(self) -> None:
        body = self.agents[int(self.path.strip("/"))].render((time.time() - self.end) / 3600)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True


def make_hosts(hosts: int, vms: int) -> Iterator[Host]:
    """Yield the hosts of the fleet, one by one: each has many VMs."""
    for number, count in enumerate(count_vms(hosts, vms)):
        yield make_host(number, count)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("hosts", type=int)
    parser.add_argument("vms", type=int)
    parser.add_argument("end", type=float)
    options = parser.parse_args()
    agents = tuple(SimulatedAgent(host, options.end) for host in make_hosts(options.hosts, options.vms))
    handler = type("Handler", (_Handler,), {"agents": agents, "end": options.end})
    with _Server(("127.0.0.1", 0), handler) as server:
        print(server.server_address[1], sum(agent.series for agent in agents), flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
