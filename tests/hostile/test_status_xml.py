"""Well-formed libvirt statuses that are made to take long: what the worst of them cost."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kvm.errors import MalformedData
from kvm.identity.libvirt_status import DEPTH_LIMIT, STATUS_BYTES, parse_domain_status

CPU_SECONDS = 0.5
HEAD = b"<domstatus pid='7'><domain><name>web</name>"


def build_namespaces() -> bytes:
    """60 nested elements with a namespace each, and elements of the innermost for the rest."""
    levels = DEPTH_LIMIT - 4
    opened = b"".join(b"<n%d:a xmlns:n%d='urn:%d'>" % (n, n, n) for n in range(levels))
    closed = b"".join(b"</n%d:a>" % n for n in reversed(range(levels)))
    left = STATUS_BYTES - len(HEAD + opened + closed) - 30
    return HEAD + opened + b"<n59:b/>" * (left // 8) + closed + b"</domain></domstatus>"


def build_attributes() -> bytes:
    """As many attributes as there is room for, in one element."""
    names = b"".join(b" a%x=''" % n for n in range(25_000))
    return HEAD + b"<b" + names + b"/></domain></domstatus>"


@pytest.mark.parametrize("build", [build_namespaces, build_attributes])
def test_the_worst_status_takes_little_cpu(build: Callable[[], bytes], tell: Callable[[str], None]) -> None:
    document = build()
    assert STATUS_BYTES * 0.8 < len(document) <= STATUS_BYTES
    began = time.process_time()
    try:
        found = parse_domain_status(document, "it").name
    except MalformedData as err:
        found = str(err)
    seconds = time.process_time() - began
    tell(f"a status of {len(document) >> 10} KiB ({build.__name__.removeprefix('build_')}): {seconds:.3f} s, {found}")
    assert seconds < CPU_SECONDS
