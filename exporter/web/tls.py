"""Makes an SSLContext of ``tls_server_config``: a new one for each reload, never a change to one in use.

A certificate and key that do not belong together, loaded into a context in use, break every handshake from then on.
Files are read once and by us, with a bound, and handed to OpenSSL in memory: neither a FIFO nor a device at that path
holds anything up, and an inline key never reaches a disk.
"""

from __future__ import annotations

import hashlib
import os
import ssl
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from exporter.web.tls_config import Pem, TlsConfig, normalize_san
from exporter.web.yaml_mapping import ConfigError

MAX_FILE_BYTES: Final = 1 << 20


class ServerContext(ssl.SSLContext):
    """A context that knows whom it lets in: ``trust`` is the same for two that take the same client certificates."""

    trust: str = ""
    allowed_sans: frozenset[str] = frozenset()


def load_context(config: TlsConfig) -> ServerContext:
    """Read the certificates and the key and make a context of them; raises ConfigError."""
    context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version, context.maximum_version = config.min_version, config.max_version
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    if config.prefer_server_ciphers:
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    else:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    try:
        if config.ciphers:
            context.set_ciphers(":".join(config.ciphers))
        if config.curve:
            context.set_ecdh_curve(config.curve)
    except (ssl.SSLError, ValueError) as err:
        raise ConfigError(f"{config.certificate.where}: this OpenSSL cannot do what the file asks for: {err}") from err
    _load_pair(context, config)
    authority = b""
    if config.client_ca is not None:
        authority = _read_pem(config.client_ca)
        try:
            context.load_verify_locations(cadata=authority.decode("ascii"))
        except (ssl.SSLError, ValueError) as err:
            raise ConfigError(f"{config.client_ca.where}: there is no certificate in it: {_explain(err)}") from err
    context.verify_mode = config.client_auth
    context.allowed_sans = config.client_allowed_sans
    parts = (str(int(config.client_auth)).encode(), *(san.encode() for san in sorted(context.allowed_sans)), authority)
    context.trust = hashlib.sha256(b"\0".join(parts)).hexdigest()
    return context


def is_name_allowed(context: ServerContext, certificate: Mapping[str, object]) -> bool:
    """Tell whether a verified client certificate (as ``getpeercert`` has it) has one of the allowed names."""
    if not context.allowed_sans:
        return True
    names = certificate.get("subjectAltName", ())
    found = {normalize_san(str(name)) for _kind, name in names} if isinstance(names, tuple) else set()
    return bool(found & context.allowed_sans)


def read_small_file(path: Path) -> bytes:
    """Read a regular file of at most MAX_FILE_BYTES; raises OSError."""
    # O_NONBLOCK: opening a FIFO would wait for somebody to write.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{path}: it is no regular file")
    except OSError:
        os.close(fd)
        raise
    with os.fdopen(fd, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise OSError(f"{path}: it is larger than {MAX_FILE_BYTES} bytes")
    return data


def _load_pair(context: ssl.SSLContext, config: TlsConfig) -> None:
    def refuse_passphrase() -> str:
        raise ConfigError(f"{config.key.where}: the key has a passphrase, which nobody can type here")

    with _in_memory(_read_pem(config.certificate)) as certificate, _in_memory(_read_pem(config.key)) as key:
        try:
            context.load_cert_chain(certificate, key, password=refuse_passphrase)
        except ssl.SSLError as err:
            if err.reason == "KEY_VALUES_MISMATCH":
                raise ConfigError(f"{config.key.where}: certificate and key do not belong together") from err
            where = f"{config.certificate.where} and {config.key.where}"
            raise ConfigError(f"{where}: no certificate with its key in PEM: {_explain(err)}") from err


def _explain(err: Exception) -> str:
    reason = getattr(err, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else str(err)


def _read_pem(pem: Pem) -> bytes:
    if pem.path is None:
        return pem.text
    try:
        return read_small_file(pem.path)
    except OSError as err:
        raise ConfigError(f"{pem.where}: {pem.path} cannot be read: {err.strerror or err}") from err


@contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """Give the path of a file with these bytes, which only this process can open."""
    with os.fdopen(os.memfd_create("kvm-notify-exporter", os.MFD_CLOEXEC), "wb") as file:
        file.write(data)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"
