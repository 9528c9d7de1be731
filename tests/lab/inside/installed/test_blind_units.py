"""The installed unit, changed so that it sees less: no surface may show an all-clear.

Each of the ways is a change that an administrator could make, most of them one that the unit warns of. ``serve`` is the
service itself, the other commands run in its sandbox beside it.
"""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.blind.scene import Scene, open_truth
from tests.blind.surfaces import ask_agent
from tests.blind.ways import Sees, Way
from tests.lab.inside.blind.check import Record, check_row
from tests.waiting import wait_until

UNIT, NO_ADMIN = "kvm-notify-exporter.service", "kvm-notify-exporter-no-admin.service"
DROP_INS = Path("/run/systemd/system")
# What is about a service and no sandbox: commands that run once are none.
OF_A_SERVICE = (
    *("Type", "WatchdogSec", "EnvironmentFile", "ExecStart", "ExecReload", "StateDirectory", "StateDirectoryMode"),
    *("RuntimeDirectory", "Restart", "RestartSec", "RestartPreventExitStatus", "TimeoutStopSec"),
)
# Emulated CPUs load the agent's eBPF programs anew.
SECONDS = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitWay(Way):
    """``lines`` are added to the [Service] of a unit."""

    unit: str = UNIT
    lines: tuple[str, ...] = ()

    def build_prefix(self, stage: Path) -> list[str]:
        """The command that runs another one in the unit's sandbox, as it is now."""
        text = run("systemctl", "cat", self.unit)
        service = text.partition("[Service]")[2].partition("[Install]")[0] + "\n".join(self.lines)
        settings = [line for line in service.splitlines() if "=" in line and not line.startswith("#")]
        kept = [f"--property={line}" for line in settings if line.partition("=")[0] not in OF_A_SERVICE]
        return ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", *kept, "--"]


WAYS = (
    UnitWay(name="the unit as it is"),
    UnitWay(name="the unit no-admin", unit=NO_ADMIN),
    UnitWay(name="unit with ProtectKernelTunables=yes", lines=("ProtectKernelTunables=yes",)),
    UnitWay(name="unit with ProcSubset=pid", lines=("ProcSubset=pid",)),
    UnitWay(name="unit with PrivateDevices=yes", lines=("PrivateDevices=yes",)),
    UnitWay(name="unit with PrivateUsers=yes", lines=("PrivateUsers=yes",), sees=Sees.NONE),
    UnitWay(name="unit without bpf(2)", lines=("SystemCallFilter=~bpf",)),  # here debugfs is open, and reads the rest
    UnitWay(name="unit without capabilities", lines=("CapabilityBoundingSet=", "AmbientCapabilities="), sees=Sees.NONE),
)


def run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


class Service:
    """The agent as systemd runs it."""

    def __init__(self, unit: str) -> None:
        self._unit = unit

    @property
    def log(self) -> list[str]:
        """What the journal has of it since it was started, as the agent itself would write it to stderr."""
        invocation = run("systemctl", "show", "--value", "--property=InvocationID", self._unit)
        lines = run("journalctl", "--output=json", f"_SYSTEMD_INVOCATION_ID={invocation}").splitlines()
        levels = {"3": "ERROR", "4": "WARN"}
        entries = [json.loads(line) for line in lines]
        return [f"level={levels.get(entry['PRIORITY'], 'INFO')} msg={entry['MESSAGE']}" for entry in entries]

    def get(self, path: str = "/metrics") -> tuple[int, dict[str, str], bytes]:
        """Ask once, as a Prometheus does; status 0 where nobody listens."""
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", 9750, timeout=60)) as connection:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, {}, answer.read()
        except ConnectionError:
            return 0, {}, b""

    def wait(self) -> None:
        """Wait until it has taken its first snapshot."""

        def has_seen() -> bool:
            status, _, body = self.get("/-/ready")
            return status == 200 or b"nothing of this host can be seen" in body

        wait_until(has_seen, lambda: "\n".join(self.log), SECONDS, pause_seconds=1)


@pytest.fixture
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """The unit of a way, started anew with its lines."""
    way: UnitWay = request.node.callspec.params["way"]
    drop_in = DROP_INS / f"{way.unit}.d/blind.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("\n".join(["[Service]", *way.lines, ""]))
    try:
        run("systemctl", "daemon-reload")
        run("systemctl", "reset-failed", way.unit)  # systemd counts how often it was started, too
        run("systemctl", "restart", way.unit)
        yield Service(way.unit)
    finally:
        drop_in.unlink()
        drop_in.parent.rmdir()
        run("systemctl", "daemon-reload")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_no_surface_claims_more_than_root_can_confirm(
    way: UnitWay, service: Service, scene: Scene, record_testsuite_property: Record
) -> None:
    service.wait()
    with open_truth(scene) as truths:
        answers = ask_agent(service, way, scene.stage)
    (truth,) = truths
    assert truth.after.keys() == scene.pids
    check_row(way.name, way.sees, truth, answers, record_testsuite_property)
