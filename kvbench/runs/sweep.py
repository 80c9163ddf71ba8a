"""Sweeps: a grid of runs from a YAML file, validated before anything runs; a failed run leaves the others alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvbench.contract.errors import KVBenchError, sentence
from kvbench.engine.governor import chosen_layers
from kvbench.engine.survey import token_bytes
from kvbench.models import LoadedModel, check_device, load_model
from kvbench.plugins import registry
from kvbench.runs.memory import capacity
from kvbench.runs.planning import load_to_plan
from kvbench.runs.results import RunConfig, read
from kvbench.runs.rows import read_rows
from kvbench.runs.runner import Request, execute, plan
from kvbench.runs.sharing import prompt_of
from kvbench.runs.sweep_file import Choice, Model, Problems, Sweep, load


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


def plan_sweep(file: Path | Mapping[str, Any], *, here: int = 1, device: str | None = None) -> list[Planned]:
    """Read and validate a sweep, its file or what that would hold; give its runs, those of one model after each other.

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
            loaded = load_to_plan(model.name, device=model.device or device, dtype=model.dtype)
            for run in _plan_model(sweep, model, loaded, problems, here=here):
                planned.setdefault(run.config.hash, run)
    problems.stop()
    return list(planned.values())


def _plan_model(sweep: Sweep, model: Model, loaded: LoadedModel, problems: Problems, *, here: int) -> Iterator[Planned]:
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
    sweep: Sweep, model: Model, loaded: LoadedModel, problems: Problems, task: Choice, length: int, prompt: int
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
                        decoding=sweep.decoding,
                        dense_layers=sweep.dense_layers if policy.dense_layers is None else policy.dense_layers,
                    )  # fmt: skip
                    config = plan(request, loaded)
                    _check_static_set(config, prompt, loaded)
                    yield Planned(model, config)


def _check_static_set(config: RunConfig, prompt: int, loaded: LoadedModel) -> None:
    if config.budget is None:
        return
    policy = registry().make("policy", config.policy, config.policy_options)
    token = token_bytes(loaded.model, chosen_layers(loaded.model, policy, config.dense_layers))
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
