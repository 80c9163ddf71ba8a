"""Writes the package of a new plugin: its module, tests, a regression gate, and what pip needs."""

from __future__ import annotations

import keyword
import os
import re
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import NamedTuple

from kvbench.catalogue import Catalogue
from kvbench.contract.errors import KVBenchError, check_output, unwritable
from kvbench.plugins import KINDS, PLURALS


class _Kind(NamedTuple):
    """What the files of a kind of plugin differ in."""

    summary: str
    gate: str
    limit: float
    """The ratio to start with: a few times what was measured."""
    helper: str
    """The file beside the tests that they share, if any: its template and the end of its name."""
    command: str


_MODEL = "common/tiny.py model"
_TOKENIZER = "task/tokenizer.py tokenizer"
_KINDS = {
    "policy": _Kind("Keeps the keys of smallest norm.", "$name / full", 4, _MODEL, "kvbench run --policy $name"),
    "index": _Kind("Blocks of consecutive keys, visited by their means.", "$name / flat", 12, _MODEL,
                   "kvbench index --indexes $name,flat --context-length 2048 --layers 14"),
    "budget": _Kind("A multiple of the tokens for the first of every few layers.", "$name / pyramid", 4, _MODEL,
                    "kvbench run --policy snapkv --budget $name"),
    "task": _Kind("Find the colour of one of many boxes.", "$name / niah_multikey_1", 4, _TOKENIZER,
                  "kvbench run --policy snapkv --task $name"),
    "probe": _Kind("Mean distance to the attended tokens.", "$name / density", 4, _MODEL,
                   "kvbench run --policy snapkv --probe $name"),
    "analysis": _Kind("Cosine of each key with its head's mean key.", "$name / products", 4, "",
                      "kvbench analyze $name --context-length 2048 --layers 2,14"),
}  # fmt: skip
LONGEST = 60
"""Characters of a name."""


def render(kind: str, name: str) -> dict[str, str]:
    """The files of a new plugin by their places in its folder; see `create`."""
    chosen, module = _KINDS[kind], f"kvbench_{name}"
    words: dict[str, str] = {
        "kind": {"budget": "budget allocator", "index": "vector index"}.get(kind, kind), "plural": PLURALS[kind],
        "name": name, "module": module, "cls": "".join(part[:1].upper() + part[1:] for part in name.split("_")),
        "dist": distribution_name(name), "summary": chosen.summary, "limit": f"{chosen.limit:g}",
        "release": ".".join(version("kvbench").split(".")[:2]),
    }  # fmt: skip
    words["gate"] = Template(chosen.gate).substitute(words)
    words["try_it"] = Template(chosen.command).substitute(words)
    places = {
        "pyproject.toml": "common/pyproject.toml", "README.md": "common/README.md", ".gitignore": "common/gitignore",
        "benchmarks.json": "common/benchmarks.json", f"{module}.py": f"{kind}/module.py",
        f"tests/test_{name}.py": f"{kind}/test_plugin.py", "tests/test_regression.py": f"{kind}/test_regression.py",
    }  # fmt: skip
    if chosen.helper:
        template, ending = chosen.helper.split()
        places[f"tests/{module}_{ending}.py"] = template
    here = files(__name__) / "templates"
    return {
        place: Template((here / f"{template}.txt").read_text("utf-8")).substitute(words)
        for place, template in places.items()
    }


def distribution_name(name: str) -> str:
    """The name of a plugin's distribution and folder."""
    return "kvbench-" + re.sub("_+", "-", name.lower()).strip("-")


def create(kind: str, name: str, parent: Path, known: Catalogue) -> Path:
    """Write the package of a new plugin into a new folder below `parent`, and return the folder.

    Raises KVBenchError for a kind that there is not, a name that is no identifier or is taken by a plugin in `known` or
    by an installed distribution, and for a folder that is there already.
    """
    if kind not in KINDS:
        raise KVBenchError(f"'{kind}' is no kind of plugin: choose {', '.join(KINDS)}.")
    fits = re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) and not keyword.iskeyword(name) and len(name) <= LONGEST
    if not fits or name.endswith("_"):
        near = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
        near = near if re.match("[A-Za-z]", near) and not keyword.iskeyword(near) else "key_norm"
        raise KVBenchError(
            f"'{name}' cannot name a {kind}: give a letter, then letters, digits and underscores, such as "
            f"{near[:LONGEST]}."
        )
    for taken in dict.fromkeys((kind, *(("policy",) if kind == "index" else ()))):  # an index is a policy, too
        if name in known.entries[taken]:
            where = known.entries[taken][name].module
            raise KVBenchError(f"There is a {taken} '{name}' already (of {where}): choose another name.")
    folder = parent / distribution_name(name)
    if _installed(name):
        raise KVBenchError(f"The distribution {folder.name} is installed already: choose another name.")
    check_output(parent)
    if os.path.lexists(folder):
        raise KVBenchError(f"{folder} exists already, and nothing was written: choose another name or --output.")
    try:
        for place, text in render(kind, name).items():
            file = folder / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8")
    except OSError as error:
        raise KVBenchError(unwritable(folder, error)) from None
    return folder


def _installed(name: str) -> bool:
    try:
        distribution(distribution_name(name))
    except PackageNotFoundError:
        return find_spec(f"kvbench_{name}") is not None
    return True
