"""Certificates of tests, made by the openssl command in a directory of the test's."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple


class Pair(NamedTuple):
    """A certificate with its key."""

    certificate: Path
    key: Path

    def replace(self, other: Pair) -> None:
        """Put another pair in the place of this one, as a rotation does: each file at once, one after the other."""
        for mine, theirs in zip(self, other, strict=True):
            fresh = mine.with_suffix(".new")
            fresh.write_bytes(theirs.read_bytes())
            fresh.rename(mine)


class Authority:
    """A certificate authority that trusts whoever asks it."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.directory = directory
        self.pair = _make(directory, name, "-addext", "basicConstraints=critical,CA:TRUE")
        self.certificate = self.pair.certificate

    def issue(self, name: str, *sans: str, key: str = "ec") -> Pair:
        """Make a certificate with these names (``DNS:a``, ``IP:127.0.0.1``)."""
        extensions = ["-addext", f"subjectAltName={','.join(sans)}"] if sans else []
        signer = ["-CA", str(self.pair.certificate), "-CAkey", str(self.pair.key)]
        return _make(self.directory, name, *signer, *extensions, key=key)

    def trust(self, client: Pair | None = None) -> ssl.SSLContext:
        """Make a client's context that trusts this authority, with a certificate of its own or none."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        if client:
            context.load_cert_chain(*client)
        return context


def _make(directory: Path, name: str, *words: str, key: str = "ec") -> Pair:
    pair = Pair(directory / f"{name}.crt", directory / f"{name}.key")
    kind = ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"] if key == "ec" else ["rsa:2048"]
    command = ["openssl", "req", "-x509", "-newkey", *kind, "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    subprocess.run(
        [*command, "-out", str(pair.certificate), "-keyout", str(pair.key), *words], check=True, capture_output=True
    )
    return pair
