"""Who may see what, by who it is and what its request says."""

from __future__ import annotations

import pytest

from exporter.web.access import Identity, may_see_details, name_client

KNOWN = (Identity.SOCKET, Identity.CERTIFICATE, Identity.PASSWORD, Identity.VISITOR)
HERE = {"Host": "localhost"}


def test_who_is_known_sees_details_and_nobody_else_does() -> None:
    for identity in KNOWN:
        assert may_see_details(identity, HERE)
    assert not may_see_details(Identity.NONE, HERE)


@pytest.mark.parametrize(
    "header",
    [
        *("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Real-IP", "X-Request-Id"),
        *("CF-Connecting-IP", "CF-Ray", "True-Client-IP", "X-Original-URI", "x-forwarded-for", "X-Envoy-Internal"),
    ],
)
def test_a_proxy_that_is_known_does_not_make_known_who_is_behind_it(header: str) -> None:
    for identity in (Identity.SOCKET, Identity.CERTIFICATE):
        assert not may_see_details(identity, HERE | {header: "x"})
        assert not may_see_details(identity, HERE, (1, 0))
    # A password is not the proxy's.
    assert may_see_details(Identity.PASSWORD, HERE | {header: "x"}, (1, 0))


@pytest.mark.parametrize(
    ("site", "mode", "dest", "sees"),
    [
        ("none", "navigate", "document", True),
        ("same-origin", "cors", "empty", True),
        ("cross-site", "navigate", "document", True),  # a link
        ("cross-site", "navigate", "iframe", False),
        ("cross-site", "no-cors", "image", False),
        ("same-site", "cors", "empty", False),
    ],
)
def test_another_sites_page_sees_nothing_by_way_of_a_browser(site: str, mode: str, dest: str, sees: bool) -> None:
    headers = HERE | {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
    assert {may_see_details(identity, headers) for identity in KNOWN} == {sees}


@pytest.mark.parametrize(
    ("host", "sees"),
    [
        *((host, True) for host in ("localhost", "LocalHost:9750", "127.0.0.1", "127.8.9.1:1", "[::1]", "[::1]:9750")),
        *((host, False) for host in ("", "evil.example", "localhost.evil.example", "[::1]evil", "localhost:80@evil")),
        *((host, False) for host in ("[::1", "::1", "10.0.2.2", "[fe80::1]", "127.1.1", "localhost:")),
    ],
)
def test_at_the_socket_no_page_can_call_itself_this_machine(host: str, sees: bool) -> None:
    assert may_see_details(Identity.SOCKET, {"Host": host}) is sees
    assert may_see_details(Identity.PASSWORD, {"Host": host})  # a browser has none for another name


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (("127.0.0.1", 1), "127.0.0.1"),
        (("2001:db8:0:1:2:3:4:5", 1, 0, 0), "2001:db8:0:1::/64"),
        (("::ffff:10.0.0.1", 1, 0, 0), "10.0.0.1"),
        (("fe80::1%eth0", 1, 0, 2), "fe80::/64"),
        ("", "unix socket"),
        (b"\0x", "unix socket"),
        (None, "gone"),
        (("?", 1), "unknown"),
    ],
)
def test_clients_have_names(address: object, name: str) -> None:
    assert name_client(address) == name
