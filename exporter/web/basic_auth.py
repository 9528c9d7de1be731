"""Passwords: HTTP's Basic scheme against bcrypt hashes.

A check takes 0.14 s of a core at cost 10. It runs in threads of its own, two at most, and clients take turns, so that
guessing costs the host no more and holds up neither the event loop nor somebody who knows a password. A password that
was right is remembered by a keyed digest, never as it is; so a scraper is checked once. A name that nobody has takes
the check of somebody's hash, always the same one, and so exactly as long as if it were a user's.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import bcrypt

from exporter.web.turns import Turns

CHECKS_AT_ONCE: Final = 2
CHECKS_WAITING_PER_CLIENT: Final = 8
# bcrypt takes no more of a password into account; from version 5 on the library raises.
MAX_PASSWORD_BYTES: Final = 72
MAX_HEADER: Final = 1024
CHALLENGE: Final = 'Basic realm="kvm-notify-exporter", charset="UTF-8"'


class Credentials(NamedTuple):
    """What a client says of itself."""

    user: str
    password: bytes


def parse_authorization(header: str) -> Credentials | None:
    """Parse the header ``Authorization``; None where it is not Basic's, or where no hash could match it."""
    scheme, _, encoded = header.strip().partition(" ")
    if scheme.lower() != "basic" or len(header) > MAX_HEADER:
        return None
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        name = user.decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    if not colon or b"\0" in password or len(password) > MAX_PASSWORD_BYTES:
        return None
    return Credentials(name, password)


class PasswordChecker:
    """Checks passwords for all who ask, for as long as the server runs."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._known: dict[str, bytes] = {}
        self._turns = Turns(CHECKS_AT_ONCE, CHECKS_WAITING_PER_CLIENT)
        self._workers = ThreadPoolExecutor(max_workers=CHECKS_AT_ONCE, thread_name_prefix="bcrypt")

    async def check(self, users: Mapping[str, bytes], credentials: Credentials, client: str) -> bool:
        """Tell whether a password is the user's; raises TooManyWaiting where a client asks too much at once."""
        user, password = credentials
        hashed = users.get(user) or self._pick(users, user)
        digest = self._digest(user.encode(), hashed, password)
        if user in users and hmac.compare_digest(self._known.get(user, b""), digest):
            return True
        async with self._turns.take(client):
            loop = asyncio.get_running_loop()
            matches = await loop.run_in_executor(self._workers, bcrypt.checkpw, password, hashed)
        if not matches or user not in users:
            return False
        self._known = {name: kept for name, kept in self._known.items() if name in users} | {user: digest}
        return True

    def close(self) -> None:
        """Give the threads back."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _pick(self, users: Mapping[str, bytes], name: str) -> bytes:
        """Return the hash to check for a name that nobody has: nobody outside can tell whose it is."""
        number = int.from_bytes(self._digest(name.encode())[:8], "big")
        return sorted(users.values())[number % len(users)]

    def _digest(self, *parts: bytes) -> bytes:
        digest = hashlib.blake2b(key=self._secret, digest_size=32)
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.digest()
