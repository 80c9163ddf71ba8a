"""What the installed plugins registered, kept in the user's cache folder so that listing it imports none of them.

Importing a plugin imports torch, which takes seconds. The file in the cache folder holds, beside the list, the state of
everything that the list was made from: what is installed, every file of the plugins' packages and every module that
loading them brought in. Where any of it differs the plugins are loaded and the list is made anew. A list with a plugin
that failed is never kept, since what mends the plugin may lie outside its files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from kvbench.models import cache_folder
from kvbench.plugins import KINDS, Registry, plugin_entries, registry, unknown

SCHEMA = 1
RACE_S = 2.0
"""How exactly the start of a process and the times of files are known; no list of younger files is kept."""

State = dict[str, list[int]]
"""Modification time, change time (ns) and size of files, by path."""


@dataclass(frozen=True)
class Entry:
    """A registered class as a user reads it; `options` have a name, type, default and description each."""

    name: str
    summary: str
    reference: str
    module: str
    options: list[dict[str, Any]]
    doc: str = field(repr=False)


@dataclass(frozen=True)
class Catalogue:
    """All that the installed plugins registered, by kind and name, and the plugins that failed."""

    entries: dict[str, dict[str, Entry]]
    failures: list[str] = field(default_factory=list)

    def find(self, kind: str, name: str) -> Entry:
        """Return the entry called `name`, or raise with the nearest names and any plugin that failed to load."""
        if name not in self.entries[kind]:
            raise unknown(kind, name, self.entries[kind], self.failures)
        return self.entries[kind][name]


def catalogue() -> Catalogue:
    """Read the list where nothing changed since it was made; else load every plugin and make it."""
    kept = _read()
    if kept is not None:
        return kept
    found = registry()
    _keep(found)
    return _of(found)


def remember(found: Registry) -> None:
    """Keep the list of plugins that were loaded anyway."""
    if _read() is None:
        _keep(found)


def describe(cls: type[Any]) -> Entry:
    """What a user reads of a registered class."""
    fields = cls.Options.model_fields
    schema = cls.Options.model_json_schema().get("properties", {})
    options = [
        {
            "name": name,
            "type": _type(schema.get(name, {})),
            "default": None
            if field.is_required()
            else to_jsonable_python(field.get_default(call_default_factory=True)),
            "description": field.description or "",
        }
        for name, field in fields.items()
    ]
    return Entry(cls.name, cls.summary, cls.reference, cls.__module__, options, cls.__doc__ or "")


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(_type(part) for part in schema["anyOf"])
    return str(schema.get("type", "value"))


def _of(found: Registry) -> Catalogue:
    entries = {kind: {name: describe(cls) for name, cls in classes.items()} for kind, classes in found.classes.items()}
    return Catalogue(entries, list(found.failures))


# -- the file ------------------------------------------------------------------------------------------------------


def _file() -> Path:
    place = hashlib.sha256(f"{sys.prefix}\n{sys.version}".encode()).hexdigest()[:16]
    return cache_folder() / "catalogue" / f"{place}.json"


def _read() -> Catalogue | None:
    """The kept list, or None where there is none or anything differs from when it was made."""
    try:
        kept = json.loads(_file().read_text(encoding="utf-8"))
        if kept["schema"] != SCHEMA or kept["plugins"] != _plugins():
            return None
        if any(_state(path) != state for path, state in kept["modules"].items()):
            return None
        entries = {
            kind: {row["name"]: Entry(**row) for row in rows} for kind, rows in kept["entries"].items()
        }  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Catalogue(entries) if entries.keys() == KINDS.keys() else None


def _keep(found: Registry) -> None:
    if found.failures:
        return
    import psutil  # noqa: PLC0415  only where the list is made anew

    began = psutil.Process().create_time()
    plugins = _plugins()
    own: State = {path: state for files in plugins["files"].values() for path, state in files.items()}
    found_at = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    modules = {path: _state(path) for path in found_at if isinstance(path, str) and _is_elsewhere(path, own)}
    written = 1 if os.name == "posix" else 0  # elsewhere the second time is the file's creation
    if any(state and state[written] / 1e9 > began - RACE_S for state in (*modules.values(), *own.values())):
        return  # changed since its module was read, perhaps
    content = {
        "schema": SCHEMA,
        "plugins": plugins,
        "modules": modules,
        "entries": {kind: [asdict(entry) for entry in rows.values()] for kind, rows in _of(found).entries.items()},
    }
    file = _file()
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with suppress(OSError):  # where nothing can be kept, every command loads the plugins
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(file)


def _is_elsewhere(path: str, own: State) -> bool:
    """Whether a module's file is a real one (torch makes modules with made-up names) and not of a plugin's package."""
    return Path(path).is_absolute() and path not in own


# -- what the list depends on --------------------------------------------------------------------------------------


def _plugins() -> dict[str, Any]:
    """What is installed, which plugins there are, and the state of every file of their packages."""
    entries = plugin_entries()
    places = {str(place): place for entry in entries for place in _places(entry.module)}
    return {
        "path": sys.path[1:],  # the first is where the command lies, or the current folder
        "installed": sorted(_installed()),
        "entries": [
            [entry.name, entry.value, *((entry.dist.name, entry.dist.version) if entry.dist else ())]
            for entry in entries
        ],
        "files": {name: _below(place) for name, place in places.items()},
    }


def _installed() -> Iterator[list[Any]]:
    """Every installed distribution, and every file that puts folders on Python's path."""
    for folder in sys.path[1:]:
        with suppress(OSError), os.scandir(folder) as found:
            for item in found:
                if item.name.endswith((".dist-info", ".egg-info", ".egg-link", ".pth")):
                    yield [item.path, item.stat().st_mtime_ns]


def _below(place: Path) -> State:
    """The state of a file, or of every file in a folder."""
    if place.is_file():
        return {str(place): _state(str(place)) or []}
    files: State = {}
    for folder, below, names in os.walk(place, followlinks=True):
        below[:] = [name for name in below if name != "__pycache__"]
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118  as in _state
            files[path] = _state(path) or []
    return files


def _places(module: str) -> list[Path]:
    """Where a plugin's code lies, found without importing it.

    The file of a top-level module, or the folders of the outermost package that is no namespace.
    """
    names = module.split(".")
    loaded = sys.modules.get(names[0])
    if loaded is not None and hasattr(loaded, "__path__") and getattr(loaded, "__file__", None):
        return [Path(folder) for folder in loaded.__path__]
    spec: ModuleSpec | None = None
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(names[0])
    for depth in range(2, len(names) + 1):
        if spec is None or spec.origin is not None or not spec.submodule_search_locations:
            break
        spec = PathFinder.find_spec(".".join(names[:depth]), list(spec.submodule_search_locations))
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(folder) for folder in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.origin else []


def _state(path: str) -> list[int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  thousands of files: a Path each takes longer than the call
    except OSError:
        return None
    return [found.st_mtime_ns, found.st_ctime_ns, found.st_size]
