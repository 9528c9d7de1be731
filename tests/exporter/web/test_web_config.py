"""The web configuration: every key of exporter-toolkit's format, and what is wrong by line and key."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.web.web_config import RateLimit, WebConfig, describe_web_config, parse_web_config
from exporter.web.yaml_mapping import ConfigError

HASH = "$2y$10$X0h1gDsPszWURQaxFh.zoubFi6DXncSjhoQNJgRrnGs7EsimhC7zG"
PATH = Path("/etc/kvm/web.yml")
TLS = "tls_server_config:\n  cert_file: a.crt\n  key_file: /keys/a.key\n"
MUTUAL = TLS + "  client_ca_file: ca.crt\n  client_auth_type: RequireAndVerifyClientCert\n"


def parse(text: str) -> WebConfig:
    return parse_web_config(text.encode(), PATH)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_a_file_may_say_nothing(text: str) -> None:
    config = parse(text)
    assert config == WebConfig()
    assert not config.authenticates
    assert describe_web_config(config) == "no TLS; no passwords"


def test_every_key_at_once() -> None:
    config = parse(
        MUTUAL
        + "  client_allowed_sans: [prometheus.example.org, '0:0:0:0:0:0:0:1']\n"
        + "  min_version: TLS12\n  max_version: TLS13\n  prefer_server_cipher_suites: false\n"
        + "  cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384]\n"
        + "  curve_preferences: [CurveP384]\n"
        + "http_server_config:\n  http2: true\n  headers:\n    Strict-Transport-Security: max-age=31536000\n"
        + "    X-Frame-Options: SAMEORIGIN\n    X-Content-Type-Options: nosniff\n    X-XSS-Protection: '0'\n"
        + "    Content-Security-Policy: \"default-src 'self'\"\n"
        + f"basic_auth_users:\n  alice: {HASH}\n  42: {HASH.replace('2y', '2b')}\n"
        + "rate_limit:\n  interval: 1m30.5s\n  burst: 20\n"
    )
    assert config.tls is not None
    assert (config.tls.certificate.path, config.tls.key.path) == (Path("/etc/kvm/a.crt"), Path("/keys/a.key"))
    assert config.tls.files == (Path("/etc/kvm/a.crt"), Path("/keys/a.key"), Path("/etc/kvm/ca.crt"))
    assert config.tls.client_auth is ssl.CERT_REQUIRED
    assert config.tls.client_allowed_sans == {"prometheus.example.org", "::1"}
    assert (config.tls.min_version, config.tls.max_version) == (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
    assert config.tls.ciphers == ("ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-RSA-AES256-GCM-SHA384")
    assert (config.tls.prefer_server_ciphers, config.tls.curve) == (False, "secp384r1")
    assert config.http2 is True
    assert config.headers["X-Frame-Options"] == "SAMEORIGIN"
    assert len(config.headers) == 5
    assert set(config.users) == {"alice", "42"}
    assert config.rate_limit == RateLimit(90.5, 20)
    assert config.authenticates
    assert "passwords of 2" in describe_web_config(config)
    assert "http2 is without effect" in describe_web_config(config)


def test_certificates_may_stand_in_the_file() -> None:
    config = parse(
        "tls_server_config:\n  cert: |\n    CERT\n  key: KEY\n  client_ca: CA\n"
        "  client_auth_type: VerifyClientCertIfGiven\n"
    )
    assert config.tls is not None
    assert config.tls.client_ca is not None
    assert (config.tls.certificate.text, config.tls.key.text, config.tls.client_ca.text) == (b"CERT\n", b"KEY", b"CA")
    assert config.tls.files == ()
    assert not config.authenticates  # a client need not have a certificate


def test_defaults_are_exporter_toolkits() -> None:
    config = parse(TLS + "http_server_config:\n  headers:\n    X-Frame-Options: ''\n")
    assert config.tls is not None
    assert (config.tls.min_version, config.tls.max_version) == (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
    assert (config.tls.client_auth, config.tls.prefer_server_ciphers) == (ssl.CERT_NONE, True)
    assert config.headers == {}  # a blank one is not sent
    assert parse("rate_limit:\n  interval: 0\n  burst: 5\n").rate_limit is None


ALL_13 = "TLS_AES_128_GCM_SHA256, TLS_AES_256_GCM_SHA384, TLS_CHACHA20_POLY1305_SHA256"


def test_all_suites_of_tls_13_may_be_named() -> None:
    config = parse(TLS + f"  cipher_suites: [{ALL_13}, TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA]\n")
    assert config.tls is not None
    assert config.tls.ciphers == ("ECDHE-RSA-AES128-SHA",)


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ("tls_config: {}\n", 1, "tls_config: there is no such key"),
        ("[1]\n", 1, "keys with values"),
        ("a: [\n", 2, "it is not YAML"),
        ("a: 1\n---\nb: 1\n", 2, "it is not YAML"),
        ("tls_server_config:\n", 1, "it is empty"),
        ("tls_server_config: {}\n", 1, "it is empty"),
        ("basic_auth_users:\n", 1, "it is empty"),
        ("tls_server_config:\n  cert_file: a\n", 2, "one of key_file and key is missing"),
        ("tls_server_config:\n  key_file: a\n", 2, "one of cert_file and cert is missing"),
        (TLS + "  cert: x\n", 4, "cert: it is given beside cert_file"),
        (TLS + "  key_file: b\n", 4, "key_file: it is given twice"),
        (TLS + "  key_files: b\n", 4, "key_files: there is no such key"),
        ("tls_server_config:\n  cert_file: ''\n  key_file: a\n", 2, "cert_file: it is empty"),
        ("tls_server_config:\n  cert_file: [a]\n  key_file: a\n", 2, "cert_file: a text is wanted"),
        (TLS + "  client_auth_type: RequestClientCert\n", 4, "which this agent cannot"),
        (TLS + "  client_auth_type: RequireAnyClientCert\n", 4, "which this agent cannot"),
        (TLS + "  client_auth_type: Maybe\n", 4, "want one of NoClientCert"),
        (TLS + "  client_auth_type: RequireAndVerifyClientCert\n", 4, "client_ca_file and client_ca is missing"),
        (TLS + "  client_ca_file: ca\n", 4, "client_auth_type is missing"),
        (TLS + "  client_allowed_sans: [a]\n", 4, "RequireAndVerifyClientCert is missing"),
        (MUTUAL + "  client_allowed_sans: []\n", 6, "at least one entry"),
        (MUTUAL + "  client_allowed_sans:\n    - a\n    - [b]\n", 8, "client_allowed_sans: a text is wanted"),
        (TLS + "  min_version: TLS11\n", 4, "min_version: TLS11 is broken"),
        (TLS + "  max_version: SSL3\n", 4, "want TLS12 or TLS13"),
        (TLS + "  max_version: TLS12\n  min_version: TLS13\n", 5, "is above max_version TLS12"),
        (TLS + "  cipher_suites: [TLS_RSA_WITH_RC4_128_SHA]\n", 4, "is unknown"),
        (TLS + "  cipher_suites: [TLS_AES_128_GCM_SHA256]\n", 4, "name all three"),
        (TLS + f"  cipher_suites: [{ALL_13}]\n  max_version: TLS12\n", 4, "none of these suites is for TLS 1.2"),
        (TLS + "  prefer_server_cipher_suites: 1\n", 4, "true or false is wanted"),
        (TLS + "  curve_preferences:\n    - CurveP256\n    - X25519\n", 6, "one curve only"),
        (TLS + "  curve_preferences: [X25519]\n", 4, "X25519 alone"),
        (TLS + "  curve_preferences: [CurveP224]\n", 4, "is unknown"),
        ("http_server_config:\n  http2: maybe\n", 2, "true or false"),
        ("http_server_config:\n  http3: true\n", 2, "no such key"),
        ("http_server_config:\n  headers:\n    Server: x\n", 3, "this header cannot be set"),
        ("http_server_config:\n  headers:\n    X-Frame-Options: allow\n", 3, "want deny or sameorigin"),
        ('http_server_config:\n  headers:\n    X-XSS-Protection: "0\\r\\nA: b"\n', 3, "one line"),
        ("basic_auth_users:\n  alice: secret\n", 2, "a bcrypt hash is wanted"),
        (f"basic_auth_users:\n  'a:b': {HASH}\n", 2, "has no colon"),
        (f"basic_auth_users:\n  alice: {HASH.replace('$10$', '$31$')}\n", 2, "cost 31"),
        ("basic_auth_users:\n  alice:\n", 2, "a text is wanted"),
        ("rate_limit:\n  interval: 1\n  burst: 2\n", 2, "a duration is wanted"),
        ("rate_limit:\n  interval: 1 s\n", 2, "a duration is wanted"),
        ("rate_limit:\n  interval: 1s\n", 2, "burst 0"),
        ("rate_limit:\n  interval: 1s\n  burst: -1\n", 3, "a whole number"),
        ("rate_limit: !!python/object:os.system {}\n", 1, "it is empty"),
        ("basic_auth_users:\n  alice: !!binary YQ==\n", 2, "a text is wanted"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(text: str, line: int, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value).startswith(f"{PATH}:{line}: ")
    assert complaint in str(caught.value)


def test_a_password_in_the_place_of_a_hash_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("basic_auth_users:\n  alice: tr0ub4dor\n")
    assert "tr0ub4dor" not in str(caught.value)


# YAML can spell what no text is: half of a surrogate pair.
NO_TEXTS = (
    b'tls_server_config: {cert_file: "\\ud800", key_file: server.key}\n',
    b'http_server_config: {headers: {X-A: "\\ud800"}}\n',
    b'basic_auth_users: {"\\ud800": x}\n',
    b'"\\ud800": x\n',
)


@pytest.mark.parametrize("text", [b"\xff", b"[" * 5000, b"\x00", b"a: &a [*b]\n", *NO_TEXTS])
def test_what_is_no_yaml_is_refused(text: bytes) -> None:
    with pytest.raises(ConfigError, match=r"/etc/kvm/web\.yml"):
        parse_web_config(text, PATH)


def test_the_documents_example_is_valid() -> None:
    readme = (Path(__file__).parents[3] / "docs" / "web-config.md").read_text()
    (text,) = (block.partition("```")[0] for block in readme.split("```yaml\n") if "web.yml;" in block.splitlines()[0])
    config = parse(text)
    assert config.authenticates
    assert list(config.users) == ["prometheus"]


SNIPPETS = [
    *("tls_server_config:", "  cert_file: a", "  key_file: b", "basic_auth_users:", "  x: y", "rate_limit:"),
    *("  interval: 1h", "  burst: 3", "- a", "  headers: {}", "http_server_config:", "&a *a", "? :", "!!int 3"),
]


@given(st.lists(st.sampled_from(SNIPPETS)).map("\n".join) | st.text(max_size=60))
def test_any_text_is_a_configuration_or_refused(text: str) -> None:
    try:
        parse_web_config(text.encode("utf-8", "surrogatepass"), PATH)
    except ConfigError as err:
        assert str(err).startswith(str(PATH))
