"""Imports go one way: from the kernel to HTTP. Packages have ranks; inside a package nothing imports in a circle."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the kernel outwards. A room is a package, or a file that stands alone. It imports from lower ranks and from
# itself; rooms on one line do not import each other.
RANKS = [
    {"kvm", "kvm.abi", "kvm.errors", "kvm.log_limit"},
    {"kvm.statistics"},
    {"kvm.model"},
    {"kvm.syscalls", "kvm.binary_stats", "kvm.read_errors", "kvm.blind_spots", "kvm.protection"},
    {"kvm.host", "kvm.discovery", "kvm.statistic_plan"},
    {"kvm.bpf", "kvm.perf", "kvm.identity"},
    {"kvm.counters", "kvm.vm_budget"},
    {"kvm.readings"},
    {"kvm.snapshot"},
    {"kvm.simulated"},
    {"exporter", "exporter.logs", "exporter.build_info", "exporter.host_summary", "exporter.patterns"}
    | {"exporter.untrusted_text"},
    {"exporter.stalls", "exporter.history", "exporter.top"},
    {"exporter.monitor", "exporter.prometheus", "exporter.status_page", "exporter.service"},
    {"exporter.web"},
    {"exporter.flag_values"},
    {"exporter.flags"},
    {"exporter.wiring"},
    {"exporter.commands"},
    {"exporter.cli"},
    {"exporter.__main__"},
]
RANK_OF = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
THIRD_PARTY = {
    "exporter.web": {"aiohttp", "bcrypt", "yaml"},
    "exporter.prometheus": {"prometheus_client"},
    "exporter.monitor": {"psutil"},
    "exporter.stalls": {"capstone"},
}
# Calls that one place makes, so that what they need and how they fail is known in one place.
ONLY_CALLER = {
    "perf_event_open": {"kvm.syscalls", "kvm.perf.event"},
    "pidfd_getfd": {"kvm.syscalls", "kvm.counters.stats_fd"},
}
# Modules that only declare: what they declare is used by the tests of what uses it.
DECLARATIONS = {"exporter.__main__", "exporter.monitor.backends", "kvm.counters.source", "kvm.errors", "kvm.model"}
# Modules whose tests stand in a file of another name, below tests/. A test file of a module's own name takes it out.
TESTED_IN = {
    "exporter.build_info": "exporter/prometheus/test_collector.py",
    "exporter.commands.agent_socket": "exporter/commands/test_agent_report.py",
    "exporter.commands.check": "live/test_agent.py",
    "exporter.commands.columns": "exporter/commands/test_once.py",
    "exporter.commands.drill": "exporter/stalls/test_drill.py",
    "exporter.commands.least_privilege": "live/test_least_privilege.py",
    "exporter.flag_values": "exporter/test_cli.py",
    "exporter.history.changes": "exporter/monitor/test_polling.py",
    "exporter.monitor.attempts": "exporter/monitor/test_polling.py",
    "exporter.monitor.drills": "exporter/monitor/test_stall_monitor.py",
    "exporter.monitor.trace_session": "exporter/monitor/test_trace_scheduler.py",
    "exporter.monitor.tracked_vcpu": "exporter/monitor/test_trace_scheduler.py",
    "exporter.monitor.workers": "live/test_agent.py",
    "exporter.prometheus.negotiation": "exporter/prometheus/test_exposition.py",
    "exporter.prometheus.selection": "exporter/prometheus/test_collector.py",
    "exporter.prometheus.shown_vms": "exporter/prometheus/test_histories.py",
    "exporter.prometheus.stat_help": "exporter/prometheus/test_stat_metrics.py",
    "exporter.prometheus.vm_series": "exporter/prometheus/test_collector.py",
    "exporter.stalls.evidence": "exporter/stalls/test_detector.py",
    "exporter.stalls.verdicts": "exporter/stalls/test_detector.py",
    "exporter.status_page.table": "exporter/status_page/test_page.py",
    "exporter.status_page.text": "exporter/status_page/test_page.py",
    "exporter.web.cpu_budget": "exporter/web/test_status_handlers.py",
    "exporter.web.metrics_handler": "exporter/web/test_server.py",
    "exporter.web.protocol": "exporter/logs/test_rate_limit.py",
    "exporter.web.settings": "exporter/web/test_server.py",
    "exporter.web.tls_config": "exporter/web/test_web_config.py",
    "exporter.web.yaml_mapping": "exporter/web/test_web_config.py",
    "exporter.web.stall_handlers": "exporter/web/test_vcpus_json.py",
    "exporter.wiring": "exporter/test_cli.py",
    "kvm.bpf.bpf_object": "kvm/bpf/test_libbpf.py",
    "kvm.bpf.notify_trigger": "live/test_bpf_trigger.py",
    "kvm.counters.bpf": "live/test_bpf.py",
    "kvm.counters.retried_source": "kvm/test_snapshot.py",
    "kvm.counters.stats_fd": "live/test_readers.py",
    "kvm.counters.stats_layout": "kvm/test_binary_stats.py",
    "kvm.discovery.kvm_fds": "kvm/discovery/test_vm_discovery.py",
    "kvm.discovery.uevents": "kvm/discovery/test_vm_discovery.py",
    "kvm.host.kvm_device": "kvm/host/test_facts.py",
    "kvm.host.paths": "live/test_paths.py",
    "kvm.host.throwaway_vm": "live/test_bpf.py",
    "kvm.identity.evidence": "kvm/identity/test_owners.py",
    "kvm.identity.lookup_child": "kvm/identity/test_owner_cache.py",
    "kvm.identity.lookup_process": "kvm/identity/test_owner_cache.py",
    "kvm.log_limit": "kvm/test_read_errors.py",
    "kvm.perf.notify_records": "kvm/perf/test_notify_tracer.py",
    "kvm.perf.refusals": "kvm/perf/test_notify_tracer.py",
    "kvm.perf.tracefs": "kvm/perf/test_notify_tracer.py",
    "kvm.protection": "kvm/test_snapshot.py",
    "kvm.syscalls": "live/test_bpf.py",
}
RUNS = {"kvm.identity.lookup_process": {"kvm.identity.lookup_child"}}  # in an interpreter of its own
# A test file with a subject of its own: what all of a package's modules give together.
LONGEST_FILE = 300
# Files that are longer than that below their docstring and imports, and why.
LONGER_FILES = {
    "exporter.monitor.stall_monitor": "one engine: when it reads, and what each reading does to a vCPU",
    "exporter.prometheus.metrics": "one table",
    "exporter.stalls.detector": "one state machine: its transitions are read together",
    "kvm.counters.bpf": "one source: how it opens, learns the kernel's layout, and proves that it reads right",
}
WHOLE_PACKAGE_TESTS = {"exporter/prometheus/test_golden.py", "exporter/monitor/test_trace_limits.py"}
WHOLE_PACKAGE_TESTS |= {"exporter/monitor/test_kernel_verdicts.py", "exporter/prometheus/test_stat_arithmetic.py"}
WHOLE_PACKAGE_TESTS |= {"exporter/prometheus/test_histories.py"}


def find_modules() -> dict[str, Path]:
    modules = {}
    for package in ("kvm", "exporter"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = find_modules()


def find_imports(path: Path) -> set[str]:
    """Names of the modules that a file imports; ``from kvm import abi`` is kvm.abi."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in MODULES else str(node.module) for name in names}
    return imported


IMPORTS = {module: find_imports(path) for module, path in MODULES.items()}
TESTS = {
    path.relative_to(ROOT / "tests").as_posix(): path
    for path in (ROOT / "tests").rglob("test_*.py")
    if "inside" not in path.parts
}


def name_module(test: str) -> str:
    """The module whose test this is by its name; none need be there."""
    return test.removesuffix(".py").replace("/test_", "/").replace("/", ".")


def find_reached(test: Path) -> set[str]:
    """The modules that a test and its helpers import, and all that these import; the commands too if it runs them."""
    imported = find_imports(test)
    for name in sorted(imported):
        helper = ROOT / f"{name.replace('.', '/')}.py"
        if name.startswith("tests.") and not helper.name.startswith("test_") and helper.exists():
            imported |= find_imports(helper)
    reached, new = set[str](), imported & set(MODULES)
    if any(name.startswith("tests.agents") for name in imported):
        new.add("exporter.cli")
    while new:
        reached |= new
        new = {
            name for module in new for name in IMPORTS[module] | RUNS.get(module, set()) if name in MODULES
        } - reached
    return reached


def find_room(module: str) -> str:
    """The room of a module: the most special of RANKS that it is in."""
    while module not in RANK_OF and "." in module:
        module = module.rpartition(".")[0]
    return module


def test_every_room_has_a_rank_and_every_rank_a_room() -> None:
    rooms = {find_room(module) for module in MODULES}
    assert rooms == set(RANK_OF)
    alone = {module for module in MODULES if module.count(".") == 1 or module.count(".") == 0}
    assert alone <= set(RANK_OF), "a file beside the packages needs a rank of its own"


def test_rooms_import_towards_the_kernel_only() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, names in IMPORTS.items()
        for imported in names & set(MODULES)
        if find_room(imported) != find_room(module) and RANK_OF[find_room(imported)] >= RANK_OF[find_room(module)]
    ]
    assert wrong == []


def test_no_file_is_long_without_a_reason() -> None:
    long = set()
    for module, path in MODULES.items():
        text = path.read_text()
        body = [node for node in ast.parse(text).body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)]
        if body and len(text.splitlines()) - body[0].lineno + 1 > LONGEST_FILE:
            long.add(module)
    assert long == set(LONGER_FILES)


def test_no_module_imports_itself_in_a_circle() -> None:
    TopologicalSorter({module: names & set(MODULES) for module, names in IMPORTS.items()}).prepare()


@pytest.mark.parametrize("package", sorted(room for room, path in MODULES.items() if path.name == "__init__.py"))
def test_every_package_says_what_it_is_for(package: str) -> None:
    tree = ast.parse(MODULES[package].read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1, "a package holds no code of its own"


def test_third_party_packages_stay_where_they_belong() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, names in IMPORTS.items()
        for imported in names
        if (top := imported.split(".")[0]) not in sys.stdlib_module_names
        and top not in {"kvm", "exporter"} | THIRD_PARTY.get(find_room(module), set())
    ]
    assert wrong == []


def test_ctypes_is_used_where_it_is_declared_only() -> None:
    users = {module for module, names in IMPORTS.items() if "ctypes" in names}
    assert users <= {"kvm.syscalls", "kvm.bpf.libbpf", "kvm.bpf.bpf_object"}


@pytest.mark.parametrize("function", sorted(ONLY_CALLER))
def test_a_system_call_has_one_caller(function: str) -> None:
    users = set()
    for module, path in MODULES.items():
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        names |= {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
        if function in names:
            users.add(module)
    assert users == ONLY_CALLER[function]


def test_libbpf_is_known_in_one_package_only() -> None:
    users = {find_room(module) for module, names in IMPORTS.items() if names & {"kvm.bpf.libbpf", "kvm.bpf.bpf_object"}}
    assert users <= {"kvm.bpf", "kvm.counters"}


def test_every_module_with_logic_has_a_test_of_its_name_or_is_listed() -> None:
    tested = {name_module(test) for test in TESTS}
    modules = {module for module, path in MODULES.items() if path.name != "__init__.py"}
    assert modules - tested == DECLARATIONS | set(TESTED_IN)


def test_every_test_of_a_package_has_its_module() -> None:
    mirrors = {test for test in TESTS if test.startswith(("kvm/", "exporter/"))}
    assert {test for test in mirrors if name_module(test) not in MODULES} == WHOLE_PACKAGE_TESTS


@pytest.mark.parametrize("module", sorted(TESTED_IN))
def test_what_is_tested_elsewhere_is_reached_from_there(module: str) -> None:
    assert module in find_reached(TESTS[TESTED_IN[module]])
