"""Contexts made of certificates: what they negotiate, whom they let in, what they refuse to be made of."""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.web.tls import MAX_FILE_BYTES, ServerContext, is_name_allowed, load_context, read_small_file
from exporter.web.tls_config import TlsConfig
from exporter.web.web_config import parse_web_config
from exporter.web.yaml_mapping import ConfigError
from tests.certificates import Authority, Pair


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Pair:
    return authority.issue("server", "DNS:localhost", "IP:127.0.0.1")


def parse(text: str, directory: Path) -> TlsConfig:
    tls = parse_web_config(text.encode(), directory / "web.yml").tls
    assert tls is not None
    return tls


def load(directory: Path, *lines: str) -> ServerContext:
    text = "\n  ".join(("tls_server_config:", "cert_file: server.crt", "key_file: server.key", *lines))
    return load_context(parse(text, directory))


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost") -> ssl.SSLObject:
    """Let two contexts talk in memory; returns the server's side, raises SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server, server_hostname=name)
    done = {ours: False, theirs: False}
    for _ in range(20):
        for side in (theirs, ours):
            if not done[side]:
                try:
                    side.do_handshake()
                    done[side] = True
                except ssl.SSLWantReadError:
                    continue
        if all(done.values()):
            return ours
    raise AssertionError("no handshake came about")


def test_relative_paths_and_inline_text_make_the_same(authority: Authority, server: Pair, tmp_path: Path) -> None:
    def indent(path: Path) -> str:
        return "\n".join(f"    {line}" for line in path.read_text().splitlines())

    inline = f"tls_server_config:\n  cert: |\n{indent(server.certificate)}\n  key: |\n{indent(server.key)}\n"
    for context in (load(authority.directory), load_context(parse(inline, tmp_path))):
        done = shake_hands(context, authority.trust())
        assert (done.version(), done.selected_alpn_protocol()) == ("TLSv1.3", None)
    client = authority.trust()
    client.set_alpn_protocols(["h2", "http/1.1"])
    assert shake_hands(load(authority.directory), client).selected_alpn_protocol() == "http/1.1"
    assert os.listdir(tmp_path) == []  # the key reached no disk


@pytest.mark.usefixtures("server")
def test_versions(authority: Authority) -> None:
    client = authority.trust()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert shake_hands(load(authority.directory), client).version() == "TLSv1.2"
    assert shake_hands(load(authority.directory, "max_version: TLS12"), authority.trust()).version() == "TLSv1.2"
    with pytest.raises(ssl.SSLError):
        shake_hands(load(authority.directory, "min_version: TLS13"), client)


@pytest.mark.usefixtures("server")
def test_suites_and_whose_order_counts(authority: Authority) -> None:
    suites = "cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256]"
    client = authority.trust()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384")

    def find_suite(*lines: str) -> str:
        cipher = shake_hands(load(authority.directory, *lines), client).cipher()
        assert cipher is not None
        return cipher[0]

    assert find_suite(suites) == "ECDHE-ECDSA-AES256-GCM-SHA384"
    assert find_suite(suites, "prefer_server_cipher_suites: false") == "ECDHE-ECDSA-AES128-GCM-SHA256"
    with pytest.raises(ssl.SSLError):
        find_suite("cipher_suites: [TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256]")


@pytest.mark.parametrize("version", ["TLS12", "TLS13"])
def test_the_one_curve_is_the_only_one(authority: Authority, version: str, tmp_path: Path) -> None:
    # In TLS 1.2 the curves are those of certificates as well.
    Pair(tmp_path / "server.crt", tmp_path / "server.key").replace(authority.issue("rsa", "DNS:localhost", key="rsa"))
    context = load(tmp_path, "curve_preferences: [CurveP384]", f"max_version: {version}")
    client = authority.trust()
    client.set_ecdh_curve("secp384r1")
    shake_hands(context, client)
    client.set_ecdh_curve("prime256v1")
    with pytest.raises(ssl.SSLError):
        shake_hands(context, client)


MUTUAL = ("client_ca_file: ca.crt", "client_auth_type: RequireAndVerifyClientCert")


@pytest.mark.usefixtures("server")
def test_clients_certificates(authority: Authority, tmp_path: Path) -> None:
    ours = authority.issue("prometheus", "DNS:prometheus.example.org")
    theirs = Authority(tmp_path, "other").issue("mallory", "DNS:prometheus.example.org")
    required = load(authority.directory, *MUTUAL)
    if_given = load(authority.directory, MUTUAL[0], "client_auth_type: VerifyClientCertIfGiven")
    for context in (required, if_given):
        certificate = shake_hands(context, authority.trust(ours)).getpeercert()
        assert certificate
        assert certificate["subjectAltName"] == (("DNS", "prometheus.example.org"),)
        with pytest.raises(ssl.SSLError):
            shake_hands(context, authority.trust(theirs))
    assert not shake_hands(if_given, authority.trust()).getpeercert()
    with pytest.raises(ssl.SSLError):
        shake_hands(required, authority.trust())
    assert len({required.trust, if_given.trust, load(authority.directory).trust}) == 3
    assert required.trust == load(authority.directory, *MUTUAL, "min_version: TLS13").trust


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("san", "allowed", "is_allowed"),
    [
        ("DNS:a.example.org", "a.example.org", True),
        ("DNS:a.example.org,DNS:b.example.org", "b.example.org", True),
        ("email:a@example.org", "a@example.org", True),
        ("URI:spiffe://example.org/prometheus", "spiffe://example.org/prometheus", True),
        ("IP:192.0.2.1", "192.0.2.1", True),
        ("IP:2001:db8::1", "2001:0db8:0:0::0001", True),
        ("DNS:a.example.org", "example.org", False),
        ("DNS:*.example.org", "a.example.org", False),
        ("DNS:192.0.2.10", "192.0.2.1", False),
        ("", "client", False),  # the common name is no SAN
    ],
)
def test_allowed_names(authority: Authority, san: str, allowed: str, is_allowed: bool) -> None:
    context = load(authority.directory, *MUTUAL, f"client_allowed_sans: ['x', '{allowed}']")
    client = authority.issue("client", *filter(None, san.split(",")))
    certificate = shake_hands(context, authority.trust(client)).getpeercert()
    assert certificate
    assert is_name_allowed(context, certificate) is is_allowed
    assert is_name_allowed(load(authority.directory, *MUTUAL), certificate)


def test_a_key_that_does_not_fit_is_named(authority: Authority, server: Pair, tmp_path: Path) -> None:
    other = authority.issue("elsewhere", "DNS:localhost")
    (tmp_path / "server.crt").write_bytes(server.certificate.read_bytes())
    (tmp_path / "server.key").write_bytes(other.key.read_bytes())
    with pytest.raises(ConfigError, match=r"web\.yml:3: tls_server_config\.key_file: .* do not belong together"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("missing", "cannot be read: No such file"),
        ("fifo", "it is no regular file"),
        ("directory", "it is no regular file"),
        ("device", "it is no regular file"),
        ("large", "it is larger than"),
        ("empty", "no certificate with its key in PEM"),
        ("certificate", "no certificate with its key in PEM"),
        ("passphrase", "the key has a passphrase"),
    ],
)
def test_a_bad_key_file_is_named_and_holds_nothing_up(server: Pair, tmp_path: Path, key: str, complaint: str) -> None:
    (tmp_path / "server.crt").write_bytes(server.certificate.read_bytes())
    path = tmp_path / "server.key"
    words = ["openssl", "pkey", "-aes256", "-passout", "pass:x", "-in", str(server.key), "-out", str(path)]
    makers: dict[str, Callable[[], object]] = {
        "missing": lambda: None,
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "large": lambda: path.write_bytes(b"x" * (MAX_FILE_BYTES + 1)),
        "empty": path.touch,
        "certificate": lambda: path.write_bytes(server.certificate.read_bytes()),
        "passphrase": lambda: subprocess.run(words, check=True),
    }
    makers[key]()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=complaint) as caught:
        load(tmp_path)
    assert "tls_server_config.key_file: " in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("text", ["", "no PEM", "\u00e4"])
def test_a_bad_authority_is_named(authority: Authority, text: str) -> None:
    (authority.directory / "bad.crt").write_text(text)
    with pytest.raises(ConfigError, match=r"client_ca_file: there is no certificate in it"):
        load(authority.directory, "client_ca_file: bad.crt", MUTUAL[1])


def test_a_small_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * MAX_FILE_BYTES)
    assert len(read_small_file(path)) == MAX_FILE_BYTES
