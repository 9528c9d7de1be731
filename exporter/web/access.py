"""Who may see what: the one place that decides.

RIPs tell where a guest's kernel lies, and owners are nobody's business. So both, and drills, are for whom the agent
knows: a process that has connected to the Unix socket, if the kernel says that it is root's, the agent's own user's or
of ``--web.details-group``; or a client that has shown a password or a certificate. Where a client connects from says
nothing: guests with user networking, every local user and all clients of a proxy come from 127.0.0.1.

Who is known may still ask for somebody else. A proxy that says so is not answered in full, as long as it is the proxy
that is known and not who is behind it; nor is a browser that another site's page makes ask. ``ssh -L`` leads a browser
to the socket: there a page could call itself by a name that leads to that port (DNS rebinding), but not localhost.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from enum import StrEnum
from typing import Final

from aiohttp import web

PRIVATE_HEADERS: Final[Mapping[str, str]] = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
# What proxies add, in lower case: names, and beginnings of names.
_PROXIES: Final = frozenset(
    {"forwarded", "via", "x-real-ip", "x-request-id", "x-client-ip", "x-cluster-client-ip", "true-client-ip"}
)
_PROXY_PREFIXES: Final = ("x-forwarded-", "x-original-", "x-envoy-", "cf-", "fastly-")

_HOST: Final = re.compile(r"(?:(?P<name>localhost)|(?P<v4>[0-9.]+)|\[(?P<v6>[0-9a-f:.]+)\])(?::[0-9]{1,5})?", re.ASCII)


class Identity(StrEnum):
    """How the agent knows who has sent a request."""

    NONE = "none"
    SOCKET = "socket"
    CERTIFICATE = "certificate"
    PASSWORD = "password"
    VISITOR = "visitor"  # anybody, at a simulated host: there is nothing to hide


_IDENTITY: ContextVar[Identity] = ContextVar("identity", default=Identity.NONE)


@contextlib.contextmanager
def identify(identity: Identity) -> Iterator[None]:
    """Let requests that are answered inside the context be of this identity."""
    token = _IDENTITY.set(identity)
    try:
        yield
    finally:
        _IDENTITY.reset(token)


def may_see_details(identity: Identity, headers: Mapping[str, str], http_version: tuple[int, int] = (1, 1)) -> bool:
    """Tell whether a request is answered in full, by who has sent it and what it says of itself.

    HTTP/1.0 is what nginx speaks for others, without a word about them, unless it is told better. A password that
    comes through a proxy is that of who is behind it.
    """
    if identity is Identity.NONE:
        return False
    if identity in (Identity.SOCKET, Identity.CERTIFICATE) and (
        http_version < (1, 1) or any(map(_is_of_proxy, headers))
    ):
        return False
    if identity is Identity.SOCKET and not _is_loopback(headers.get("Host", "")):
        return False
    return headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin") or _follows_a_link(headers)


def sees_details(request: web.Request) -> bool:
    """Tell whether the request that is being answered is answered in full."""
    return may_see_details(_IDENTITY.get(), request.headers, request.version)


def _is_of_proxy(header: str) -> bool:
    name = header.lower()
    return name in _PROXIES or name.startswith(_PROXY_PREFIXES)


def _is_loopback(host: str) -> bool:
    """Tell whether a header ``Host`` names this machine: nothing but that, and a port."""
    found = _HOST.fullmatch(host.lower())
    if not found:
        return False
    if found["name"]:
        return True
    try:
        return ipaddress.ip_address(found["v4"] or found["v6"]).is_loopback
    except ValueError:
        return False


def _follows_a_link(headers: Mapping[str, str]) -> bool:
    """Tell whether a browser asks for a page of its own, not for a frame in another one."""
    return headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest", "document") == "document"


def find_unix_socket(request: web.Request) -> socket.socket | None:
    """Return the Unix socket that a request came through, None where it came otherwise."""
    sock: socket.socket | None = request.transport.get_extra_info("socket") if request.transport else None
    return sock if sock is not None and sock.family == socket.AF_UNIX else None


def find_client(request: web.BaseRequest) -> str:
    """Name the client of a request as ``name_client`` does; a header cannot change it."""
    return name_client(request.transport.get_extra_info("peername") if request.transport else None)


def name_client(address: object) -> str:
    """Name a client for counts and the log: its address; of IPv6 the network, as a client has 2**64 addresses."""
    if not isinstance(address, tuple):
        return "gone" if address is None else "unix socket"
    try:
        found = ipaddress.ip_address(str(address[0]).partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(found, ipaddress.IPv6Address):
        return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))
    return str(found)
