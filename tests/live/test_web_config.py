"""TLS and passwords as clients meet them: curl, a real Prometheus, certificates that are replaced, and attackers."""

from __future__ import annotations

import base64
import contextlib
import http.client
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import bcrypt
import pytest

from tests.agents import ROOT, AgentProcess, open_agent, run_agent
from tests.certificates import Authority, Pair
from tests.live.prometheus_server import Prometheus, Target, build_prometheus_config, find_program, open_prometheus
from tests.waiting import wait_until

pytestmark = pytest.mark.live

PASSWORD = "correct horse"
RELOAD = "kvm_exporter_web_config_reload_success"


class Site:
    """A directory with an agent's web configuration, its certificates and those of its clients."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority(directory)
        self.clients = Authority(directory, "client-ca")
        self.server = Pair(directory / "server.crt", directory / "server.key")
        self.rotated = [self.authority.issue(f"server-{n}", "DNS:localhost", "IP:127.0.0.1") for n in range(2)]
        self.server.replace(self.rotated[0])
        self.prometheus = self.clients.issue("prometheus", "DNS:prometheus.example.org")
        self.trust = ssl.create_default_context(cafile=str(self.authority.certificate))
        self.trust.load_cert_chain(*self.prometheus)
        self.file = directory / "web.yml"
        self.hash = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(10)).decode()
        self.write()

    def write(self, extra: str = "") -> None:
        self.file.write_text(
            "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n  client_ca_file: client-ca.crt\n"
            "  client_auth_type: RequireAndVerifyClientCert\n  client_allowed_sans: [prometheus.example.org]\n"
            f"basic_auth_users:\n  alice: {self.hash}\n{extra}"
        )

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(f"alice:{PASSWORD}".encode()).decode()}

    def connect(self, port: int) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=self.trust)

    def build_access(self) -> dict[str, object]:
        """How a Prometheus comes in."""
        return {
            "scheme": "https",
            "basic_auth": {"username": "alice", "password": PASSWORD},
            "tls_config": {
                "ca_file": str(self.authority.certificate),
                "cert_file": str(self.prometheus.certificate),
                "key_file": str(self.prometheus.key),
                "server_name": "localhost",
            },
        }


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def agent(site: Site) -> Iterator[AgentProcess]:
    flag = f"--web.config.file={site.file}"
    with open_agent(flag, command="demo", connect=site.connect, headers=site.headers) as agent:
        yield agent


def run_curl(site: Site, port: int, *words: str) -> tuple[int, str]:
    """curl's exit code and the HTTP status, 000 for none."""
    command = [find_program("curl"), "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "20", *words]
    command += ["--cacert", str(site.authority.certificate), f"https://localhost:{port}/metrics"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout


def test_curl_needs_certificate_and_password(site: Site, agent: AgentProcess) -> None:
    certificate = ["--cert", str(site.prometheus.certificate), "--key", str(site.prometheus.key)]
    user = ["--user", f"alice:{PASSWORD}"]
    other = site.clients.issue("grafana", "DNS:grafana.example.org")
    assert run_curl(site, agent.port, *certificate, *user) == (0, "200")
    assert run_curl(site, agent.port, *certificate, *user, "--http2") == (0, "200")
    assert run_curl(site, agent.port, *certificate, *user, "--tls-max", "1.2") == (0, "200")
    assert run_curl(site, agent.port, *certificate) == (0, "401")
    assert run_curl(site, agent.port, *certificate, "--user", "alice:wrong") == (0, "401")
    assert run_curl(site, agent.port, "--cert", str(other.certificate), "--key", str(other.key), *user) == (0, "403")
    assert run_curl(site, agent.port, *user)[1] == "000"
    old = ["--tls-max", "1.1", "--ciphers", "ALL@SECLEVEL=0"]
    assert run_curl(site, agent.port, *certificate, *user, *old)[1] == "000"
    plain = [find_program("curl"), "-s", f"http://localhost:{agent.port}/metrics"]
    assert subprocess.run(plain, capture_output=True, check=False).stdout == b""


class Scrapers:
    """Threads that scrape over a new connection each time and write down what they got."""

    def __init__(self, site: Site, agent: AgentProcess, number: int = 4) -> None:
        self.results: list[str] = []
        self.certificates: set[bytes] = set()
        self._site, self._agent, self._stop = site, agent, threading.Event()
        self._threads = [threading.Thread(target=self._scrape) for _ in range(number)]

    def __enter__(self) -> Scrapers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait(self, number: int) -> None:
        wait_until(lambda: len(self.results) >= number, f"{number} scrapes")

    def _scrape(self) -> None:
        while not self._stop.is_set():
            connection = self._site.connect(self._agent.port)
            with contextlib.closing(connection):
                try:
                    connection.request("GET", "/metrics", headers=self._site.headers)
                    assert isinstance(connection.sock, ssl.SSLSocket)
                    self.certificates.add(connection.sock.getpeercert(binary_form=True) or b"")
                    answer = connection.getresponse()
                    ends_well = b"kvm_exporter_build_info" in answer.read()
                    self.results.append(f"{answer.status} {'whole' if ends_well else 'cut'}")
                except (OSError, http.client.HTTPException) as err:
                    self.results.append(repr(err))


def open_scraping(
    stack: ExitStack, site: Site, agent: AgentProcess, tmp_path: Path, interval_seconds: int = 1
) -> Prometheus:
    """Scrape once a second, whatever the interval, which is the time limit too: by that many targets."""
    directory = tmp_path / "prometheus"
    directory.mkdir()
    targets = [Target(agent.port, f"agent{number}:9750") for number in range(interval_seconds)]
    config = build_prometheus_config(targets, [], None, interval_seconds, site.build_access())
    prometheus = stack.enter_context(open_prometheus(directory, config))
    wait_until(lambda: len(prometheus.query("up == 1")) == len(targets), "the agent is scraped")
    return prometheus


def read_value(prometheus: Prometheus, expression: str) -> float:
    (series,) = prometheus.query(expression)
    return float(series["value"][1])


def test_prometheus_scrapes_while_certificates_are_replaced(
    site: Site, agent: AgentProcess, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    def hang_up() -> None:
        count = len([line for line in agent.log if "web configuration" in line])
        agent.process.send_signal(signal.SIGHUP)
        agent.wait_for_log(lambda: len([line for line in agent.log if "web configuration" in line]) > count, 30)

    rotations = 20
    with ExitStack() as stack:
        prometheus = open_scraping(stack, site, agent, tmp_path)
        began = time.time()
        with Scrapers(site, agent) as scrapers:
            for number in range(rotations):
                site.server.replace(site.rotated[number % 2])
                hang_up()
                scrapers.wait(40 * (number + 1))
            # A certificate without its key stays out, and says so.
            site.server.certificate.write_bytes(site.rotated[0].certificate.read_bytes())
            hang_up()
            wait_until(lambda: prometheus.query(f"{RELOAD} == 0"), "Prometheus sees the reload that failed")
            site.server.replace(site.rotated[0])  # noticed without a signal
            wait_until(lambda: prometheus.query(f"{RELOAD} == 1"), "Prometheus sees the reload that succeeded")
        span = f"{time.time() - began:.0f}s"
        scrapes, failed = (
            read_value(prometheus, f"count_over_time(up[{span}])"),
            read_value(prometheus, f"count_over_time(up[{span}]) - sum_over_time(up[{span}])"),
        )
    assert set(scrapers.results) == {"200 whole"}
    assert len(scrapers.certificates) == 2
    assert failed == 0
    assert [line for line in agent.log if "level=ERROR" in line and "do not belong together" in line]
    tell(
        f"certificates replaced {rotations} times within {span}: {len(scrapers.results)} scrapes over new connections "
        f"and {scrapes:.0f} of Prometheus by mTLS with a password, none failed"
    )


def open_idle(site: Site, port: int) -> socket.socket:
    """Shake hands, scrape nothing, and stay."""
    return site.trust.wrap_socket(
        socket.create_connection(("127.0.0.1", port), timeout=30), server_hostname="localhost"
    )


def open_slow_reader(site: Site, port: int) -> socket.socket:
    """Ask for the metrics again and again, and read none of it."""
    sock = open_idle(site, port)
    lines = "".join(f"{name}: {value}\r\n" for name, value in site.headers.items())
    sock.sendall(f"GET /metrics HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode() * 50)
    return sock


def test_every_scrape_succeeds_under_attack(
    site: Site, agent: AgentProcess, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """All of it from the address that Prometheus has too, and most of it with a certificate that is right."""
    stop, guesses, errors = threading.Event(), [0], list[str]()

    def guess() -> None:
        while not stop.is_set():
            header = {"Authorization": "Basic " + base64.b64encode(f"alice:{guesses[0]}".encode()).decode()}
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = site.connect(agent.port)
                with contextlib.closing(connection):
                    connection.request("GET", "/metrics", headers=header)
                    assert connection.getresponse().status in (401, 429)
                guesses[0] += 1

    with ExitStack() as stack:
        prometheus = open_scraping(stack, site, agent, tmp_path, interval_seconds=10)  # Prometheus' own time limit
        began = time.time()
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", agent.port))).sendall(b"\x16\x03\x01")
        for _ in range(1000):
            stack.enter_context(open_idle(site, agent.port))
        for _ in range(30):
            stack.enter_context(open_slow_reader(site, agent.port))
        threads = [threading.Thread(target=guess) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(15):
            time.sleep(1)
            errors += [target["lastError"] for target in prometheus.ask("targets")["activeTargets"]]
            for _ in range(20):  # those that were cut are back
                stack.enter_context(socket.create_connection(("127.0.0.1", agent.port))).sendall(b"\x16\x03\x01")
        stop.set()
        for thread in threads:
            thread.join()
        span = f"{time.time() - began:.0f}s"
        scrapes = read_value(prometheus, f"sum(count_over_time(up[{span}]))")
        failed = scrapes - read_value(prometheus, f"sum(sum_over_time(up[{span}]))")
        slowest = read_value(prometheus, f"max(max_over_time(scrape_duration_seconds[{span}]))")
    tell(
        f"1,000 idle connections, 500 half-open handshakes, 30 slow readers and {guesses[0]} guessed passwords within "
        f"{span}: {scrapes:.0f} scrapes of Prometheus, {failed:.0f} failed, the slowest took {slowest:.2f} s"
    )
    assert (failed, set(errors)) == (0, {""})
    assert guesses[0] > 10
    assert len(agent.log) < 60


def test_check_says_what_a_file_does_or_what_is_wrong_with_it(site: Site) -> None:
    said = run_agent("check", f"--web.config.file={site.file}")
    assert said == f"{site.file} is valid: TLS12 to TLS13, RequireAndVerifyClientCert; passwords of 1\n"
    site.write("surprise: 1\n")
    command = [sys.executable, "-m", "exporter", "check", f"--web.config.file={site.file}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    assert "web.yml:9: surprise: there is no such key" in run.stderr
    assert "Traceback" not in run.stderr
    command[3] = "demo"
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    assert "web.yml:9: surprise: there is no such key" in run.stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_no_such_signal_ends_the_agent(number: signal.Signals) -> None:
    with open_agent(command="demo") as agent:
        for _ in range(10):
            agent.process.send_signal(number)
        assert agent.get()[0] == 200
        assert agent.process.poll() is None


@pytest.mark.parametrize(("is_protected", "address"), [(False, "127.0.0.1:9750"), (True, ":9750")])
def test_only_a_protected_agent_is_open_by_default(site: Site, is_protected: bool, address: str) -> None:
    flags = [f"--web.config.file={site.file}"] if is_protected else []
    # A network of its own, as the default port may be taken in ours; the socket that serve would open is not a demo's.
    words = ["unshare", "--net", sys.executable, "-m", "exporter", "demo", *flags]
    lines = []
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "msg=listening" in line:
                break
        process.terminate()
        rest = process.stderr.read()
    assert f"msg=listening address={address}\n" in lines[-1]
    assert "agent.sock" not in "".join(lines) + rest
    hint = [line for line in lines if "only this machine is served" in line]
    assert len(hint) == (0 if is_protected else 1)
    assert all("--web.listen-address=:9750" in line for line in hint)
