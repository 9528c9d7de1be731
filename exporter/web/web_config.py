"""The format of ``--web.config.file``: that of Prometheus's exporter-toolkit, every key of it.

``parse_web_config`` is pure: it names what is wrong by line and key, and reads no other file. What Python's ssl cannot
do is refused, never ignored. ``http2`` alone is accepted without effect: a client that may speak HTTP/2 speaks
HTTP/1.1 just as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from exporter.web.tls_config import TLS_KEYS, TlsConfig, parse_tls
from exporter.web.yaml_mapping import Value, YamlMapping, parse_yaml

# Above it, one check takes longer than a scrape may (14 takes 2 s, each step doubles it).
MAX_BCRYPT_COST: Final = 15
_BCRYPT: Final = re.compile(r"\$2[aby]\$(?P<cost>[0-9]{2})\$[./A-Za-z0-9]{53}", re.ASCII)
# Names as they are sent; values that are accepted, None for any.
_HEADERS: Final[Mapping[str, tuple[str, ...] | None]] = {
    "Content-Security-Policy": None,
    "Strict-Transport-Security": None,
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": None,
}
_DURATION: Final = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|\u00b5s|\u03bcs|ms|s|m|h)", re.ASCII)
_UNIT_SECONDS: Final = {
    "ns": 1e-9,
    "us": 1e-6,
    "\u00b5s": 1e-6,
    "\u03bcs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}


@dataclass(frozen=True, slots=True)
class RateLimit:
    """One request every ``interval_seconds`` in the long run, ``burst`` at once."""

    interval_seconds: float
    burst: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WebConfig:
    """What the file says. ``users`` are bcrypt hashes by name; ``http2`` is None where the file does not mention it."""

    tls: TlsConfig | None = None
    users: Mapping[str, bytes] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    rate_limit: RateLimit | None = None
    http2: bool | None = None

    @property
    def authenticates(self) -> bool:
        """Whether nobody is served without a password or a client certificate."""
        return bool(self.users) or (self.tls is not None and self.tls.requires_client_certificate)


def parse_web_config(text: bytes, path: Path) -> WebConfig:
    """Parse the file's text; ``path`` is where it stands: relative paths in it start there. Raises ConfigError."""
    root = parse_yaml(text, str(path))
    if root is None:
        return WebConfig()
    tls, http = root.take_mapping("tls_server_config"), root.take_mapping("http_server_config")
    users, limit = root.take_mapping("basic_auth_users"), root.take_mapping("rate_limit")
    root.finish(("tls_server_config", "http_server_config", "basic_auth_users", "rate_limit"))
    http2, headers = _parse_http(http) if http else (None, {})
    config = WebConfig(
        tls=parse_tls(tls, path.parent) if tls else None,
        users=_parse_users(users) if users else {},
        headers=headers,
        rate_limit=_parse_rate_limit(limit) if limit else None,
        http2=http2,
    )
    if tls:
        tls.finish(TLS_KEYS)
    return config


def describe_web_config(config: WebConfig) -> str:
    """Say in a line what a configuration does."""
    parts = [config.tls.describe() if config.tls else "no TLS"]
    parts.append(f"passwords of {len(config.users)}" if config.users else "no passwords")
    if config.rate_limit:
        parts.append(f"a request every {config.rate_limit.interval_seconds:g} s, {config.rate_limit.burst} at once")
    if config.headers:
        parts.append(f"headers {', '.join(sorted(config.headers))}")
    if config.http2 is not None:
        parts.append("http2 is without effect: this agent speaks HTTP/1.1")
    return "; ".join(parts)


def _parse_http(section: YamlMapping) -> tuple[bool | None, dict[str, str]]:
    http2, found = section.take_bool("http2"), section.take_mapping("headers")
    section.finish(("http2", "headers"))
    headers = {}
    for name, value in found.take_rest().items() if found else ():
        if name.text not in _HEADERS:
            raise name.refuse(f"this header cannot be set; those that can are {', '.join(_HEADERS)}")
        accepted = _HEADERS[name.text]
        if accepted and value.text and value.text.lower() not in accepted:
            raise value.refuse(f"{value.text!r}: want {' or '.join(accepted)}")
        if not value.text.isprintable() or not value.text.isascii():
            raise value.refuse("a header's value is one line of printable ASCII")
        if value.text:  # a blank one is not sent, as in exporter-toolkit
            headers[name.text] = value.text
    return (http2[0] if http2 else None), headers


def _parse_users(section: YamlMapping) -> dict[str, bytes]:
    users = {}
    for name, value in section.take_rest().items():
        if not name.text or ":" in name.text or not name.text.isprintable():
            raise name.refuse("a user's name is printable and has no colon: a client could not send it")
        found = _BCRYPT.fullmatch(value.text)
        if not found:  # the text may be a password: it is not repeated
            raise value.refuse("a bcrypt hash is wanted ($2a$, $2b$ or $2y$, as htpasswd -nBC 10 prints it)")
        if not 4 <= int(found["cost"]) <= MAX_BCRYPT_COST:
            raise value.refuse(f"cost {found['cost']}: want 04 to {MAX_BCRYPT_COST}, or a check outlasts a scrape")
        users[name.text] = value.text.encode()
    return users


def _parse_rate_limit(section: YamlMapping) -> RateLimit | None:
    interval, burst = section.take_text("interval"), section.take_text("burst")
    section.finish(("interval", "burst"))
    seconds = _parse_duration(interval) if interval else 0.0
    number = 0
    if burst:
        if not burst.text.isascii() or not burst.text.isdigit() or len(burst.text) > 9:
            raise burst.refuse(f"{burst.text!r}: a whole number is wanted")
        number = int(burst.text)
    if not seconds:
        return None
    if not number:
        raise (burst or Value("", section.where)).refuse("burst 0 lets no request pass: want 1 or more")
    return RateLimit(seconds, number)


def _parse_duration(value: Value) -> float:
    """Parse a duration as Go spells it: 500ms, 1.5s, 1m30s, or a plain 0."""
    if value.text == "0":
        return 0.0
    if not re.fullmatch(f"(?:{_DURATION.pattern})+", value.text, re.ASCII) or len(value.text) > 40:
        raise value.refuse(f"{value.text!r}: a duration is wanted, such as 500ms or 1s")
    seconds = 0.0
    for part in _DURATION.findall(value.text):
        unit = part.lstrip("0123456789.")
        seconds += float(part.removesuffix(unit)) * _UNIT_SECONDS[unit]
    return seconds
