"""Passwords: what is accepted, what a check costs and whom it holds up."""

from __future__ import annotations

import asyncio
import base64
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator

import bcrypt
import pytest

from exporter.web.basic_auth import Credentials, PasswordChecker, parse_authorization
from exporter.web.turns import TooManyWaiting

PASSWORD = b"correct horse"
USERS = {"alice": bcrypt.hashpw(PASSWORD, bcrypt.gensalt(4)), "bob": bcrypt.hashpw(b"b", bcrypt.gensalt(4))}


@pytest.fixture
def checker() -> Iterator[PasswordChecker]:
    checker = PasswordChecker()
    yield checker
    checker.close()


def encode(text: bytes) -> str:
    return "Basic " + base64.b64encode(text).decode()


@pytest.mark.parametrize(
    ("header", "credentials"),
    [
        (encode(b"alice:a:b"), Credentials("alice", b"a:b")),
        (encode(b"alice:"), Credentials("alice", b"")),
        (encode("zo\u00eb:p\u00e4ss".encode()), Credentials("zo\u00eb", "p\u00e4ss".encode())),
        (encode(b"alice:" + b"x" * 72), Credentials("alice", b"x" * 72)),
        (encode(b"alice:x").replace("Basic", "bAsIc  "), Credentials("alice", b"x")),
        (encode(b"alice:" + b"x" * 73), None),
        (encode(b"alice:a\0b"), None),
        (encode(b"alice"), None),
        (encode(b"\xff\xfe:x"), None),
        ("Basic", None),
        ("Basic !!!!", None),
        ("Basic YQ", None),
        ("Bearer YTpi", None),
        ("", None),
        (encode(b"a" * 2000 + b":x"), None),
        ("Basic \u0661\u0662", None),
    ],
)
def test_authorization(header: str, credentials: Credentials | None) -> None:
    assert parse_authorization(header) == credentials


def test_bcrypts_three_spellings_are_one() -> None:
    async def main() -> None:
        checker = PasswordChecker()
        for prefix in (b"$2a$", b"$2b$", b"$2y$"):
            users = {"alice": prefix + USERS["alice"][4:]}
            assert await checker.check(users, Credentials("alice", PASSWORD), "c")
            assert not await checker.check(users, Credentials("alice", b"wrong"), "c")
        checker.close()

    asyncio.run(main())


def run(scenario: Callable[[PasswordChecker], Awaitable[None]]) -> None:
    async def main() -> None:
        checker = PasswordChecker()
        try:
            await scenario(checker)
        finally:
            checker.close()

    asyncio.run(main())


def test_names_and_passwords_belong_together() -> None:
    async def scenario(checker: PasswordChecker) -> None:
        assert await checker.check(USERS, Credentials("bob", b"b"), "c")
        assert not await checker.check(USERS, Credentials("bob", PASSWORD), "c")
        assert not await checker.check(USERS, Credentials("mallory", PASSWORD), "c")
        assert not await checker.check(USERS, Credentials("", b""), "c")

    run(scenario)


def test_a_password_is_checked_once_and_again_when_its_hash_changes() -> None:
    slow = {"alice": bcrypt.hashpw(PASSWORD, bcrypt.gensalt(10))}

    async def scenario(checker: PasswordChecker) -> None:
        right = Credentials("alice", PASSWORD)
        assert await checker.check(slow, right, "c")
        began = time.perf_counter()
        for _ in range(100):
            assert await checker.check(slow, right, "c")
        assert time.perf_counter() - began < 0.05  # one check alone takes longer
        assert not await checker.check({"alice": USERS["bob"]}, right, "c")
        assert not await checker.check({"bob": USERS["bob"]}, right, "c")
        assert PASSWORD not in repr(vars(checker)).encode()

    run(scenario)


def test_a_name_that_nobody_has_takes_as_long_as_a_wrong_password() -> None:
    users = {"alice": bcrypt.hashpw(PASSWORD, bcrypt.gensalt(9))}

    async def scenario(checker: PasswordChecker) -> None:
        async def measure(name: str) -> float:
            began = time.perf_counter()
            assert not await checker.check(users, Credentials(name, b"wrong"), "c")
            return time.perf_counter() - began

        known, unknown = [], []
        for _ in range(15):
            known.append(await measure("alice"))
            unknown.append(await measure("mallory"))
        assert 0.5 < statistics.median(unknown) / statistics.median(known) < 2

    run(scenario)


def test_the_event_loop_goes_on_while_passwords_are_checked() -> None:
    users = {"alice": bcrypt.hashpw(PASSWORD, bcrypt.gensalt(12))}

    async def scenario(checker: PasswordChecker) -> None:
        check = asyncio.create_task(checker.check(users, Credentials("alice", b"wrong"), "c"))
        ticks = 0
        while not check.done():
            await asyncio.sleep(0.005)
            ticks += 1
        assert ticks >= 10

    run(scenario)


def test_a_guesser_waits_and_somebody_else_does_not() -> None:
    users = {"alice": bcrypt.hashpw(PASSWORD, bcrypt.gensalt(10))}

    async def scenario(checker: PasswordChecker) -> None:
        guesses = [
            asyncio.create_task(checker.check(users, Credentials("alice", b"%d" % number), "guesser"))
            for number in range(100)
        ]
        await asyncio.sleep(0)
        assert await checker.check(users, Credentials("alice", PASSWORD), "scraper")
        under_way = [guess for guess in guesses if not guess.done()]
        assert len(under_way) >= 4  # its check did not come after all of the guesser's
        results = await asyncio.gather(*guesses, return_exceptions=True)
        assert sum(isinstance(result, TooManyWaiting) for result in results) == 90  # 2 checked, 8 waiting
        assert [result for result in results if result is False] == [False] * 10

    run(scenario)
