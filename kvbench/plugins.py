"""Finds plugins through the entry-point group `kvbench` and makes what they registered by name."""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution, entry_points
from typing import Any, TypeVar

import pluggy
from pydantic import ValidationError

from kvbench.errors import KVBenchError
from kvbench.extension import Extension
from kvbench.hookspecs import PROJECT, Registration
from kvbench.identity import Identity, identity

KINDS = {
    "policy": "kvbench_policies",
    "budget": "kvbench_budgets",
    "index": "kvbench_indexes",
    "task": "kvbench_tasks",
    "probe": "kvbench_probes",
    "analysis": "kvbench_analyses",
}
PLURALS = {
    "policy": "policies", "budget": "budgets", "index": "indexes", "task": "tasks", "probe": "probes",
    "analysis": "analyses",
}  # fmt: skip

E = TypeVar("E", bound=Extension)


@dataclass
class Registry:
    """All that the installed plugins registered, by kind and name, and the plugins that failed."""

    classes: dict[str, dict[str, type[Any]]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    failures: list[str] = field(default_factory=list)
    distributions: dict[type[Any], Distribution] = field(default_factory=dict)
    """The distributions whose entry points registered the classes."""
    loaded: float = field(default_factory=time.time)
    _identities: dict[type[Any], Identity] = field(default_factory=dict)

    def find(self, kind: str, name: str) -> type[Any]:
        """Return the class called `name`, or raise with the nearest names and any plugin that failed to load."""
        classes = self.classes[kind]
        if name in classes:
            return classes[name]
        near = difflib.get_close_matches(name, classes, n=3) or sorted(classes)
        known = f"choose one of {', '.join(near)}." if near else "none is installed."
        hint = f"did you mean {' or '.join(near)}?" if len(near) < len(classes) else known
        failed = f" These plugins did not load: {'; '.join(self.failures)}." if self.failures else ""
        raise KVBenchError(f"Unknown {kind} '{name}': {hint} `kvbench {PLURALS[kind]}` lists all.{failed}")

    def options(self, kind: str, name: str, values: Mapping[str, Any]) -> Any:
        """Validate options of the extension `name`: unknown names and wrong types raise, naming the value."""
        cls = self.find(kind, name)
        try:
            return cls.Options.model_validate(dict(values), strict=False)
        except ValidationError as error:
            first = error.errors()[0]
            option = ".".join(str(part) for part in first["loc"])
            known = ", ".join(cls.Options.model_fields) or "none"
            raise KVBenchError(
                f"Option {option}={first.get('input')!r} of {kind} '{name}' is not valid: {first['msg']}; "
                f"its options are: {known}."
            ) from None

    def make(self, kind: str, name: str, values: Mapping[str, Any] | None = None) -> Any:
        """Make the extension called `name` with validated options."""
        return self.find(kind, name)(self.options(kind, name, values or {}))

    def identity(self, kind: str, name: str) -> Identity:
        """Identify the code of the extension called `name`; computed once in a process."""
        cls = self.find(kind, name)
        if cls not in self._identities:
            origin = self.distributions.get(cls)
            self._identities[cls] = identity(cls, origin, loaded=None if origin is None else self.loaded)
        return self._identities[cls]


@cache
def registry() -> Registry:
    """Load every plugin once; one that fails is noted in `failures` and does not take the others down."""
    found = Registry()
    for entry in sorted(
        entry_points(group=PROJECT), key=lambda entry: (not entry.value.startswith("kvbench."), entry.name)
    ):
        try:
            plugin = entry.load()
            manager = pluggy.PluginManager(PROJECT)
            manager.add_hookspecs(Registration)
            manager.register(plugin, name=entry.name)
            manager.check_pending()
            for kind, hook in KINDS.items():
                for classes in getattr(manager.hook, hook)():
                    for cls in classes:
                        _register(found, kind, cls)
                        if entry.dist is not None:
                            found.distributions[cls] = entry.dist
        except Exception as error:
            found.failures.append(f"plugin '{entry.name}' ({entry.value}): {type(error).__name__}: {error}")
    found.loaded = time.time()
    return found


def _register(found: Registry, kind: str, cls: type[Any]) -> None:
    if not (isinstance(cls, type) and isinstance(getattr(cls, "name", None), str) and getattr(cls, "summary", None)):
        raise TypeError(f"{cls!r} is no {kind} class: it needs the class attributes name and summary")
    other = found.classes[kind].get(cls.name)
    if other is not None and other is not cls:
        raise ValueError(f"{kind} '{cls.name}' of {cls.__module__} is already registered by {other.__module__}")
    found.classes[kind][cls.name] = cls
