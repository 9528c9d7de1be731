"""Lets requests in: the client's certificate, the password, then the rate limit.

In that order: a limit before authentication would let strangers starve a scraper. What ``--web.config.file`` asks for
is asked of clients over TCP; who may connect to a Unix socket, its file's mode says, and who that is, the kernel. How
a client is known decides what it sees (``access``).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from exporter.logs.rate_limit import RateLimitedLog
from exporter.web.access import Identity, find_client, find_unix_socket, identify
from exporter.web.basic_auth import CHALLENGE, PasswordChecker, parse_authorization
from exporter.web.peer_credentials import read_peer
from exporter.web.settings import ServerSettings
from exporter.web.tls import ServerContext, is_name_allowed
from exporter.web.turns import TooManyWaiting
from exporter.web.web_config_file import LoadedConfig

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gate:
    """A middleware that asks each request for what the configuration in force wants."""

    def __init__(
        self,
        read_config: Callable[[], LoadedConfig | None],
        settings: ServerSettings,
        rate_limited_log: RateLimitedLog,
    ) -> None:
        self._read_config = read_config
        self._trusted_peers = settings.trusted_peers
        self._stranger = Identity.VISITOR if settings.is_simulated else Identity.NONE
        self._rate_limited_log = rate_limited_log
        self._passwords = PasswordChecker()

    @property
    def headers(self) -> Mapping[str, str]:
        """Return the headers that the file adds to every answer."""
        loaded = self._read_config()
        return loaded.config.headers if loaded else {}

    def close(self) -> None:
        """Give back what checking passwords takes."""
        self._passwords.close()

    @web.middleware
    async def admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer a request by ``handler``, or say why not."""
        loaded = self._read_config()
        if sock := find_unix_socket(request):
            found: Identity | web.Response = self._identify_peer(sock)
        elif loaded is None:
            found = Identity.NONE
        else:
            found = await self._check(request, loaded)
        if isinstance(found, web.Response):
            return found
        with identify(self._stranger if found is Identity.NONE else found):
            return await handler(request)

    def _identify_peer(self, sock: socket.socket) -> Identity:
        try:
            return Identity.SOCKET if self._trusted_peers.holds(read_peer(sock)) else Identity.NONE
        except OSError as err:
            self._rate_limited_log.write(logging.WARNING, "the kernel does not say who is connected", err=err.strerror)
            return Identity.NONE

    async def _check(self, request: web.Request, loaded: LoadedConfig) -> Identity | web.Response:
        by_certificate = self._check_certificate(request, loaded)
        if isinstance(by_certificate, web.Response):
            return by_certificate
        by_password = await self._check_password(request, loaded)
        if isinstance(by_password, web.Response):
            return by_password
        if loaded.limit is not None and not loaded.limit.admit():
            return _refuse(429, "too many requests: rate_limit of the web configuration", {"Retry-After": "1"})
        return by_certificate if by_password is Identity.NONE else by_password

    def _check_certificate(self, request: web.Request, loaded: LoadedConfig) -> Identity | web.Response:
        """Refuse a client whose certificate the configuration in force would not have let in."""
        if loaded.context is None:
            return Identity.NONE
        transport = request.transport
        context = transport.get_extra_info("sslcontext") if transport else None
        if not isinstance(context, ServerContext) or context.trust != loaded.context.trust:
            # The connection was made under another file. 421 lets a client try again on a new one.
            return _refuse(421, "other client certificates are asked for by now: connect anew", close=True)
        certificate = transport.get_extra_info("peercert") if transport else None
        if not certificate:
            return Identity.NONE
        if not is_name_allowed(loaded.context, certificate):
            self._tell("client certificate refused", request, err="none of its names is in client_allowed_sans")
            return _refuse(403, "the client certificate has none of the allowed names", close=True)
        return Identity.CERTIFICATE

    async def _check_password(self, request: web.Request, loaded: LoadedConfig) -> Identity | web.Response:
        users = loaded.config.users
        if not users:
            return Identity.NONE
        headers = {"WWW-Authenticate": CHALLENGE}
        header = request.headers.get("Authorization")
        if header is None:
            return _refuse(401, "a user and a password are wanted", headers)
        credentials = parse_authorization(header)
        try:
            if credentials and await self._passwords.check(users, credentials, find_client(request)):
                return Identity.PASSWORD
        except TooManyWaiting:
            self._tell("passwords are tried too fast", request)
            return _refuse(429, "too many passwords of this client wait to be checked", {"Retry-After": "1"})
        self._tell("password refused", request)
        return _refuse(401, "user or password is wrong", headers)

    def _tell(self, text: str, request: web.Request, **fields: object) -> None:
        self._rate_limited_log.write(logging.WARNING, text, client=find_client(request), **fields)


def _refuse(status: int, text: str, headers: Mapping[str, str] | None = None, *, close: bool = False) -> web.Response:
    response = web.Response(status=status, text=f"{text}\n", content_type="text/plain", headers=headers)
    if close:
        response.force_close()
    return response
