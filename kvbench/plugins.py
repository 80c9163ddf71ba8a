"""Finds plugins through the entry-point group `kvbench` and makes what they registered by name."""

from __future__ import annotations

import difflib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution, EntryPoint, entry_points
from typing import Any, Literal, TypeVar, get_args, get_origin

import pluggy
from pydantic import BaseModel, ValidationError

from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import BETWEEN_LAYERS, JOIN, Extension, option_names
from kvbench.contract.hooks import Registration
from kvbench.contract.markers import PROJECT
from kvbench.identity import Identity, combined, identity

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
    _composed: dict[str, type[Any]] = field(default_factory=dict)
    _identities: dict[type[Any], Identity] = field(default_factory=dict)

    def find(self, kind: str, name: str) -> type[Any]:
        """Return the class called `name`, or raise with the nearest names and any plugin that failed to load."""
        classes = self.classes[kind]
        if kind == "policy" and BETWEEN_LAYERS in name:
            if name not in self._composed:
                from kvbench.contract.layered import by_layer  # noqa: PLC0415  it imports torch

                self._composed[name] = by_layer(name, lambda part: self.find(kind, part))
            return self._composed[name]
        if kind == "policy" and JOIN in name:
            if name not in self._composed:
                from kvbench.contract.composition import compose  # noqa: PLC0415  it imports torch

                names = name.split(JOIN)
                if len(names) != 2:
                    raise KVBenchError(f"Policy '{name}' has {len(names)} parts: one that selects and one that holds.")
                self._composed[name] = compose(*(self.find(kind, part) for part in names))
            return self._composed[name]
        if name not in classes:
            raise unknown(kind, name, classes, self.failures)
        return classes[name]

    def options(self, kind: str, name: str, values: Mapping[str, Any]) -> Any:
        """Validate options of the extension `name`: unknown names and wrong types raise, naming the value."""
        cls = self.find(kind, name)
        try:
            return cls.Options.model_validate(_with_numbers(cls.Options, values), strict=False)
        except ValidationError as error:
            first = error.errors()[0]
            if kind == "policy" and first["loc"] == ("dense_layers",):
                raise KVBenchError(
                    f"dense_layers is no option of policy '{name}' but a setting for every policy: use --dense-layers "
                    f"{first.get('input')} (dense_layers={first.get('input')} beside the policy in attach, in a sweep "
                    "and in lm-eval)."
                ) from None
            option = ".".join(str(part) for part in first["loc"])
            known = ", ".join(option_names(cls)) or "none"
            raise KVBenchError(
                f"Option {option}={first.get('input')!r} of {kind} '{name}' is not valid: {first['msg']}; "
                f"its options are: {known}."
            ) from None

    def make(self, kind: str, name: str, values: Mapping[str, Any] | None = None) -> Any:
        """Make the extension called `name` with validated options."""
        return self.find(kind, name)(self.options(kind, name, values or {}))

    def identity(self, kind: str, name: str) -> Identity:
        """Identify the code of the extension called `name`; computed once in a process."""
        return self.identity_of(kind, self.find(kind, name))

    def identity_of(self, kind: str, cls: type[Any]) -> Identity:
        """Identify the code of an extension's class, registered or not."""
        if cls not in self._identities:
            parts = getattr(cls, "parts", ()) if kind == "policy" else ()
            origin = self.distributions.get(cls)
            self._identities[cls] = (
                combined([self.identity_of(kind, part) for part in parts])
                if parts
                else identity(cls, origin, loaded=None if origin is None else self.loaded)
            )
        return self._identities[cls]


def _with_numbers(options: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with texts as numbers where an option is a choice of whole numbers: pydantic leaves them texts."""
    found = dict(values)
    for name, value in values.items():
        field = options.model_fields.get(name)
        choices = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
        if isinstance(value, str) and value in {str(choice) for choice in choices if isinstance(choice, int)}:
            found[name] = int(value)
    return found


def unknown(kind: str, name: str, known: Collection[str], failures: Sequence[str]) -> KVBenchError:
    """The error of a name that is none of the `known`, with the nearest of them and the plugins that failed."""
    near = difflib.get_close_matches(name, known, n=3) or sorted(known)
    choice = f"choose one of {', '.join(near)}." if near else "none is installed."
    hint = f"did you mean {' or '.join(near)}?" if len(near) < len(known) else choice
    failed = f" These plugins did not load: {'; '.join(failures)}." if failures else ""
    return KVBenchError(f"Unknown {kind} '{name}': {hint} `kvbench {PLURALS[kind]}` lists all.{failed}")


def plugin_entries() -> list[EntryPoint]:
    """The entry points of every installed plugin, kvbench's own first."""
    found = entry_points(group=PROJECT)
    return sorted(found, key=lambda entry: (not entry.value.startswith("kvbench."), entry.name))


@cache
def registry() -> Registry:
    """Load every plugin once; one that fails is noted in `failures` and does not take the others down."""
    found = Registry()
    plugins: list[tuple[EntryPoint, Any]] = []
    for entry in plugin_entries():
        with _noted(found, entry):
            manager = pluggy.PluginManager(PROJECT)
            manager.add_hookspecs(Registration)
            manager.register(entry.load(), name=entry.name)
            manager.check_pending()
            plugins.append((entry, manager.hook))
            _register_all(found, "index", manager.hook.kvbench_indexes(), entry)
    indexes = list(found.classes["index"].values())
    derived = []
    for entry, hook in plugins:
        with _noted(found, entry):
            for kind, name in KINDS.items():
                if kind == "policy":
                    policies = [cls for classes in hook.kvbench_policies(indexes=indexes) for cls in classes]
                    derived += [cls for cls in policies if getattr(cls, "derived", False)]
                    _register_all(found, kind, [[cls for cls in policies if not getattr(cls, "derived", False)]], entry)
                elif kind != "index":
                    _register_all(found, kind, getattr(hook, name)(), entry)
    _register_all(found, "policy", [[cls for cls in derived if cls.name not in found.classes["policy"]]])
    found.loaded = time.time()
    return found


@contextmanager
def _noted(found: Registry, entry: EntryPoint) -> Iterator[None]:
    """Note a plugin's failure instead of raising it."""
    try:
        yield
    except Exception as error:
        found.failures.append(f"plugin '{entry.name}' ({entry.value}): {type(error).__name__}: {error}")


def _register_all(found: Registry, kind: str, answers: list[list[type[Any]]], entry: EntryPoint | None = None) -> None:
    for classes in answers:
        for cls in classes:
            _register(found, kind, cls)
            if entry is not None and entry.dist is not None:
                found.distributions.setdefault(cls, entry.dist)


def _register(found: Registry, kind: str, cls: type[Any]) -> None:
    if not (isinstance(cls, type) and isinstance(getattr(cls, "name", None), str) and getattr(cls, "summary", None)):
        raise TypeError(f"{cls!r} is no {kind} class: it needs the class attributes name and summary")
    other = found.classes[kind].get(cls.name)
    if other is not None and other is not cls:
        raise ValueError(f"{kind} '{cls.name}' of {cls.__module__} is already registered by {other.__module__}")
    found.classes[kind][cls.name] = cls
