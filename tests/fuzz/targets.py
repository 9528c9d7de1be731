"""Every decoder and parser of bytes that strangers or another kernel may have made, as a function of bytes.

Each may refuse what it is given by the errors that its docstring names; whatever else it raises is a fault.
"""

from __future__ import annotations

import contextlib
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Final

from exporter.history.kept_total import BadState, parse_state
from exporter.prometheus.negotiation import accepts_gzip, parse_accept
from exporter.prometheus.selection import COLLECTORS, BadSelection, select_collectors
from exporter.status_page.view import clean_query
from exporter.web.basic_auth import parse_authorization
from exporter.web.web_config import parse_web_config
from exporter.web.yaml_mapping import ConfigError
from kvm.binary_stats import decode_descriptors, decode_header, decode_values
from kvm.bpf.btf import find_structs, split_sections
from kvm.bpf.vcpu_decode import decode_files
from kvm.discovery.processes import parse_stat, parse_uids
from kvm.discovery.uevents import parse_uevent
from kvm.errors import MalformedData
from kvm.identity.evidence import parse_cgroup_paths
from kvm.identity.libvirt_status import parse_domain_status
from kvm.identity.lookup_process import LookupFailed, decode_answer
from kvm.identity.owners import parse_namespace_pids, parse_pod_cgroup
from kvm.identity.vcpu_index import parse_cgroup, parse_thread_name
from kvm.identity.vmm_cmdline import parse_arguments, parse_cmdline
from kvm.perf.ring import decode_records
from kvm.perf.tracepoint_format import parse_format

ORIGIN: Final = "fuzz"
REFUSALS: Final = (MalformedData, ConfigError, LookupFailed, BadSelection, BadState)


def statistics(data: bytes) -> None:
    header = decode_header(data[:24], ORIGIN)
    found = decode_descriptors(header, data[24:], ORIGIN)
    decode_values(found, data)


def bpf_records(data: bytes) -> None:
    decode_files(data[1:], data[0] % 16 if data else 0, 16, ORIGIN)


def perf_records(data: bytes) -> None:
    decode_records(data)


def tracepoint_format(data: bytes) -> None:
    tracepoint = parse_format(data.decode("utf-8", "replace"), ORIGIN)
    with contextlib.suppress(MalformedData):
        tracepoint.decode(data, tracepoint.fields)


def btf(data: bytes) -> None:
    list(find_structs(split_sections(data, ORIGIN).types, ORIGIN))


def libvirt_status(data: bytes) -> None:
    parse_domain_status(data, ORIGIN)


def command_line(data: bytes) -> None:
    program, _, rest = data.partition(b"\n")
    parse_cmdline(parse_arguments(rest), program.decode("utf-8", "replace"))


def proc_files(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    parse_cgroup_paths(text)
    parse_pod_cgroup(text)
    parse_cgroup(text)
    parse_namespace_pids(text)
    parse_thread_name(text)
    parse_uids(text)
    parse_stat(text, ORIGIN)


def uevent(data: bytes) -> None:
    parse_uevent(data)


def lookup_answer(data: bytes) -> None:
    decode_answer(data, 1)


def web_config(data: bytes) -> None:
    parse_web_config(data, Path("web.yml"))


def request_headers(data: bytes) -> None:
    text = data.decode("latin-1")
    parse_authorization(text)
    parse_accept(text)
    accepts_gzip(text)


def query(data: bytes) -> None:
    found = urllib.parse.parse_qs(data.decode("utf-8", "surrogateescape"), keep_blank_values=True, errors="replace")
    clean_query("".join(found.get("q", [])))
    select_collectors(frozenset(COLLECTORS), found.get("collect[]", []), found.get("exclude[]", []))


def state_file(data: bytes) -> None:
    parse_state(data, "boot")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (
        statistics,
        bpf_records,
        perf_records,
        tracepoint_format,
        btf,
        libvirt_status,
        command_line,
        proc_files,
        uevent,
        lookup_answer,
        web_config,
        request_headers,
        query,
        state_file,
    )
}


def feed(name: str, data: bytes) -> None:
    """Give bytes to a target, which may refuse them."""
    with contextlib.suppress(*REFUSALS):
        TARGETS[name](data)
