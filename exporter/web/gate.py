"""Lets requests in: the client's certificate, the password, then the rate limit.

In that order: a limit before authentication would let strangers starve a scraper. What ``--web.config.file`` asks for
is asked of clients over TCP; who may connect to a Unix socket, its file's mode says.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from exporter.logs.rate_limit import RateLimitedLog
from exporter.web.access import find_client, is_unix_socket
from exporter.web.basic_auth import CHALLENGE, PasswordChecker, parse_authorization
from exporter.web.tls import ServerContext, is_name_allowed
from exporter.web.turns import TooManyWaiting
from exporter.web.web_config_file import LoadedConfig

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gate:
    """A middleware that asks each request for what the configuration in force wants."""

    def __init__(self, read_config: Callable[[], LoadedConfig | None], rate_limited_log: RateLimitedLog) -> None:
        self._read_config = read_config
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
        if loaded is None or is_unix_socket(request):
            return await handler(request)
        refusal = self._check_certificate(request, loaded) or await self._check_password(request, loaded)
        if refusal is None and loaded.limit is not None and not loaded.limit.admit():
            refusal = _refuse(429, "too many requests: rate_limit of the web configuration", {"Retry-After": "1"})
        return refusal or await handler(request)

    def _check_certificate(self, request: web.Request, loaded: LoadedConfig) -> web.Response | None:
        """Refuse a client whose certificate the configuration in force would not have let in."""
        if loaded.context is None:
            return None
        transport = request.transport
        context = transport.get_extra_info("sslcontext") if transport else None
        if not isinstance(context, ServerContext) or context.trust != loaded.context.trust:
            # The connection was made under another file. 421 lets a client try again on a new one.
            return _refuse(421, "other client certificates are asked for by now: connect anew", close=True)
        certificate = transport.get_extra_info("peercert") if transport else None
        if certificate and not is_name_allowed(loaded.context, certificate):
            self._tell("client certificate refused", request, err="none of its names is in client_allowed_sans")
            return _refuse(403, "the client certificate has none of the allowed names", close=True)
        return None

    async def _check_password(self, request: web.Request, loaded: LoadedConfig) -> web.Response | None:
        users = loaded.config.users
        if not users:
            return None
        headers = {"WWW-Authenticate": CHALLENGE}
        header = request.headers.get("Authorization")
        if header is None:
            return _refuse(401, "a user and a password are wanted", headers)
        credentials = parse_authorization(header)
        try:
            if credentials and await self._passwords.check(users, credentials, find_client(request)):
                return None
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
