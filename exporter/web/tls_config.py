"""The keys of ``tls_server_config``, and what of them Python's ssl can do."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.web.yaml_mapping import Value, YamlMapping

_CA_KEYS = ("client_ca_file", "client_ca")
TLS_KEYS: Final = (
    *("cert_file", "cert", "key_file", "key", *_CA_KEYS, "client_auth_type", "client_allowed_sans"),
    *("min_version", "max_version", "cipher_suites", "prefer_server_cipher_suites", "curve_preferences"),
)
_VERSIONS: Final = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_OLD_VERSIONS: Final = ("TLS10", "TLS11")
_CLIENT_AUTH: Final[Mapping[str, ssl.VerifyMode]] = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_UNVERIFIED: Final = ("RequestClientCert", "RequireAnyClientCert", "RequireClientCert")
# Go's names (crypto/tls.CipherSuites) and OpenSSL's.
_SUITES: Final[Mapping[str, str]] = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
}
_SUITES_13: Final = frozenset(
    {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"},
)
_CURVES: Final[Mapping[str, str]] = {"CurveP256": "prime256v1", "CurveP384": "secp384r1", "CurveP521": "secp521r1"}


@dataclass(frozen=True, slots=True)
class Pem:
    """Certificates or a key: a file's path, or the text itself; ``where`` is for error messages."""

    where: str
    path: Path | None = None
    text: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """What ``tls_server_config`` says, in OpenSSL's words; empty ``ciphers`` and ``curve`` are OpenSSL's own choice."""

    certificate: Pem
    key: Pem
    client_ca: Pem | None = None
    client_auth: ssl.VerifyMode = ssl.CERT_NONE
    client_allowed_sans: frozenset[str] = frozenset()
    min_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    max_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    ciphers: tuple[str, ...] = ()
    prefer_server_ciphers: bool = True
    curve: str = ""

    @property
    def requires_client_certificate(self) -> bool:
        """Whether nobody is served without a certificate that was verified."""
        return self.client_auth is ssl.CERT_REQUIRED

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files that are read besides the configuration itself."""
        pems = (self.certificate, self.key, self.client_ca)
        return tuple(pem.path for pem in pems if pem is not None and pem.path is not None)

    def describe(self) -> str:
        """Say in a few words what it does."""
        names = {version: name for name, version in _VERSIONS.items()}
        versions = sorted({names[self.min_version], names[self.max_version]})
        auth = next(name for name, mode in _CLIENT_AUTH.items() if mode is self.client_auth)
        return f"{' to '.join(versions)}, {auth}"


def normalize_san(text: str) -> str:
    """Return a name as it is compared: addresses in their shortest form, the rest as it is."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return text


def parse_tls(section: YamlMapping, directory: Path) -> TlsConfig:
    """Take all keys out of ``tls_server_config``; relative paths start at ``directory``. Raises ConfigError."""
    certificate, key = _take_pem(section, "cert", directory), _take_pem(section, "key", directory)
    client_ca = _take_pem(section, "client_ca", directory)
    for name, found in (("cert", certificate), ("key", key)):
        if found is None:
            raise Value("", section.where).refuse(f"one of {name}_file and {name} is missing")
    if certificate is None or key is None:
        raise RuntimeError("not reached: both were looked for")
    client_auth, sans = _take_client_auth(section, client_ca)
    lowest, highest = _take_version(section, "min_version", "TLS12"), _take_version(section, "max_version", "TLS13")
    if _VERSIONS[lowest.text] > _VERSIONS[highest.text]:
        raise lowest.refuse(f"{lowest.text} is above max_version {highest.text}")
    prefer = section.take_bool("prefer_server_cipher_suites")
    return TlsConfig(
        certificate=certificate,
        key=key,
        client_ca=client_ca,
        client_auth=client_auth,
        client_allowed_sans=sans,
        min_version=_VERSIONS[lowest.text],
        max_version=_VERSIONS[highest.text],
        ciphers=_choose_ciphers(section.take_list("cipher_suites"), highest.text),
        prefer_server_ciphers=prefer[0] if prefer else True,
        curve=_choose_curve(section.take_list("curve_preferences")),
    )


def _take_pem(section: YamlMapping, name: str, directory: Path) -> Pem | None:
    file, inline = section.take_text(f"{name}_file"), section.take_text(name)
    if file and inline:
        raise inline.refuse(f"it is given beside {name}_file; one of them is wanted")
    for value in (file, inline):
        if value and not value.text.strip():
            raise value.refuse("it is empty")
    if file:
        if "\0" in file.text:
            raise file.refuse("a path has no NUL")
        return Pem(file.where, path=directory / file.text)
    return Pem(inline.where, text=inline.text.encode()) if inline else None


def _take_client_auth(section: YamlMapping, client_ca: Pem | None) -> tuple[ssl.VerifyMode, frozenset[str]]:
    kind = section.take_text("client_auth_type")
    sans = section.take_list("client_allowed_sans")
    if kind and kind.text in _UNVERIFIED:
        verified = "RequireAndVerifyClientCert"
        raise kind.refuse(f"{kind.text} takes certificates that nobody verifies, which this agent cannot: {verified}")
    if kind and kind.text and kind.text not in _CLIENT_AUTH:
        raise kind.refuse(f"{kind.text!r}: want one of {', '.join(_CLIENT_AUTH)}")
    mode = _CLIENT_AUTH[kind.text] if kind and kind.text else ssl.CERT_NONE
    if client_ca and mode is ssl.CERT_NONE:
        raise Value("", client_ca.where).refuse("client_auth_type is missing, without which no certificate is verified")
    if mode is not ssl.CERT_NONE and kind and not client_ca:
        raise kind.refuse(f"one of {' and '.join(_CA_KEYS)} is missing: any authority's client would be let in")
    if sans and mode is not ssl.CERT_REQUIRED:
        raise sans[0].refuse("client_auth_type RequireAndVerifyClientCert is missing, without which there is no name")
    return mode, frozenset(normalize_san(san.text) for san in sans)


def _take_version(section: YamlMapping, key: str, default: str) -> Value:
    value = section.take_text(key) or Value(default, section.where)
    if value.text in _OLD_VERSIONS:
        raise value.refuse(f"{value.text} is broken, and OpenSSL no longer speaks it: want TLS12 or TLS13")
    if value.text not in _VERSIONS:
        raise value.refuse(f"{value.text!r}: want TLS12 or TLS13")
    return value


def _choose_ciphers(suites: Sequence[Value], highest: str) -> tuple[str, ...]:
    """Return OpenSSL's names. TLS 1.3's three cannot be chosen among: all of them are named, or none."""
    for suite in suites:
        if suite.text not in _SUITES and suite.text not in _SUITES_13:
            raise suite.refuse(f"{suite.text!r} is unknown; known are {', '.join((*_SUITES, *sorted(_SUITES_13)))}")
    named_13 = [suite for suite in suites if suite.text in _SUITES_13]
    if named_13 and {suite.text for suite in named_13} != _SUITES_13:
        raise named_13[0].refuse("Python's ssl cannot choose among TLS 1.3's suites: name all three of them, or none")
    ciphers = tuple(_SUITES[suite.text] for suite in suites if suite.text in _SUITES)
    if suites and not ciphers and highest == "TLS12":
        raise suites[0].refuse("max_version is TLS12, and none of these suites is for TLS 1.2")
    return ciphers


def _choose_curve(curves: Sequence[Value]) -> str:
    """Return OpenSSL's name of the one curve; more than one, or X25519, Python's ssl cannot be told."""
    for curve in curves:
        if curve.text not in _CURVES and curve.text != "X25519":
            raise curve.refuse(f"{curve.text!r} is unknown; known are {', '.join(_CURVES)}, X25519")
    if len(curves) > 1:
        raise curves[1].refuse("Python's ssl can be told one curve only: name one, or leave the key out for OpenSSL's")
    if curves and curves[0].text not in _CURVES:
        raise curves[0].refuse("Python's ssl cannot be told X25519 alone; leave the key out: OpenSSL prefers it anyway")
    return _CURVES[curves[0].text] if curves else ""
