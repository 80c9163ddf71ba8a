"""Sweeps: a grid of runs from a YAML file, validated before anything runs; a failed run leaves the others alone."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError, sentence
from kvbench.contract.reading import DEPTH, check_regular, plain, reading
from kvbench.engine.governor import token_bytes
from kvbench.models import DEFAULT_MODEL, LoadedModel, check_device, load_model
from kvbench.plugins import registry
from kvbench.runs.memory import capacity
from kvbench.runs.results import LARGEST, RunConfig, read
from kvbench.runs.rows import read_rows
from kvbench.runs.runner import Request, execute, plan, prompt_of

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


class Choice(_Strict):
    """A policy or a task of a sweep, with its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


Models = Annotated[list[Annotated[Model, BeforeValidator(_named)]], Field(min_length=1)]
Choices = Annotated[list[Annotated[Choice, BeforeValidator(_named)]], Field(min_length=1)]
Length = Annotated[int, Field(ge=1, le=LARGEST)]
Seed = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]


class Sweep(_Strict):
    """The content of a sweep's file: every combination of models, policies, budgets, tasks, lengths and seeds."""

    policies: Choices
    models: Models = Field(default_factory=lambda: [Model(name=DEFAULT_MODEL)])
    budgets: list[Budget] = Field(default_factory=lambda: [Budget(ratio=0.1)], min_length=1)
    tasks: Choices = Field(default_factory=lambda: [Choice(name="niah_single_1")])
    context_lengths: list[Length] = Field(default_factory=lambda: [2048], min_length=1)
    seeds: list[Seed] = Field(default_factory=lambda: [42], min_length=1)
    examples: int = Field(default=5, ge=1, le=LARGEST)
    question: Literal["aware", "agnostic"] = "aware"
    prefill_chunk: int | None = Field(default=None, ge=1, le=LARGEST)
    recall_k: int = Field(default=100, ge=1, le=LARGEST)
    probe_examples: int = Field(default=1, ge=0, le=LARGEST)
    batch_size: int = Field(default=1, ge=1, le=LARGEST)
    probes: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    model: Model
    config: RunConfig

    def load(self) -> LoadedModel:
        """Load the run's model, where it runs."""
        loaded = load_model(self.model.name, device=self.config.device, dtype=self.config.dtype)
        if loaded.fingerprint != self.config.model_fingerprint:
            raise KVBenchError(
                f"{self.model.name} is not the model that the sweep was planned with ({loaded.fingerprint} instead of "
                f"{self.config.model_fingerprint}): it changed meanwhile, or differs on this machine."
            )
        return loaded


@dataclass(frozen=True)
class Outcome:
    """How a planned run ended: the run as in `--json` documents, or the error in one sentence."""

    planned: Planned
    folder: Path
    document: dict[str, Any] | None
    error: str | None = None


class Progress(Protocol):
    """Is told how far the sweep is."""

    def examples(self, planned: Planned, done: int) -> None:
        """`done` examples of a run are finished."""

    def finished(self, outcome: Outcome) -> None:
        """A run has ended."""

    def warn(self, message: str) -> None:
        """Something was amiss and has been dealt with."""


class _Problems:
    """What is wrong with a sweep's file, by line."""

    def __init__(self, file: Path, tree: yaml.Node) -> None:
        self.file, self.tree = file, tree
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, place: Sequence[str | int], message: str) -> None:
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
        line = self._line(place)
        self.found.setdefault(message, (line, f"line {line}, {name}: {message}" if name else f"line {line}: {message}"))

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


def load(file: Path) -> tuple[Sweep, _Problems]:
    """Read a sweep's file; raises KVBenchError with the line and the key of everything that is malformed."""
    with reading(lambda reason: f"{file} cannot be read ({reason}): give the file of a sweep."):
        check_regular(file)
        text = file.read_text(encoding="utf-8-sig")
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
    problems = _Problems(file, tree)
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


def _foreign_values(content: Any, problems: _Problems) -> None:
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


def _repeated_keys(root: yaml.Node, problems: _Problems) -> None:
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


def plan_sweep(file: Path, *, here: int = 1, device: str | None = None) -> list[Planned]:
    """Read and validate a sweep; give its runs, those of one model after each other.

    Checked are names and options, that each task can be built at each length for each model (one example is), that the
    budgets fit it and hold the policies' static sets, and, where models run `here`, on this machine, so many at once,
    that weights, keys and values fit into its memory. `device` is for models that name none.
    Raises KVBenchError with every problem found, by line.
    """
    sweep, problems = load(file)
    found = registry()
    for index, policy in enumerate(sweep.policies):
        with problems.at("policies", index):
            found.options("policy", policy.name, policy.options)
    for index, task in enumerate(sweep.tasks):
        with problems.at("tasks", index):
            found.make("task", task.name, task.options).data()
    for index, budget in enumerate(sweep.budgets):
        with problems.at("budgets", index):
            found.options("budget", budget.allocator, budget.options)
    for index, probe in enumerate(sweep.probes):
        with problems.at("probes", index):
            found.find("probe", probe)
    problems.stop()
    planned: dict[str, Planned] = {}
    for index, model in enumerate(sweep.models):
        with problems.at("models", index):
            loaded = load_model(model.name, device=model.device or device, dtype=model.dtype, weights=False)
            for run in _plan_model(sweep, model, loaded, problems, here=here):
                planned.setdefault(run.config.hash, run)
    problems.stop()
    return list(planned.values())


def _plan_model(
    sweep: Sweep, model: Model, loaded: LoadedModel, problems: _Problems, *, here: int
) -> Iterator[Planned]:
    if here:
        check_device(loaded.device)
    for length_index, length in enumerate(sweep.context_lengths):
        if here:
            with problems.at("context_lengths", length_index):
                _check_memory(loaded, length, probed=sweep.probe_examples > 0, batch=sweep.batch_size, at_once=here)
        for task_index, task in enumerate(sweep.tasks):
            with problems.at("tasks", task_index):
                made = registry().make("task", task.name, task.options)
                drawn = made.examples(loaded.tokenizer, context_length=length, count=1, seed=sweep.seeds[0])
                example = next(iter(drawn), None)
                if example is None:
                    raise KVBenchError(f"Task '{task.name}' has no example at length {length}: leave one of them out.")
                prompt = len(prompt_of(loaded, example).input_ids)
                yield from _plan_cell(sweep, model, loaded, problems, task, length, prompt)


def _plan_cell(
    sweep: Sweep, model: Model, loaded: LoadedModel, problems: _Problems, task: Choice, length: int, prompt: int
) -> Iterator[Planned]:
    for seed in sweep.seeds:
        for policy_index, policy in enumerate(sweep.policies):
            for budget_index, budget in enumerate(sweep.budgets):
                takes_budget = registry().find("policy", policy.name).takes_budget
                place = ("budgets", budget_index) if takes_budget else ("policies", policy_index)
                with problems.at(*place):
                    request = Request(
                        policy=policy.name, policy_options=policy.options, budget=budget, task=task.name,
                        task_options=task.options, context_length=length, examples=sweep.examples, seed=seed,
                        question=sweep.question, prefill_chunk=sweep.prefill_chunk, recall_k=sweep.recall_k,
                        probe_examples=sweep.probe_examples, probes=tuple(sweep.probes), batch_size=sweep.batch_size,
                    )  # fmt: skip
                    config = plan(request, loaded)
                    _check_static_set(config, prompt, token_bytes(loaded.model))
                    yield Planned(model, config)


def _check_static_set(config: RunConfig, prompt: int, token: int) -> None:
    if config.budget is None:
        return
    policy = registry().make("policy", config.policy, config.policy_options)
    least, size = sum(policy.static_tokens(prompt)), config.budget.size(prompt, token)
    if size < least:
        raise KVBenchError(
            f"This budget is {size} of the {prompt} tokens of {config.task} at length {config.context_length}, and the "
            f"static set of policy '{config.policy}' takes {least}: give more, or lower its sinks and window options."
        )


def _check_memory(loaded: LoadedModel, length: int, *, probed: bool, batch: int, at_once: int) -> None:
    weights = sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())
    cache = length * token_bytes(loaded.model) * max(batch, 2 if probed else 1)  # probed examples run alone
    models = at_once if loaded.device.type == "cpu" else 1  # each GPU has one
    needed, there = models * (weights + cache), capacity(loaded.device)
    if needed > there:
        parts = [
            f"its weights and the keys and values of {length} tokens",
            *([f"of {batch} examples"] if batch > 1 else []),
            *([", which the probes hold twice"] if probed else []),
            *([f"in {models} workers"] if models > 1 else []),
        ]
        raise KVBenchError(
            f"{loaded.name} needs at least {needed / 2**30:.1f} GiB for {' '.join(parts).replace(' ,', ',')}, and "
            f"{loaded.device} has {there / 2**30:.1f} GiB: choose a shorter length, a smaller model or fewer workers."
        )


def is_finished(planned: Planned, output: Path) -> bool:
    """Whether the run's folder below `output` is complete."""
    folder = output / planned.config.folder
    if not (folder / "run.json").exists():
        return False
    found = read(folder)
    return bool(found["status"] == "complete" and len(read_rows(folder)) == found["metrics"]["accuracy"]["n"])


def reuse(plans: Sequence[Planned], output: Path, progress: Progress) -> tuple[list[Outcome], list[Planned]]:
    """Part the runs into those that have ended before (or cannot be read) and those left to run."""
    outcomes, left = [], []
    for planned in plans:
        folder = output / planned.config.folder
        try:
            if not is_finished(planned, output):
                left.append(planned)
                continue
            outcome = Outcome(planned, folder, document(folder))
        except KVBenchError as error:
            outcome = Outcome(planned, folder, None, str(error))
        outcomes.append(outcome)
        progress.finished(outcome)
    return outcomes, left


def document(folder: Path) -> dict[str, Any]:
    """A finished run as one element of the `--json` document's `runs`."""
    found = read(folder)
    return {
        "policy": found["config"]["policy"], "budget": found["config"]["budget"], **found, "folder": str(folder),
    }  # fmt: skip


def run_one(planned: Planned, loaded: LoadedModel, output: Path, progress: Progress) -> Outcome:
    """Execute a run, or what is left of it; its failure becomes its outcome."""
    folder = output / planned.config.folder
    try:
        (run,) = execute([planned.config], loaded, output, lambda _, done, *__: progress.examples(planned, done))
    except Exception as error:
        return Outcome(planned, folder, None, sentence(error))
    for note in run.notes:
        progress.warn(note)
    return Outcome(planned, folder, run.document())


def run_local(plans: Sequence[Planned], output: Path, progress: Progress) -> list[Outcome]:
    """Run a sweep in this process, loading each model once."""
    outcomes, left = reuse(plans, output, progress)
    loaded: LoadedModel | None = None
    of: tuple[Model, str] | None = None
    for planned in left:
        try:
            if of != (planned.model, planned.config.model_fingerprint):
                loaded = None  # freed before the next one is loaded
                loaded, of = planned.load(), (planned.model, planned.config.model_fingerprint)
            assert loaded is not None
            outcome = run_one(planned, loaded, output, progress)
        except Exception as error:
            of = None
            outcome = Outcome(planned, output / planned.config.folder, None, sentence(error))
        outcomes.append(outcome)
        progress.finished(outcome)
    return outcomes
