"""The .deb on a Debian where nothing else was installed: its life from installation to purge, by the real tools."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvm import abi
from kvm.host.privileges import parse_effective_capabilities
from tests.deploy.chroot import Container, find_files, has_all_that_it_takes, run_on_host
from tests.deploy.installed import find_main_pid, install, wait_for_agent
from tests.deploy.unit_file import FULL, NO_ADMIN, UNITS, read_values
from tests.live import open_guest_process
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.slow,
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="making a Debian takes root"),
    pytest.mark.skipif(not has_all_that_it_takes(), reason="debootstrap, /dev/kvm or Debian's sources are missing"),
]
PORT_WRITES = 1000


def check_process(container: Container, unit: str) -> None:
    """Hold the running agent to what its unit says it may do."""
    status = container.run("cat", f"/proc/{find_main_pid(container, unit)}/status")
    names = read_values(unit, "CapabilityBoundingSet")
    assert parse_effective_capabilities(status) == sum(1 << getattr(abi, name) for name in names)
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    user = container.run("id", "--user", "kvm-notify-exporter").strip()
    assert fields["Uid"].split() == [user] * 4
    assert user != "0"


def check_reading(container: Container) -> None:
    """Have the agent read a VM that runs beside it."""
    prefix = ("nsenter", f"--target={container.pid}", "--pid", "unshare", "--mount-proc")
    with open_guest_process(vcpus=2, stats_fds=True, port_writes=PORT_WRITES, prefix=prefix):

        def find_exits() -> list[float]:
            families = text_string_to_metric_families(container.get("/metrics")[1])
            return [
                sample.value
                for family in families
                for sample in family.samples
                if sample.name == "kvm_vcpu_exits_total"
            ]

        wait_until(lambda: len(find_exits()) == 2, lambda: container.get("/metrics")[1], pause_seconds=0.5)
        assert min(find_exits()) >= PORT_WRITES


def test_the_life_of_a_package(container: Container, tree: Path, package: Path, tell: Callable[[str], None]) -> None:
    before = find_files(tree)
    install(container, package)
    wait_for_agent(container, FULL)
    assert container.show(FULL, "UnitFileState") == "enabled"
    check_process(container, FULL)
    check_reading(container)
    assert container.run("kvm-notify-exporter", "--version").startswith("kvm-notify-exporter ")
    assert "ModuleNotFoundError" in container.run("sh", "-c", "python3 -c 'import exporter' 2>&1; true")
    assert "ModuleNotFoundError" in container.run("sh", "-c", "python3 -c 'import kvm' 2>&1; true")

    # An agent that is killed comes back.
    pid = find_main_pid(container, FULL)
    container.run("systemctl", "kill", "--signal=KILL", FULL)
    wait_until(lambda: find_main_pid(container, FULL) not in ("", pid), "a new agent", pause_seconds=0.5)

    # The other unit takes its place.
    container.run("systemctl", "start", NO_ADMIN)
    wait_for_agent(container, NO_ADMIN)
    assert find_main_pid(container, FULL) == ""
    check_process(container, NO_ADMIN)
    check_reading(container)
    container.run("systemctl", "start", FULL)

    # An upgrade starts the new program, and keeps what the administrator has set.
    defaults = tree / "etc/default/kvm-notify-exporter"
    defaults.write_text('ARGS="--web.listen-address=127.0.0.1:9750 --log.level=debug"\n')
    pid = find_main_pid(container, FULL)
    install(container, package)
    wait_until(lambda: find_main_pid(container, FULL) not in ("", pid), "a new agent", pause_seconds=0.5)
    wait_for_agent(container, FULL)
    assert "--log.level=debug" in container.run("cat", f"/proc/{find_main_pid(container, FULL)}/cmdline")
    assert "--log.level=debug" in defaults.read_text()
    assert container.list_failed() == ""

    container.run("dpkg", "--remove", "kvm-notify-exporter")
    assert find_main_pid(container, FULL) == ""
    assert "/usr/bin/kvm-notify-exporter" not in find_files(tree)
    container.run("dpkg", "--purge", "kvm-notify-exporter")
    assert find_files(tree) == before
    tell(f"{tree.name}: {package.name} installed, started, killed, upgraded and purged")


def test_a_wrong_flag_is_told_of_and_not_tried_again(container: Container, tree: Path, package: Path) -> None:
    install(container, package)
    (tree / "etc/default/kvm-notify-exporter").write_text('ARGS="--no-such-flag"\n')
    container.run("systemctl", "restart", FULL, expect=1)
    wait_until(lambda: container.show(FULL, "ActiveState") == "failed", "the unit has failed", pause_seconds=0.2)
    assert container.show(FULL, "ExecMainStatus") == "2"
    assert "--no-such-flag" in container.run("journalctl", "--no-pager", f"--unit={FULL}")
    container.run("dpkg", "--purge", "kvm-notify-exporter")


@pytest.mark.parametrize("unit", UNITS)
def test_debians_python_reads_every_vcpu_with_the_capabilities_of_the_unit(
    unit: str, tree: Path, package: Path, tell: Callable[[str], None]
) -> None:
    """In the host's pid namespace: all that the agent has is Debian's libraries and what the unit gives."""
    run_on_host(tree, "dpkg", "--install", f"/opt/{package.name}")
    names = [name.lower().removeprefix("cap_") for name in read_values(unit, "CapabilityBoundingSet")]
    held = ",".join(f"+{name}" for name in names)
    user = ["--reuid=kvm-notify-exporter", "--regid=kvm-notify-exporter", "--clear-groups", "--no-new-privs"]
    bounded = ["setpriv", f"--inh-caps=-all,{held}", f"--ambient-caps=-all,{held}", f"--bounding-set=-all,{held}"]
    with open_guest_process(vcpus=2, port_writes=PORT_WRITES) as guest:
        text = run_on_host(tree, *bounded, *user, "kvm-notify-exporter", "once", "--format=json")
    (vm,) = (vm for vm in json.loads(text)["vms"] if vm["pid"] == guest.pid)
    assert vm["source"] == "bpf", vm
    assert min(vcpu["exits"] for vcpu in vm["vcpus"]) >= PORT_WRITES
    python = re.sub(r"\s+", " ", run_on_host(tree, "python3", "--version")).strip()
    tell(f"{tree.name}, {unit}: {python} reads 2 vCPUs by bpf with {', '.join(names)}")
