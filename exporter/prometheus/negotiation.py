"""Which format a client likes best, by its Accept headers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

OPENMETRICS: Final = "application/openmetrics-text"
PLAIN: Final = "text/plain"


@dataclass(frozen=True, slots=True)
class Format:
    """What a client wants: a media type, the version of it, and the escaping scheme that it has to be told, if any."""

    media_type: str
    version: str
    escaping: str = ""

    @property
    def content_type(self) -> str:
        """The header to answer with."""
        escaping = f"; escaping={self.escaping}" if self.escaping else ""
        return f"{self.media_type}; version={self.version}; charset=utf-8{escaping}"

    @property
    def openmetrics(self) -> bool:
        """Whether this is OpenMetrics and not Prometheus's text format."""
        return self.media_type == OPENMETRICS


def parse_accept(header: str) -> Format:
    """Choose the format for a header ``Accept``: what the client likes best of what we speak, else text 0.0.4.

    Our names are all in the old character set, so that the escaping schemes ``underscores`` and ``allow-utf-8`` are the
    same bytes; the others are answered as ``underscores``. prometheus_client's own ``choose_encoder`` is not asked: it
    looks at no ``q=``, repeats any version that it is sent, raises on one like ``version=a``, and before its 0.22 knows
    neither text 1.0.0 nor OpenMetrics 1.0.0.
    """
    for media_type, parameters in _rank_accepted(header):
        version = parameters.get("version", "")
        escaping = "allow-utf-8" if parameters.get("escaping") == "allow-utf-8" else "underscores"
        if media_type in (OPENMETRICS, PLAIN) and version == "1.0.0":
            return Format(media_type, version, escaping)
        if media_type == OPENMETRICS and not version:
            return Format(OPENMETRICS, "1.0.0")
        if media_type in ("*/*", "text/*") or (media_type == PLAIN and version in ("", "0.0.4")):
            break
    return Format(PLAIN, "0.0.4")


def accepts_gzip(header: str) -> bool:
    """Tell whether a header ``Accept-Encoding`` names gzip, and not with ``q=0``."""
    return any(coding == "gzip" for coding, _ in _rank_accepted(header))


def _rank_accepted(header: str) -> list[tuple[str, dict[str, str]]]:
    """Parse an Accept header into its entries, best first, those with q=0 left out."""
    ranked: list[tuple[float, str, dict[str, str]]] = []
    for entry in header.split(","):
        value, *rest = (part.strip().lower() for part in entry.split(";"))
        parameters = {name.strip(): text.strip() for name, _, text in (part.partition("=") for part in rest)}
        try:
            quality = float(parameters.get("q", "1"))
        except ValueError:
            quality = 1.0
        if quality > 0:
            ranked.append((quality, value, parameters))
    ranked.sort(key=lambda item: -item[0])
    return [(value, parameters) for _, value, parameters in ranked]
