"""What identifies a plugin's code: its distribution, its version and a hash of its source.

The source of a class is the file of its module and of its base classes' modules, and every module that these import,
directly or not, from their own distribution. Import statements are read, not run: those inside functions count, those
for type checkers don't; what is imported by a computed name, data files and other distributions are not seen.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.machinery import SOURCE_SUFFIXES, ModuleSpec
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from kvbench.contract.errors import KVBenchError

SITES = ("site-packages", "dist-packages")
"""Names of folders where many distributions lie beside each other."""


class Identity(BaseModel):
    """Which code an extension is; None where it has no distribution, or its source cannot be read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    distribution: str | None
    version: str | None
    source: str | None
    """The first 16 hexadecimal digits of the SHA-256 of its modules' names and contents."""

    def __str__(self) -> str:
        """In words."""
        name = f"{self.distribution} {self.version}" if self.distribution else "no distribution"
        return f"{name}, source {self.source or 'unreadable'}"


def identity(cls: type, origin: Distribution | None = None, *, loaded: float | None = None) -> Identity:
    """Identify the code of `cls`, which the distribution `origin` registered (found from its module where None).

    `loaded`: when its modules had been imported, in seconds of the epoch; raises KVBenchError where one of them was
    written later, since its file is no longer the code that runs.
    """
    top = cls.__module__.partition(".")[0]
    dist = origin or _distribution(cls.__module__)
    contents: dict[str, bytes] = {}
    for base in inspect.getmro(cls)[:-1]:
        root = base.__module__
        if root in contents or not _ours(base, top):
            continue
        of = dist if root.partition(".")[0] == top else _distribution(root)
        found = _closure(root, _scope(root, of), loaded)
        contents |= {root: _text(base)} if found is None else found
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return Identity(
        distribution=None if dist is None else dist.name,
        version=None if dist is None else dist.version,
        source=digest.hexdigest()[:16] if contents.get(cls.__module__) else None,
    )


def combined(parts: Sequence[Identity]) -> Identity:
    """The identity of what several pieces of code make together."""

    def joined(values: list[str | None]) -> str | None:
        return "+".join(dict.fromkeys(str(value) for value in values)) if None not in values else None

    sources = [part.source for part in parts]
    text = joined(sources)
    return Identity(
        distribution=joined([part.distribution for part in parts]), version=joined([part.version for part in parts]),
        source=None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16],
    )  # fmt: skip


def differences(old: Mapping[str, Identity], new: Mapping[str, Identity]) -> list[str]:
    """Say, for each extension of a run, how it differs from an older run's; nothing where none does."""
    told = []
    for role, now in new.items():
        before = old.get(role)
        if before is None:
            told.append(f"{role} (its code was not recorded)")
        elif before != now:
            told.append(f"{role} ({before} -> {now})")
    return told


def _ours(base: type, top: str) -> bool:
    """Whether a base class is a plugin's or kvbench's, not one of the standard library or of pydantic."""
    own = base.__module__.partition(".")[0]
    return own in (top, "kvbench") or (own not in sys.stdlib_module_names and own not in ("pydantic", "torch"))


def _text(cls: type) -> bytes:
    """The source of a class whose module has no file (a notebook's); empty where there is none."""
    try:
        return inspect.getsource(cls).encode()
    except (OSError, TypeError):
        return b""


def _distribution(module: str) -> Distribution | None:
    """The distribution that a module belongs to; None where it has none or cannot be told."""
    top = module.partition(".")[0]
    names = ["kvbench"] if top == "kvbench" else sorted(set(_tops().get(top, ())))
    found = []
    for name in names:
        try:
            found.append(distribution(name))
        except PackageNotFoundError:
            continue
    if len(found) > 1:  # a namespace package
        path = module.replace(".", "/")
        found = [one for one in found if any(str(file).startswith(path) for file in one.files or ())]
    return found[0] if len(found) == 1 else None


@cache
def _tops() -> Mapping[str, list[str]]:
    return packages_distributions()


def _scope(root: str, dist: Distribution | None) -> tuple[frozenset[str], Path | None]:
    """Top-level names of a module's distribution, and the folder of its source where nobody else's lies there."""
    tops = {root.partition(".")[0]}
    if dist is not None and "kvbench" not in tops:
        tops |= set((dist.read_text("top_level.txt") or "").split())
        tops |= {file.parts[0].removesuffix(".py") for file in dist.files or () if file.suffix == ".py"}
    place = _folder(next(iter(tops)))
    return frozenset(tops), place


def _folder(top: str) -> Path | None:
    """The folder that holds the top-level module, unless it is one of many distributions."""
    spec = _spec(top)
    if spec is None:
        return None
    where = spec.origin or next(iter(spec.submodule_search_locations or ()), None)
    if where is None or not Path(where).exists():
        return None
    folder = Path(where).parent
    folder = folder.parent if spec.submodule_search_locations is not None and spec.origin else folder
    return None if folder.name in SITES or spec.name == "kvbench" else folder


def _closure(root: str, scope: tuple[frozenset[str], Path | None], loaded: float | None) -> dict[str, bytes] | None:
    """The contents of a module and of all that it imports within a scope, by name; None where it has no content."""
    found: dict[str, bytes] = {}
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        spec = _spec(name)
        content = _content(spec, loaded) if spec is not None else None
        if content is None or spec is None:
            continue
        found[name] = content
        if spec.origin and spec.origin.endswith(tuple(SOURCE_SUFFIXES)):
            package = spec.submodule_search_locations is not None
            waiting += [
                _module(origin, member) for origin, member in _imports(content, name, package) if _within(origin, scope)
            ]
    return found if root in found else None


def _within(name: str, scope: tuple[frozenset[str], Path | None]) -> bool:
    top = name.partition(".")[0]
    if top in scope[0]:
        return True
    if scope[1] is None or top in sys.stdlib_module_names or top == "kvbench":
        return False
    return _folder(top) == scope[1]


def _spec(name: str) -> ModuleSpec | None:
    """How a module was or would be found; None where it cannot be."""
    module = sys.modules.get(name)
    if module is not None:
        spec = getattr(module, "__spec__", None)
        if spec is None and getattr(module, "__file__", None):  # a script
            spec = importlib.util.spec_from_file_location(name, str(module.__file__))
        return spec
    try:
        return importlib.util.find_spec(name)
    except Exception:  # a parent package may raise anything when it is imported
        return None


def _content(spec: ModuleSpec, loaded: float | None) -> bytes | None:
    """A module's file, as it is on the disk or in an archive; None where it has none or it cannot be read."""
    read = getattr(spec.loader, "get_data", None)
    if not spec.has_location or spec.origin is None or read is None:
        return None
    try:
        content = bytes(read(spec.origin))
        file = Path(spec.origin)
        written = file.stat().st_mtime if loaded is not None and file.exists() else 0.0
    except OSError:
        return None
    if loaded is not None and written > loaded:
        raise KVBenchError(
            f"{spec.origin} was written after this process had loaded it, so its results would pass for the new "
            "file's: start the command again."
        )
    return content


def _module(origin: str, member: str) -> str:
    """What `from origin import member` reads: the submodule `member` where there is one, else `origin`."""
    spec = _spec(origin) if member else None
    if spec is None or spec.submodule_search_locations is None:
        return origin
    inner = f"{origin}.{member}"
    return inner if _spec(inner) is not None else origin


_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)
"""Parts of a tree that can hold imports: to look into expressions would take five times as long."""


@cache
def _imports(content: bytes, module: str, package: bool) -> Sequence[tuple[str, str]]:
    """What a module's source imports, but for type checkers: pairs of a module and, after `from`, its member."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return ()
    base = module if package else module.rpartition(".")[0]
    found = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            try:
                origin = importlib.util.resolve_name("." * node.level + (node.module or ""), base or None)
            except ImportError:
                continue
            found += [(origin, "" if alias.name == "*" else alias.name) for alias in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
        else:
            waiting += [part for part in ast.iter_child_nodes(node) if isinstance(part, _STATEMENTS)]
    return found
