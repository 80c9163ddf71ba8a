"""The YAML file of a sweep, read with everything that is wrong with it by line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError, sentence
from kvbench.contract.reading import DEPTH, check_regular, plain, reading
from kvbench.models import DEFAULT_MODEL
from kvbench.runs.config import LARGEST

MOST_NODES = 100_000
"""Values in a sweep's file, each counted as often as an alias names it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Model(_Strict):
    """A model of a sweep."""

    name: str
    device: str | None = None
    dtype: str | None = None
    rope_scaling: str | None = None
    device_map: Literal["auto"] | None = None


class Choice(_Strict):
    """A policy or a task of a sweep, with its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class PolicyChoice(Choice):
    """A policy of a sweep, with its options.

    It may have its own number of dense first layers, and an interval of compression (`Budget.compress_every`) that its
    runs have with every budget.
    """

    dense_layers: int | None = Field(default=None, ge=0, le=LARGEST)
    compress_every: int | None = Field(default=None, ge=1, le=LARGEST)


Policies = Annotated[list[Annotated[PolicyChoice, BeforeValidator(_named)]], Field(min_length=1)]
Models = Annotated[list[Annotated[Model, BeforeValidator(_named)]], Field(min_length=1)]
Choices = Annotated[list[Annotated[Choice, BeforeValidator(_named)]], Field(min_length=1)]
Length = Annotated[int, Field(ge=1, le=LARGEST)]
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Seed = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]


class Sweep(_Strict):
    """The content of a sweep's file: every combination of models, policies, budgets, tasks, lengths and seeds."""

    policies: Policies
    models: Models = Field(default_factory=lambda: [Model(name=DEFAULT_MODEL)])
    budgets: list[Budget] = Field(default_factory=lambda: [Budget(ratio=0.1)], min_length=1)
    tasks: Choices = Field(default_factory=lambda: [Choice(name="niah_single_1")])
    context_lengths: list[Length] = Field(default_factory=lambda: [2048], min_length=1)
    seeds: list[Seed] = Field(default_factory=lambda: [42], min_length=1)
    examples: int = Field(default=5, ge=1, le=LARGEST)
    question: Literal["aware", "agnostic"] = "aware"
    prefill_chunk: Size | Literal["auto"] | None = None
    recall_k: int = Field(default=100, ge=1, le=LARGEST)
    probe_examples: int = Field(default=1, ge=0, le=LARGEST)
    batch_size: Size | Literal["auto"] = 1
    share_prefill: bool | None = None
    decoding: Literal["auto", "graph", "fixed", "eager"] = "auto"
    prefix: Literal["none", "cached"] = "none"
    new_tokens: int = Field(default=0, ge=0, le=LARGEST)
    dense_layers: int = Field(default=0, ge=0, le=LARGEST)
    probes: list[str] = Field(default_factory=list)


class Problems:
    """What is wrong with a sweep's file, by line."""

    def __init__(self, file: Path | str, tree: yaml.Node, *, lines: bool = True) -> None:
        self.file, self.tree, self.lines = file, tree, lines
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, place: Sequence[str | int], message: str) -> None:
        """Note what is wrong at a place, given by keys and positions."""
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
        line = self._line(place)
        where = ", ".join(part for part in (f"line {line}" if self.lines else "", name) if part)
        self.found.setdefault(message, (line, f"{where}: {message}" if where else message))

    @contextmanager
    def at(self, *place: str | int) -> Iterator[None]:
        """Note an error of the block."""
        try:
            yield
        except Exception as error:  # a plugin may raise anything
            self.add(place, sentence(error))

    def stop(self) -> None:
        """Raise if anything was added."""
        if self.found:
            told = [text for _, text in sorted(self.found.values())]
            count = "1 problem" if len(told) == 1 else f"{len(told)} problems"
            raise KVBenchError("\n  ".join([f"{self.file} has {count}, and nothing was run:", *told]))

    def _line(self, place: Sequence[str | int]) -> int:
        node, line = self.tree, self.tree.start_mark.line
        for part in place:
            if isinstance(node, yaml.MappingNode):
                pairs = [(key, value) for key, value in node.value if key.value == part]
                if not pairs:
                    break
                line, node = pairs[-1][0].start_mark.line, pairs[-1][1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line
            else:
                break
        return int(line) + 1


def load(source: Path | Mapping[str, Any]) -> tuple[Sweep, Problems]:
    """Read a sweep's file, or what it would hold; raises KVBenchError with line and key of everything malformed."""
    file = "The sweep" if isinstance(source, Mapping) else source
    with reading(lambda reason: f"{file} cannot be read ({reason}): give the file of a sweep."):
        if isinstance(source, Mapping):
            text = yaml.safe_dump(_plain(source), sort_keys=False, allow_unicode=True)
        else:
            check_regular(source)
            text = source.read_text(encoding="utf-8-sig")
        try:
            tree = yaml.compose(text, Loader=_Loader)
            _check_size(tree)
            content = yaml.load(text, Loader=_Loader)  # noqa: S506
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" line {mark.line + 1}" if mark is not None else ""
            told = plain(str(getattr(error, "problem", None) or error))
            raise KVBenchError(f"{file}{where} is not YAML: {told}.") from None
    if tree is None or not isinstance(content, dict):
        raise KVBenchError(
            f"{file} is not a mapping: give it keys such as policies, budgets and tasks, each with its value."
        )
    problems = Problems(file, tree, lines=not isinstance(source, Mapping))
    _repeated_keys(tree, problems)
    _foreign_values(content, problems)
    problems.stop()
    try:
        sweep = Sweep.model_validate(content)
    except ValidationError as invalid:
        for found in invalid.errors():
            message = found["msg"].removeprefix("Value error, ")
            if found["type"] == "extra_forbidden":
                known = list(Sweep.model_fields) if len(found["loc"]) == 1 else []
                near = difflib.get_close_matches(str(found["loc"][-1]), known, n=1) or known
                message = "this key is unknown" + (f": did you mean {' or '.join(near)}?" if near else ".")
            elif found["type"] != "missing" and not isinstance(found["input"], (dict, list)):
                message = f"{found['input']!r}: {message}"
            problems.add(found["loc"], message)
        problems.stop()
    problems.stop()
    return sweep, problems


def _plain(value: Any) -> Any:
    """Mappings, sequences and paths as YAML has them."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


class _Loader(yaml.SafeLoader):
    """Plain YAML whose dates are text, as an option's value may look like one."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the base class declares it so
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _check_size(root: yaml.Node | None) -> None:
    """Raise ValueError for a file that its aliases make too large, or that is nested too deeply."""
    sizes: dict[int, int] = {}
    within: set[int] = set()

    def size(node: yaml.Node | None, depth: int) -> int:
        if depth > DEPTH:
            raise ValueError("it is nested too deeply")
        if not isinstance(node, yaml.CollectionNode) or id(node) in within:
            return 1
        if id(node) not in sizes:
            within.add(id(node))
            parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
            within.remove(id(node))
        if sizes[id(node)] > MOST_NODES:
            raise ValueError(f"it has more than {MOST_NODES} values once its aliases are followed")
        return sizes[id(node)]

    size(root, 0)


def _foreign_values(content: Any, problems: Problems) -> None:
    """Note values and keys that JSON cannot hold: bytes, sets, dates made by a tag, numbers as keys, NaN, circles."""
    waiting: list[tuple[tuple[str | int, ...], Any, tuple[int, ...]]] = [((), content, ())]
    while waiting:
        place, value, around = waiting.pop()
        if id(value) in around:
            problems.add(place, "this is an alias of what it stands in.")
        elif isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str):
                    problems.add((*place, str(key)), f"the key {plain(str(key))} is no text: put it in quotes.")
                else:
                    waiting.append(((*place, key), inner, (*around, id(value))))
        elif isinstance(value, list):
            waiting += [((*place, index), inner, (*around, id(value))) for index, inner in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            problems.add(place, f"{value} is no finite number.")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            problems.add(place, "this whole number has more than 64 bits.")
        elif value is not None and not isinstance(value, str | int | float):
            problems.add(place, f"this is a {type(value).__name__}, not text, a number, true, false or a list.")


def _repeated_keys(root: yaml.Node, problems: Problems) -> None:
    """Note keys that are there twice, of which YAML's reader keeps the last; an alias may name a node that holds it."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str | int, ...], yaml.Node]] = [((), root)]
    while waiting:
        place, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            names = [str(key.value) for key, _ in node.value]
            for name in sorted({name for name in names if names.count(name) > 1}):
                problems.add((*place, name), f"the key {name} is there twice.")
            waiting += [((*place, str(key.value)), value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [((*place, index), value) for index, value in enumerate(node.value)]
