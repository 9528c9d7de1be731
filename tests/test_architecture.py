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
    {"kvm", "kvm.abi", "kvm.errors"},
    {"kvm.model"},
    {"kvm.syscalls", "kvm.binary_stats", "kvm.read_errors"},
    {"kvm.host", "kvm.discovery"},
    {"kvm.bpf", "kvm.perf", "kvm.identity"},
    {"kvm.counters"},
    {"kvm.snapshot"},
    {"kvm.simulated"},
    {"exporter", "exporter.logs", "exporter.build_info", "exporter.host_summary"},
    {"exporter.stalls", "exporter.history"},
    {"exporter.monitor", "exporter.prometheus", "exporter.status_page"},
    {"exporter.web"},
    {"exporter.flags"},
    {"exporter.wiring"},
    {"exporter.commands"},
    {"exporter.cli"},
    {"exporter.__main__"},
]
RANK_OF = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
THIRD_PARTY = {"exporter.web": {"aiohttp"}, "exporter.prometheus": {"prometheus_client"}}
# Calls that one place makes, so that what they need and how they fail is known in one place.
ONLY_CALLER = {
    "perf_event_open": {"kvm.syscalls", "kvm.perf.event"},
    "pidfd_getfd": {"kvm.syscalls", "kvm.counters.stats_fd"},
}


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
    assert users <= {"kvm.syscalls", "kvm.bpf.libbpf"}


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
    users = {find_room(module) for module, names in IMPORTS.items() if "kvm.bpf.libbpf" in names}
    assert users <= {"kvm.bpf", "kvm.counters"}
