"""The structure of the code: what may import what, read from the imports themselves, type-only ones included."""

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "kvbench": "kvbench",
    "strategies": "kvbench.strategies",
    "indexes": "kvbench.indexes",
    "analysis": "kvbench.analysis",
}


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


@functools.cache
def _imports() -> dict[str, set[str]]:
    modules = _modules()
    edges: dict[str, set[str]] = {}
    for module, file in modules.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {name if name in modules else node.module for name in whole}
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        edges[module] = {name for name in named if name in modules} - {module}
    return edges


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _acyclic(edges: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_module_is_part_of_an_import_circle():
    _acyclic(_imports())


def test_no_folder_is_part_of_an_import_circle():
    rooms: dict[str, set[str]] = {}
    for module, imported in _imports().items():
        rooms.setdefault(_room(module), set()).update(_room(name) for name in imported)
    _acyclic({room: imported - {room, "kvbench"} for room, imported in rooms.items() if room != "kvbench"})


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("contract", set()),
        ("identity", {"contract"}),
        ("plugins", {"contract", "identity"}),
        ("kernels", {"contract"}),
        ("chat", {"contract"}),
        ("engine", {"contract", "plugins", "kernels", "chat"}),
        ("reading", {"contract"}),
        ("indexes", {"contract", "reading", "kernels"}),
        ("strategies", {"contract", "indexes", "reading", "kernels"}),
        ("tasks", {"contract", "reading", "chat"}),
    ],
)
def test_a_room_imports_only_what_it_may(room, allowed):
    edges = _imports()
    outside = {_room(name) for module, names in edges.items() if _room(module) == f"kvbench.{room}" for name in names}
    assert outside - {f"kvbench.{room}"} <= {f"kvbench.{name}" for name in allowed}
