"""Every decoder and parser of bytes that strangers or another kernel may have made, as a function of bytes.

Each may refuse what it is given by the errors that its docstring names; whatever else it raises is a fault.
"""

from __future__ import annotations

import contextlib
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Final

from exporter.commands.agent_report import parse_report
from exporter.commands.drill import parse_message
from exporter.history.kept_total import BadState, parse_state
from exporter.prometheus.negotiation import accepts_gzip, parse_accept
from exporter.prometheus.selection import COLLECTORS, BadSelection, select_collectors
from exporter.stalls.disassembly import disassemble
from exporter.status_page.view import clean_query
from exporter.web.access import Identity, may_see_details
from exporter.web.basic_auth import parse_authorization
from exporter.web.web_config import parse_web_config
from exporter.web.yaml_mapping import ConfigError
from kvm.binary_stats import decode_descriptors, decode_header, decode_values
from kvm.bpf.btf import find_structs, split_sections
from kvm.bpf.vcpu_decode import STATE_RECORD, decode_files, decode_state
from kvm.bpf.vcpu_programs import STATISTICS_BYTES
from kvm.counters.debugfs import parse_counter
from kvm.counters.stats_layout import decode_layout
from kvm.discovery.kvm_fds import parse_kvm_links
from kvm.discovery.processes import parse_stat, parse_uids
from kvm.discovery.uevents import parse_uevent
from kvm.errors import MalformedData
from kvm.host.facts import parse_cpuinfo, parse_vmx_flags
from kvm.host.lockdown import parse_lockdown
from kvm.host.privileges import (
    parse_effective_capabilities,
    parse_initial_user_namespace,
    parse_mounted,
    parse_seccomp,
)
from kvm.identity.evidence import parse_cgroup_paths
from kvm.identity.libvirt_status import parse_domain_status
from kvm.identity.lookup_process import LookupFailed, decode_answer
from kvm.identity.owners import parse_namespace_pids, parse_pod_cgroup
from kvm.identity.vcpu_index import parse_cgroup, parse_thread_name
from kvm.identity.vmm_cmdline import parse_arguments, parse_cmdline
from kvm.model import NOTIFY_WINDOW_EXITS
from kvm.perf import instruction, notify_records
from kvm.perf.ring import Sample, decode_records
from kvm.perf.tracefs import parse_tracefs_mounts
from kvm.perf.tracepoint_format import Tracepoint, parse_format
from kvm.statistics import StatScope, StatSelection
from tests.known_statistics import read_captured

ORIGIN: Final = "fuzz"
DESCRIBED: Final = read_captured(StatScope.VCPU)
REFUSALS: Final = (MalformedData, ConfigError, LookupFailed, BadSelection, BadState)


def statistics(data: bytes) -> None:
    header = decode_header(data[:24], ORIGIN)
    block, wanted = data[header.desc_offset :], (NOTIFY_WINDOW_EXITS,)
    decode_values(decode_descriptors(header, block, ORIGIN), data[header.data_offset :])
    selection = StatSelection(StatScope.VCPU, lambda _key: True)
    layout = decode_layout(header, block, StatScope.VCPU, wanted, selection=selection, origin=ORIGIN)
    if len(data) >= layout.length:
        layout.values.unpack_from(data)
        layout.pick(data)


def bpf_records(data: bytes) -> None:
    decode_files(data[1:], data[0] % 16 if data else 0, 16, ORIGIN)


def vcpu_state(data: bytes) -> None:
    # A map of the kernel's: there are always as many bytes.
    block = data.ljust(STATE_RECORD.size + STATISTICS_BYTES, b"\0")
    decode_state(block, STATISTICS_BYTES, DESCRIBED)


def perf_records(data: bytes) -> None:
    decode_records(data)


def tracepoint_format(data: bytes) -> None:
    tracepoint = parse_format(data.decode("utf-8", "replace"), ORIGIN)
    with contextlib.suppress(MalformedData):
        tracepoint.decode(data, tracepoint.fields)


def split_record(data: bytes, names: tuple[str, ...]) -> tuple[Tracepoint, bytes]:
    """The file ``format`` of a tracepoint that has fields of these names, and behind a zero byte a record of it."""
    text, _, record = data.partition(b"\0")
    tracepoint = parse_format(text.decode("utf-8", "replace"), ORIGIN)
    if missing := tracepoint.find_missing(names):
        raise MalformedData(ORIGIN, f"no {missing}")
    return tracepoint, record


def notify_exit(data: bytes) -> None:
    tracepoint, record = split_record(data, notify_records.FIELDS)
    notify_records.decode_notify_exit(tracepoint, Sample(1, 1, record), 1)


def guest_instruction(data: bytes) -> None:
    tracepoint, record = split_record(data, instruction.FIELDS)
    if instruction.CODE in tracepoint.fields and (found := instruction.decode_instruction(tracepoint, record)):
        disassemble(found.code, found.rip)


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
    parse_kvm_links(enumerate(text.splitlines()))
    parse_stat(text, ORIGIN)


def host_files(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    parse_cpuinfo(text)
    parse_vmx_flags(text)
    parse_lockdown(text)
    parse_effective_capabilities(text)
    parse_seccomp(text)
    parse_initial_user_namespace(text)
    parse_mounted(text)
    parse_tracefs_mounts(text)
    parse_counter(text, ORIGIN)


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
    may_see_details(Identity.SOCKET, {"Host": text})


def query(data: bytes) -> None:
    found = urllib.parse.parse_qs(data.decode("utf-8", "surrogateescape"), keep_blank_values=True, errors="replace")
    clean_query("".join(found.get("q", [])))
    select_collectors(frozenset(COLLECTORS), found.get("collect[]", []), found.get("exclude[]", []))


def state_file(data: bytes) -> None:
    parse_state(data, "boot")


def agent_answer(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    for parse in (parse_message, parse_report):
        with contextlib.suppress(ValueError):
            parse(text)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (
        statistics,
        bpf_records,
        vcpu_state,
        perf_records,
        tracepoint_format,
        notify_exit,
        guest_instruction,
        btf,
        libvirt_status,
        command_line,
        proc_files,
        host_files,
        uevent,
        lookup_answer,
        web_config,
        request_headers,
        query,
        state_file,
        agent_answer,
    )
}


def feed(name: str, data: bytes) -> None:
    """Give bytes to a target, which may refuse them."""
    with contextlib.suppress(*REFUSALS):
        TARGETS[name](data)
