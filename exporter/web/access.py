"""Who may see what: the one place that decides."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from typing import Final

from aiohttp import web

PRIVATE_HEADERS: Final[Mapping[str, str]] = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


_PROXIES: Final = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


def is_local_client(peer: str | None, headers: Mapping[str, str], http_version: tuple[int, int] = (1, 1)) -> bool:
    """Tell whether a client is one of this machine; ``peer`` is its address, None for a Unix socket.

    HTTP/1.0 is what nginx speaks for others, without a word about them, unless it is told better.
    """
    if http_version < (1, 1) or any(name in headers for name in _PROXIES):
        return False
    is_ours = headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
    if not is_ours and not _follows_a_link(headers):
        return False
    return peer is None or (_is_loopback(peer) and _is_loopback(_find_host(headers.get("Host", ""))))


def _follows_a_link(headers: Mapping[str, str]) -> bool:
    """Tell whether a browser asks for a page of its own, not for a frame in another one."""
    return headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest", "document") == "document"


def _find_host(text: str) -> str:
    """Return the host of a header ``Host``, without brackets and port."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def _is_loopback(text: str) -> bool:
    if text.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_local(request: web.Request) -> bool:
    """Tell whether a request is one of this machine, and of nobody else by way of it."""
    return is_local_client(find_peer(request), request.headers, request.version)


def is_unix_socket(request: web.Request) -> bool:
    """Tell whether a request came through a Unix socket."""
    sock = request.transport.get_extra_info("socket") if request.transport else None
    return sock is not None and sock.family == socket.AF_UNIX


def find_client(request: web.Request) -> str:
    """Name the client of a request as ``name_client`` does."""
    peer = find_peer(request)
    return name_client(("" if peer is None else peer,)) if peer != "gone" else "gone"


def name_client(address: object) -> str:
    """Name a client for counts and the log: its address; of IPv6 the network, as a client has 2**64 addresses."""
    try:
        found = ipaddress.ip_address(str(address[0]).partition("%")[0]) if isinstance(address, tuple) else None
    except ValueError:
        found = None
    if isinstance(found, ipaddress.IPv6Address):
        return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))
    return str(found or "unix socket")


def find_peer(request: web.Request) -> str | None:
    """Return the address of who is connected, None for the Unix socket; a header cannot change it."""
    peer = request.transport.get_extra_info("peername") if request.transport else "gone"
    return str(peer[0]) if isinstance(peer, tuple) else None if not peer else str(peer)
