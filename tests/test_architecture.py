"""Imports go one way: from the kernel to HTTP. Every module has a rank and imports only from lower ones."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the kernel outwards; modules on one line do not import each other.
LAYERS = [
    {"kvm", "kvm.model"},
    {"kvm.abi"},
    {
        "kvm.syscalls",
        "kvm.statistics",
        "kvm.read_errors",
        "kvm.vmm_cmdline",
        "kvm.libbpf",
        "kvm.uevents",
        "kvm.processes",
        "kvm.perf_ring",
        "kvm.tracepoint_format",
    },
    {"kvm.vm_files", "kvm.perf_events", "kvm.notify_records"},
    {"kvm.host", "kvm.confinement", "kvm.libvirt_status", "kvm.discovery", "kvm.vcpu_numbers", "kvm.throwaway_vm"},
    {"kvm.owners", "kvm.identities", "kvm.bpf_refusals", "kvm.perf_refusals", "kvm.tracefs"},
    {"kvm.sources", "kvm.sources.bpf_decode"},
    {"kvm.sources.bpf_object", "kvm.notify_trigger", "kvm.notify_trace"},
    {"kvm.sources.stats_fd", "kvm.sources.debugfs", "kvm.sources.simulated", "kvm.sources.bpf"},
    {"kvm.snapshot"},
    {"kvm.sources.simulated_trace"},
    {
        "exporter",
        "exporter.metrics",
        "exporter.log_format",
        "exporter.check",
        "exporter.listen",
        "exporter.verdicts",
        "exporter.cadence",
        "exporter.evidence",
    },
    {
        "exporter.report",
        "exporter.exposition",
        "exporter.movements",
        "exporter.history",
        "exporter.connections",
        "exporter.complaints",
    },
    {
        "exporter.progress",
        "exporter.budget",
        "exporter.polling",
        "exporter.threads",
        "exporter.attempts",
        "exporter.stall_log",
        "exporter.journal",
    },
    {"exporter.vm_lines", "exporter.verdict_lines", "exporter.api", "exporter.lately", "exporter.plot"},
    {"exporter.status"},
    {"exporter.status_words"},
    {"exporter.status_table"},
    {"exporter.status_page"},
    {"exporter.look", "exporter.followed", "exporter.drill"},
    {
        "exporter.collector",
        "exporter.looks",
        "exporter.means",
        "exporter.holds",
        "exporter.single_reads",
        "exporter.vcpu_reports",
    },
    {"exporter.triggering"},
    {"exporter.watch", "exporter.stall_pages"},
    {"exporter.status_pages"},
    {"exporter.server", "exporter.watching"},
    {"exporter.cli"},
    {"exporter.__main__"},
]
RANKS = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
THIRD_PARTY = {"exporter": {"aiohttp", "prometheus_client"}, "kvm": set[str]()}


def find_modules() -> dict[str, Path]:
    modules = {}
    for package in ("kvm", "exporter"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def find_imports(path: Path, modules: set[str]) -> set[str]:
    """Names of the modules that a file imports; ``from kvm import abi`` is kvm.abi."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in modules else str(node.module) for name in names}
    return imported


def test_every_module_has_a_rank_and_every_rank_a_module() -> None:
    assert set(find_modules()) == set(RANKS)


def test_imports_go_towards_the_kernel_only() -> None:
    modules = find_modules()
    wrong = [
        f"{module} imports {imported}"
        for module, path in modules.items()
        for imported in find_imports(path, set(modules))
        if imported in RANKS and RANKS[imported] >= RANKS[module]
    ]
    assert wrong == []


def test_third_party_packages_stay_where_they_belong() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, path in find_modules().items()
        for imported in find_imports(path, set(find_modules()))
        if (top := imported.split(".")[0]) not in sys.stdlib_module_names
        and top not in {"kvm", "exporter"} | THIRD_PARTY[module.split(".")[0]]
    ]
    assert wrong == []


def test_ctypes_is_used_where_it_is_declared_only() -> None:
    users = {name for name, path in find_modules().items() if "ctypes" in find_imports(path, set())}
    assert users <= {"kvm.syscalls", "kvm.libbpf"}
