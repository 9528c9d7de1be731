"""The web configuration while the agent runs: what comes into force, what does not, and what is told of it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from exporter.web.web_config_file import LoadedConfig, WebConfigFile, load_web_config
from exporter.web.yaml_mapping import ConfigError
from tests.certificates import Authority, Pair

HASH = "$2y$10$X0h1gDsPszWURQaxFh.zoubFi6DXncSjhoQNJgRrnGs7EsimhC7zG"
USERS = f"basic_auth_users:\n  alice: {HASH}\n"
TLS = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n"
LIMIT = "rate_limit:\n  interval: 1h\n  burst: 2\n"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Pair]:
    authority = Authority(tmp_path_factory.mktemp("ca"))
    return authority.issue("one", "DNS:localhost"), authority.issue("two", "DNS:localhost")


@pytest.fixture
def pair(tmp_path: Path, pairs: tuple[Pair, Pair]) -> Pair:
    pair = Pair(tmp_path / "server.crt", tmp_path / "server.key")
    pair.replace(pairs[0])
    return pair


def open_file(tmp_path: Path, text: str) -> WebConfigFile:
    path = tmp_path / "web.yml"
    path.write_text(text)
    return WebConfigFile(path)


def test_without_a_right_file_there_is_no_beginning(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        WebConfigFile(tmp_path / "missing.yml")
    with pytest.raises(ConfigError, match=r"server\.crt cannot be read"):
        open_file(tmp_path, TLS)
    with pytest.raises(ConfigError, match="no regular file"):
        WebConfigFile(tmp_path)


def test_a_right_file_comes_into_force_and_a_broken_one_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        file = open_file(tmp_path, USERS)
        first = file.current
        assert (file.protects, file.reload_succeeded) == (True, True)
        (tmp_path / "web.yml").write_text(USERS + "surprise: 1\n")
        await file.reload("SIGHUP")
        assert (file.current, file.reload_succeeded) == (first, False)
        (tmp_path / "web.yml").unlink()
        await file.reload("SIGHUP")
        assert (file.current, file.reload_succeeded) == (first, False)
        (tmp_path / "web.yml").write_text(f"basic_auth_users:\n  bob: {HASH}\n")
        await file.reload("SIGHUP")
        assert file.reload_succeeded
        assert set(file.current.config.users) == {"bob"}

    asyncio.run(main())
    errors = [vars(record)["fields"] for record in caplog.records if record.levelno == logging.ERROR]
    assert [str(fields["err"]).partition(": ")[2] for fields in errors] == [
        "surprise: there is no such key; known are tls_server_config, http_server_config, basic_auth_users, rate_limit",
        "it cannot be read: No such file or directory",
    ]
    assert {fields["reason"] for fields in errors} == {"SIGHUP"}


def test_a_key_that_comes_after_its_certificate_is_waited_for(
    tmp_path: Path, pair: Pair, pairs: tuple[Pair, Pair]
) -> None:
    async def main() -> None:
        file = open_file(tmp_path, TLS)
        context = file.current.context
        pair.certificate.write_bytes(pairs[1].certificate.read_bytes())
        await file.reload("changed")
        assert (file.current.context, file.reload_succeeded) == (context, False)
        pair.key.write_bytes(pairs[1].key.read_bytes())
        await file.reload("changed")
        assert file.reload_succeeded
        assert file.current.context is not context

    asyncio.run(main())


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        (TLS, USERS, "switching TLS off takes a restart"),
        (USERS, USERS + TLS, "switching TLS on takes a restart"),
        (USERS, "", "taking the last authentication away"),
        (TLS + USERS, TLS, "taking the last authentication away"),
    ],
)
@pytest.mark.usefixtures("pair")
def test_what_was_closed_is_not_opened_by_a_reload(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: str, after: str, complaint: str
) -> None:
    async def main() -> None:
        file = open_file(tmp_path, before)
        (tmp_path / "web.yml").write_text(after)
        await file.reload("SIGHUP")
        assert not file.reload_succeeded

    asyncio.run(main())
    assert complaint in str(vars(caplog.records[-1])["fields"]["err"])


def test_a_reload_is_no_fresh_burst(tmp_path: Path) -> None:
    async def main() -> None:
        file = open_file(tmp_path, USERS + LIMIT)
        assert file.current.limit
        assert [file.current.limit.admit() for _ in range(3)] == [True, True, False]
        (tmp_path / "web.yml").write_text(USERS.replace("alice", "bob") + LIMIT)
        await file.reload("SIGHUP")
        assert not file.current.limit.admit()
        (tmp_path / "web.yml").write_text(USERS + LIMIT.replace("2", "1"))
        await file.reload("SIGHUP")
        assert file.current.limit.admit()

    asyncio.run(main())


def test_files_that_change_are_read_without_being_told(tmp_path: Path, pair: Pair, pairs: tuple[Pair, Pair]) -> None:
    reloads: list[LoadedConfig] = []

    async def main() -> None:
        file = open_file(tmp_path, TLS)
        file.on_reload = lambda _before, now: reloads.append(now)
        watching = asyncio.create_task(file.watch(check_seconds=0.01))
        await asyncio.sleep(0.1)
        assert not reloads
        pair.replace(pairs[1])
        while not file.reload_succeeded or not reloads:
            await asyncio.sleep(0.01)
        count = len(reloads)
        await asyncio.sleep(0.1)
        assert len(reloads) == count
        (tmp_path / "web.yml").write_text(TLS + USERS)
        while not file.current.config.users:
            await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_failing_check_is_told_and_the_next_one_looks_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[bool] = []

    async def main() -> None:
        file = open_file(tmp_path, USERS)

        def fail_once(_before: LoadedConfig, _now: LoadedConfig) -> None:
            seen.append(file.reload_succeeded)
            if len(seen) == 1:
                raise RuntimeError("an old connection resists")

        file.on_reload = fail_once
        watching = asyncio.create_task(file.watch(check_seconds=0.01))
        (tmp_path / "web.yml").write_text(USERS + LIMIT)
        while len(seen) < 2 or not file.reload_succeeded:
            await asyncio.sleep(0.01)
        assert not watching.done()
        watching.cancel()

    asyncio.run(asyncio.wait_for(main(), 30))
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.message for record in errors] == ["web configuration not checked"]
    assert "resists" in str(vars(errors[0])["fields"]["err"])


def test_the_state_holds_every_file_that_was_read(tmp_path: Path, pair: Pair) -> None:
    path = tmp_path / "web.yml"
    path.write_text(TLS)
    loaded = load_web_config(path)
    assert loaded.state == load_web_config(path).state
    for file in (path, *pair):
        file.write_bytes(file.read_bytes() + b"\n")
        now = load_web_config(path).state
        assert now != loaded.state, file
        loaded = load_web_config(path)
