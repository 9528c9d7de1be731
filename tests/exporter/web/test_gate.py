"""Who is let in, over real TLS and HTTP: certificates, passwords, limits, and what a reload changes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import bcrypt
import pytest

from exporter.history.recorder import SnapshotRecorder
from exporter.web.listeners import Address, TcpAddress, UnixAddress
from exporter.web.server import open_server
from exporter.web.settings import ServerSettings
from exporter.web.web_config_file import WebConfigFile
from kvm.simulated.host import SimulatedHost
from tests.certificates import Authority, Pair
from tests.exporter.web.test_server import LOOPBACK, Answer, Client, open_collector
from tests.waiting import PATIENCE_SECONDS

PASSWORD = "correct horse"
USERS = f"basic_auth_users:\n  alice: {bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()}\n"
TLS = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n"
MUTUAL = TLS + "  client_ca_file: client-ca.crt\n  client_auth_type: RequireAndVerifyClientCert\n"
LIMIT = "rate_limit:\n  interval: 1h\n  burst: 3\n"
PATHS = ("/metrics", "/", "/-/status", "/-/healthy", "/-/ready", "/api/v1/vcpus", "/nowhere")

Scenario = Callable[[tuple[Address, ...], WebConfigFile], Awaitable[None]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority(tmp_path_factory.mktemp("ca"))
    authority.issue("one", "DNS:localhost")
    authority.issue("two", "DNS:localhost")
    authority.issue("prometheus", "DNS:prometheus.example.org")
    return authority


def find_pair(authority: Authority, name: str) -> Pair:
    return Pair(authority.directory / f"{name}.crt", authority.directory / f"{name}.key")


@pytest.fixture
def directory(tmp_path: Path, authority: Authority) -> Path:
    Pair(tmp_path / "server.crt", tmp_path / "server.key").replace(find_pair(authority, "one"))
    (tmp_path / "client-ca.crt").write_bytes(authority.certificate.read_bytes())
    return tmp_path


def run(
    scenario: Scenario,
    directory: Path,
    text: str,
    *addresses: Address,
    max_requests: int = 40,
    is_simulated: bool = False,
) -> None:
    """Run a scenario against a server with this web configuration."""
    path = directory / "web.yml"
    path.write_text(text)

    async def main() -> None:
        settings = ServerSettings(
            addresses=addresses or (LOOPBACK,), max_requests=max_requests, is_simulated=is_simulated
        )
        recorder, web_config = SnapshotRecorder(SimulatedHost()), WebConfigFile(path)
        collector = open_collector(recorder)
        async with open_server(collector, recorder, settings, web_config=web_config) as listening:
            await asyncio.wait_for(scenario(listening, web_config), PATIENCE_SECONDS)

    asyncio.run(main())


async def open_client(address: Address, context: ssl.SSLContext | None = None) -> Client:
    if not isinstance(address, TcpAddress):
        return await Client.open(address)
    name = "localhost" if context else None
    return Client(*await asyncio.open_connection(address.host, address.port, ssl=context, server_hostname=name))


async def ask_on(client: Client, target: str = "/metrics", *headers: str) -> Answer:
    lines = "".join(f"{line}\r\n" for line in headers)
    await client.send(f"GET {target} HTTP/1.1\r\nHost: test\r\n{lines}\r\n".encode())
    return await client.read_answer()


async def ask(
    address: Address, target: str = "/metrics", *headers: str, context: ssl.SSLContext | None = None
) -> Answer:
    client = await open_client(address, context)
    try:
        return await ask_on(client, target, *headers)
    finally:
        await client.close()


def basic(user: str, password: str) -> str:
    return "Authorization: Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


ALICE = basic("alice", PASSWORD)


def test_every_path_asks_for_the_password(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(listening: tuple[Address, ...], _file: WebConfigFile) -> None:
        for path in PATHS:
            for header in ("X: y", basic("alice", "wrong"), basic("bob", PASSWORD), "Authorization: Bearer x"):
                answer = await ask(listening[0], path, header)
                assert answer.status == 401
                assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
                assert b"kvm_" not in answer.body
            assert (await ask(listening[0], path, ALICE)).status in (200, 404)
        for password in ("x" * 73, "a\0b", PASSWORD + "\0"):
            assert (await ask(listening[0], "/metrics", basic("alice", password))).status == 401

    run(scenario, directory, USERS)
    assert PASSWORD not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_unix_socket_is_guarded_by_its_mode(directory: Path) -> None:
    async def scenario(listening: tuple[Address, ...], _file: WebConfigFile) -> None:
        assert (await ask(listening[0])).status == 200  # neither TLS nor a password

    run(scenario, directory, TLS + USERS + LIMIT, UnixAddress(str(directory / "agent.sock")))


def test_configured_headers_are_on_every_answer(directory: Path) -> None:
    headers = "http_server_config:\n  headers:\n    Strict-Transport-Security: max-age=60\n    X-Frame-Options: deny\n"

    async def scenario(listening: tuple[Address, ...], _file: WebConfigFile) -> None:
        for path in PATHS:
            for header in ("X: y", ALICE):
                answer = await ask(listening[0], path, header)
                assert answer.headers["Strict-Transport-Security"] == "max-age=60"
                assert answer.headers["X-Frame-Options"].lower() == "deny"
        page = await ask(listening[0], "/", ALICE)
        assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")

    run(scenario, directory, USERS + headers)


def test_the_limit_counts_those_who_were_let_in(directory: Path) -> None:
    async def scenario(listening: tuple[Address, ...], _file: WebConfigFile) -> None:
        for _ in range(10):
            assert (await ask(listening[0], "/metrics")).status == 401
        statuses = [(await ask(listening[0], "/-/healthy", ALICE)).status for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        assert (await ask(listening[0], "/metrics")).status == 401

    run(scenario, directory, USERS + LIMIT)


def test_strangers_take_no_place_of_a_scrape(directory: Path) -> None:
    slow = f"basic_auth_users:\n  alice: {bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(10)).decode()}\n"

    async def scenario(listening: tuple[Address, ...], _file: WebConfigFile) -> None:
        assert (await ask(listening[0], "/metrics", ALICE)).status == 200
        guesses = [asyncio.create_task(ask(listening[0], "/metrics", basic("alice", str(n)))) for n in range(30)]
        await asyncio.sleep(0.05)
        for _ in range(5):
            assert (await ask(listening[0], "/metrics", ALICE)).status == 200
        assert {answer.status for answer in await asyncio.gather(*guesses)} == {401, 429}

    run(scenario, directory, slow, max_requests=1)


def test_tls_and_only_tls(directory: Path, authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(listening: tuple[Address, ...], _file: WebConfigFile) -> None:
        for path in PATHS:
            assert (await ask(listening[0], path, context=authority.trust())).status in (200, 404)
        plain = await open_client(listening[0])
        await plain.send(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n")
        assert b"kvm_" not in await plain.read_rest()
        await plain.close()
        with pytest.raises(ssl.SSLError):
            await ask(listening[0], context=ssl.create_default_context())

    run(scenario, directory, TLS)
    failures = [vars(record)["fields"] for record in caplog.records if record.message == "TLS handshake failed"]
    assert failures[0] == {"client": "127.0.0.1", "err": "http request"}


async def is_shut_out(address: Address, context: ssl.SSLContext) -> bool:
    """Tell whether a client gets nothing: in TLS 1.3 it is told only after its own side of the handshake."""
    try:
        await ask(address, context=context)
    except (ssl.SSLError, ConnectionError, asyncio.IncompleteReadError):
        return True
    return False


def test_clients_certificates_and_their_names(directory: Path, authority: Authority, tmp_path: Path) -> None:
    ours = find_pair(authority, "prometheus")
    unnamed = authority.issue("grafana", "DNS:grafana.example.org")
    theirs = Authority(tmp_path, "other").issue("mallory", "DNS:prometheus.example.org")

    async def scenario(listening: tuple[Address, ...], _file: WebConfigFile) -> None:
        assert (await ask(listening[0], context=authority.trust(ours))).status == 200
        answer = await ask(listening[0], context=authority.trust(unnamed))
        assert (answer.status, answer.headers["Connection"]) == (403, "close")
        assert await is_shut_out(listening[0], authority.trust(theirs))
        assert await is_shut_out(listening[0], authority.trust())

    run(scenario, directory, MUTUAL + "  client_allowed_sans: [prometheus.example.org]\n")


def test_a_password_or_a_certificate_makes_known_and_tls_alone_does_not(directory: Path, authority: Authority) -> None:
    ours = authority.trust(find_pair(authority, "prometheus"))
    if_given = MUTUAL.replace("RequireAndVerifyClientCert", "VerifyClientCertIfGiven")

    async def sees_details(address: Address, header: str, context: ssl.SSLContext | None) -> bool:
        answer = await ask(address, "/api/v1/vcpus", header, context=context)
        assert answer.status == 200
        found: bool = json.loads(answer.body)["details"]
        return found

    async def by_password(listening: tuple[Address, ...], _file: WebConfigFile) -> None:
        assert await sees_details(listening[0], ALICE, None)

    async def by_certificate(listening: tuple[Address, ...], _file: WebConfigFile) -> None:
        assert await sees_details(listening[0], "X: y", ours)
        assert not await sees_details(listening[0], "Via: 1.1 proxy", ours)
        assert not await sees_details(listening[0], "X: y", authority.trust())

    async def by_nothing(listening: tuple[Address, ...], _file: WebConfigFile) -> None:
        assert not await sees_details(listening[0], ALICE, ours)

    async def by_being_a_visitor(listening: tuple[Address, ...], _file: WebConfigFile) -> None:
        assert await sees_details(listening[0], "X: y", authority.trust())
        assert await sees_details(listening[0], "X: y", ours)

    run(by_password, directory, USERS)
    run(by_certificate, directory, if_given)
    run(by_nothing, directory, TLS)
    for text in (TLS, if_given):
        run(by_being_a_visitor, directory, text, is_simulated=True)


def test_a_client_has_one_name_in_every_line(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(listening: tuple[Address, ...], _file: WebConfigFile) -> None:
        assert (await ask(listening[0], "/metrics", basic("alice", "wrong"))).status == 401
        client = await open_client(listening[0])
        await client.send(b"GET /metrics HTTP/1.1\r\nHost test\r\n\r\n")
        assert (await client.read_answer()).status == 400
        await client.close()

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as err:
        pytest.skip(f"this machine has no IPv6: {err}")
    caplog.set_level(logging.INFO)
    run(scenario, directory, USERS, TcpAddress("::1", 0))
    found = {
        record.message: vars(record)["fields"]["client"] for record in caplog.records if "refused" in record.message
    }
    assert found == {"password refused": "::/64", "malformed request refused": "::/64"}


def test_a_certificate_is_replaced_under_connections_in_use(directory: Path, authority: Authority) -> None:
    async def scenario(listening: tuple[Address, ...], file: WebConfigFile) -> None:
        def read_certificate(client: Client) -> bytes:
            found: bytes = client.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            return found

        old = await open_client(listening[0], authority.trust())
        Pair(directory / "server.crt", directory / "server.key").replace(find_pair(authority, "two"))
        await file.reload("SIGHUP")
        new = await open_client(listening[0], authority.trust())
        for client in (old, new, old):
            assert (await ask_on(client)).status == 200
        assert read_certificate(old) != read_certificate(new)
        for client in (old, new):
            await client.close()

    run(scenario, directory, TLS)


def test_who_is_no_longer_trusted_is_out_at_once(directory: Path, authority: Authority, tmp_path: Path) -> None:
    ours = find_pair(authority, "prometheus")
    other = Authority(tmp_path, "other")
    theirs = other.issue("next", "DNS:prometheus.example.org")

    async def scenario(listening: tuple[Address, ...], file: WebConfigFile) -> None:
        idle = await open_client(listening[0], authority.trust(ours))
        assert (await ask_on(idle)).status == 200
        (directory / "client-ca.crt").write_bytes(other.certificate.read_bytes())
        await file.reload("SIGHUP")
        assert await idle.read_rest() == b""
        await idle.close()
        assert await is_shut_out(listening[0], authority.trust(ours))
        assert (await ask(listening[0], context=authority.trust(theirs))).status == 200

    run(scenario, directory, MUTUAL)


def test_a_user_who_was_taken_away_is_out_at_once(directory: Path) -> None:
    async def scenario(listening: tuple[Address, ...], file: WebConfigFile) -> None:
        client = await open_client(listening[0])
        assert (await ask_on(client, "/metrics", ALICE)).status == 200
        (directory / "web.yml").write_text(USERS.replace("alice", "bob"))
        await file.reload("SIGHUP")
        assert (await ask_on(client, "/metrics", ALICE)).status == 401
        assert (await ask_on(client, "/metrics", basic("bob", PASSWORD))).status == 200
        await client.close()

    run(scenario, directory, USERS)


def test_a_renegotiation_or_garbage_in_tls_ends_that_connection_only(directory: Path, authority: Authority) -> None:
    async def scenario(listening: tuple[Address, ...], _file: WebConfigFile) -> None:
        for garbage in (b"\x16\x03\x01\xff\xff" + b"\0" * 1000, b"\x80\x2e\x01\x00\x02", b"\0" * 5000, b""):
            client = await open_client(listening[0])
            with contextlib.suppress(ConnectionError):
                await client.send(garbage)
                client.writer.write_eof()
            assert b"kvm" not in await client.read_rest()
            await client.close()
        assert (await ask(listening[0], context=authority.trust())).status == 200

    run(scenario, directory, TLS)
