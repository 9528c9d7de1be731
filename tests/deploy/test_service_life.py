"""The unit under a real systemd: what it tells, and what it outlives, while a real Prometheus scrapes it over mTLS."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exporter.history.kept_total import VERSION, read_boot_id
from tests.certificates import Authority, Pair
from tests.deploy.chroot import Container, has_all_that_it_takes
from tests.deploy.installed import find_main_pid, find_new_pid, install, read_journal, wait_for_agent
from tests.deploy.unit_file import FULL, SOCKET
from tests.live import open_guest_process
from tests.live.prometheus_server import Target, build_prometheus_config, end_process, find_program
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.slow,
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="making a Debian takes root"),
    pytest.mark.skipif(not has_all_that_it_takes(), reason="debootstrap, /dev/kvm or Debian's sources are missing"),
]
ETC, DEFAULTS, STATE = "etc/kvm-notify-exporter", "etc/default/kvm-notify-exporter", "var/lib/kvm-notify-exporter"
PROMETHEUS_PORT = 9790
COUNTED = 4711
WEB_CONFIG = """tls_server_config:
  cert_file: server.crt
  key_file: server.key
  client_ca_file: client-ca.crt
  client_auth_type: RequireAndVerifyClientCert
"""


def set_flags(tree: Path, flags: str) -> None:
    (tree / DEFAULTS).write_text(f'ARGS="{flags}"\n')


def enter_network(container: Container) -> list[str]:
    """Run a program of this machine in the container's network."""
    return ["nsenter", f"--target={container.pid}", "--net"]


class Site:
    """Certificates: of the agent below the tree's /etc, where only its user can read them, and of Prometheus."""

    def __init__(self, tree: Path, directory: Path, container: Container) -> None:
        self._tree, self._container = tree, container
        self.authority, self.clients = Authority(directory), Authority(directory, "client-ca")
        self.pairs = [self.authority.issue(f"server-{n}", "DNS:localhost", "IP:127.0.0.1") for n in range(2)]
        self.prometheus = self.clients.issue("prometheus", "DNS:prometheus.example.org")
        (tree / ETC).mkdir()
        (tree / ETC / "web.yml").write_text(WEB_CONFIG)
        shutil.copy(self.clients.certificate, tree / ETC / "client-ca.crt")
        self.use(self.pairs[0])

    def use(self, pair: Pair) -> None:
        """Replace certificate and key, as a rotation does."""
        Pair(self._tree / ETC / "server.crt", self._tree / ETC / "server.key").replace(pair)
        self._container.run("chown", "-R", "root:kvm-notify-exporter", f"/{ETC}")
        self._container.run("chmod", "-R", "u=rwX,g=rX,o=", f"/{ETC}")

    def read_served(self) -> str:
        """The certificate that a client gets."""
        words = [*enter_network(self._container), "openssl", "s_client", "-connect", "127.0.0.1:9750"]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        return done.stdout.partition("-----BEGIN CERTIFICATE-----")[2].partition("-----END")[0].strip()


class Scraper:
    """A Prometheus beside the agent; made by `open_scraper`."""

    def __init__(self, container: Container) -> None:
        self._container = container

    def query(self, expression: str) -> float | None:
        """The value of an expression of one series, None where it has none."""
        path = f"/api/v1/query?query={urllib.parse.quote(expression)}"
        status, body = self._container.get(path, PROMETHEUS_PORT)
        found = json.loads(body)["data"]["result"] if status == 200 else []
        return float(found[0]["value"][1]) if found else None

    def wait_for(self, expression: str, wanted: float) -> None:
        wait_until(lambda: self.query(expression) == wanted, lambda: f"{expression} is {self.query(expression)}", 60)

    def wait_for_scrape(self) -> None:
        """Wait for one that began after now."""
        self.wait_for(f"up == 1 and timestamp(up) > {time.time():f}", 1)


@contextlib.contextmanager
def open_scraper(container: Container, site: Site, directory: Path) -> Iterator[Scraper]:
    access = {
        "scheme": "https",
        "tls_config": {
            "ca_file": str(site.authority.certificate),
            "cert_file": str(site.prometheus.certificate),
            "key_file": str(site.prometheus.key),
            "server_name": "localhost",
        },
    }
    config = directory / "prometheus.yml"
    config.write_text(json.dumps(build_prometheus_config([Target(9750, "agent")], [], None, 1, access)))
    words = [find_program("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={directory}/data"]
    words += [f"--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}"]
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*enter_network(container), *words], stdout=log, stderr=log)
    try:
        yield Scraper(container)
    finally:
        end_process(process)


def write_total(tree: Path, container: Container) -> None:
    """Leave what an agent leaves that ends in order."""
    path = tree / STATE / "state.json"
    document = {"version": VERSION, "boot_id": read_boot_id(Path("/proc")), "notify_window_exits_total": COUNTED}
    path.write_text(json.dumps(document))
    container.run("chown", "kvm-notify-exporter:kvm-notify-exporter", f"/{STATE}/state.json")


def test_what_the_agent_outlives_while_prometheus_scrapes(
    container: Container, tree: Path, package: Path, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    install(container, package)
    wait_for_agent(container, FULL)
    site = Site(tree, tmp_path, container)
    set_flags(tree, f"--web.config.file=/{ETC}/web.yml")
    container.run("systemctl", "stop", FULL)
    assert container.show(FULL, "Result") == "success"
    write_total(tree, container)
    container.run("systemctl", "start", FULL)
    total = "kvm_host_notify_window_exits_total"
    prefix = ("nsenter", f"--target={container.pid}", "--pid", "unshare", "--mount-proc")
    with (
        open_guest_process(vcpus=2, stats_fds=True, port_writes=10, prefix=prefix),
        open_scraper(container, site, tmp_path) as scraper,
    ):
        scraper.wait_for("count(kvm_vcpu_exits_total)", 2)
        assert scraper.query(total) == COUNTED
        pid = find_main_pid(container, FULL)

        container.run("systemctl", "reload", FULL)
        wait_until(lambda: "reason=SIGHUP" in read_journal(container, FULL), "the reload", 60, pause_seconds=0.2)

        before = site.read_served()
        site.use(site.pairs[1])
        wait_until(lambda: site.read_served() not in ("", before), "another certificate", 60, pause_seconds=0.2)
        scraper.wait_for_scrape()
        assert find_main_pid(container, FULL) == pid
        assert scraper.query("min_over_time(up[10s])") == 1, "nothing of that has cost a scrape"

        container.run("systemctl", "restart", FULL)  # SIGTERM
        pid = find_new_pid(container, FULL, pid)
        scraper.wait_for_scrape()
        assert scraper.query(total) == COUNTED

        install(container, package)  # an upgrade
        pid = find_new_pid(container, FULL, pid)
        scraper.wait_for_scrape()
        assert scraper.query(total) == COUNTED
        assert scraper.query(f"resets({total}[10m])") == 0

        container.run("systemctl", "kill", "--signal=KILL", FULL)
        pid = find_new_pid(container, FULL, pid)
        scraper.wait_for("count(kvm_vcpu_exits_total)", 2)
        assert scraper.query(total) == 0
        scrapes, failed = (
            scraper.query("count_over_time(up[10m])"),
            scraper.query("sum(count_over_time(up[10m]) - sum_over_time(up[10m]))"),
        )
    journal = read_journal(container, FULL)
    assert "Traceback" not in journal
    assert "ended before all of it had" not in journal
    assert container.list_failed() == ""
    container.run("dpkg", "--purge", "kvm-notify-exporter")
    assert not (tree / STATE).exists()
    shutil.rmtree(tree / ETC)
    tell(
        f"{tree.name}: HUP, another certificate, TERM, an upgrade and kill -9: {scrapes:.0f} scrapes of Prometheus by "
        f"mTLS, {failed:.0f} of them while no agent ran"
    )


def test_systemd_knows_how_the_agent_is_and_restarts_one_that_hangs(
    container: Container, tree: Path, package: Path
) -> None:
    install(container, package)
    wait_for_agent(container, FULL)
    prefix = ("nsenter", f"--target={container.pid}", "--pid", "unshare", "--mount-proc")
    with open_guest_process(vcpus=2, stats_fds=True, port_writes=10, prefix=prefix):
        # In a container without the host's pids, which the agent knows.
        wait_until(
            lambda: container.show(FULL, "StatusText").startswith("1 VM, "),
            lambda: container.show(FULL, "StatusText"),
            pause_seconds=0.2,
        )
    assert container.show(FULL, "Type") == "notify"
    drop_in = tree / f"etc/systemd/system/{FULL}.d"
    drop_in.mkdir(parents=True)
    (drop_in / "soon.conf").write_text("[Service]\nWatchdogSec=3\nTimeoutStopSec=2\n")
    container.run("systemctl", "daemon-reload")
    container.run("systemctl", "restart", FULL)
    wait_for_agent(container, FULL)
    pid = find_main_pid(container, FULL)
    container.run("systemctl", "kill", "--signal=STOP", "--kill-whom=main", FULL)
    find_new_pid(container, FULL, pid)
    assert "Watchdog timeout" in read_journal(container, FULL)
    shutil.rmtree(drop_in)
    container.run("dpkg", "--purge", "kvm-notify-exporter")


def test_an_address_that_is_not_there_yet_is_tried_again(container: Container, tree: Path, package: Path) -> None:
    install(container, package)
    set_flags(tree, "--web.listen-address=192.0.2.7:9750 --web.listen-address=127.0.0.1:9750")
    container.run("systemctl", "restart", FULL, expect=1)
    wait_until(lambda: int(container.show(FULL, "NRestarts")) > 1, "it is tried again", 60, pause_seconds=0.2)
    assert "cannot listen on 192.0.2.7:9750" in read_journal(container, FULL)
    subprocess.run([*enter_network(container), "ip", "address", "add", "192.0.2.7/32", "dev", "lo"], check=True)
    wait_for_agent(container, FULL)
    container.run("dpkg", "--purge", "kvm-notify-exporter")


def test_with_the_socket_clients_wait_while_no_agent_runs(container: Container, tree: Path, package: Path) -> None:
    install(container, package)
    wait_for_agent(container, FULL)
    set_flags(tree, "--web.systemd-socket")
    container.run("systemctl", "stop", FULL)
    container.run("systemctl", "enable", "--now", SOCKET)
    assert find_main_pid(container, FULL) == ""
    assert container.get("/-/healthy")[0] == 200, "who connects starts it"
    pid = find_main_pid(container, FULL)
    container.run("systemctl", "kill", "--signal=KILL", FULL)
    assert container.get("/-/healthy")[0] == 200, "and waits for the next one"
    assert find_main_pid(container, FULL) not in ("", pid)
    container.run("dpkg", "--purge", "kvm-notify-exporter")
    assert container.get("/-/healthy")[0] == 0, "nobody listens any more"
    assert container.list_failed() == ""
