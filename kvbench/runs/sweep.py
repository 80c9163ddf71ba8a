"""Sweeps: a grid of runs from a YAML file, validated before anything runs; a failed run leaves the others alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from kvbench.contract.errors import KVBenchError, sentence
from kvbench.contract.task import ForcedTask
from kvbench.engine.governor import chosen_layers
from kvbench.engine.survey import token_bytes
from kvbench.models import LoadedModel, check_device, load_model
from kvbench.models.quantised import check_quantised
from kvbench.models.scaling import rope_scaling_named
from kvbench.plugins import registry
from kvbench.runs.memory import capacity
from kvbench.runs.planning import load_to_plan
from kvbench.runs.results import RunConfig, read
from kvbench.runs.rows import read_rows
from kvbench.runs.runner import Request, alike, execute, plan
from kvbench.runs.sharing import prompt_of
from kvbench.runs.sweep_file import Choice, Model, Problems, Sweep, load


@dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    model: Model
    config: RunConfig

    def load(self) -> LoadedModel:
        """Load the run's model, where it runs."""
        loaded = load_model(
            self.model.name, device=self.config.device, dtype=self.config.dtype, rope_scaling=self.config.rope_scaling,
            device_map=self.config.device_map,
        )  # fmt: skip
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
            for run in _plan_model(sweep, model, _light(model, device, here), problems, here=here):
                planned.setdefault(run.config.hash, run)
    problems.stop()
    return list(planned.values())


def _light(model: Model, device: str | None, here: int) -> Callable[[int], LoadedModel]:
    """A model to plan runs of a length with; the length matters where its rotary embedding is stretched to it."""
    scaling = rope_scaling_named(model.rope_scaling, "rope_scaling")
    known: dict[int | None, LoadedModel] = {}

    def light(length: int) -> LoadedModel:
        stretched = None if scaling is None or scaling.factor is not None else length
        if stretched not in known:
            known[stretched] = load_to_plan(
                model.name, device=model.device or device, dtype=model.dtype, rope_scaling=model.rope_scaling,
                device_map=model.device_map, context_length=stretched,
            )  # fmt: skip
            if here:
                check_device(known[stretched].device)
                check_quantised(model.name, known[stretched].model.config, known[stretched].device)
        return known[stretched]

    return light


def _plan_model(
    sweep: Sweep, model: Model, light: Callable[[int], LoadedModel], problems: Problems, *, here: int
) -> Iterator[Planned]:
    for length_index, length in enumerate(sweep.context_lengths):
        loaded = light(length)
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
                own = {} if policy.compress_every is None else {"compress_every": policy.compress_every}
                place = ("budgets", budget_index) if takes_budget and not own else ("policies", policy_index)
                with problems.at(*place):
                    request = Request(
                        policy=policy.name, policy_options=policy.options, task=task.name,
                        budget=budget.model_copy(update=own),
                        task_options=task.options, context_length=length, examples=sweep.examples, seed=seed,
                        question=sweep.question, prefill_chunk=sweep.prefill_chunk, recall_k=sweep.recall_k,
                        probe_examples=sweep.probe_examples, probes=tuple(sweep.probes), batch_size=sweep.batch_size,
                        decoding=sweep.decoding, share_prefill=_shares(sweep, task, policy), prefix=sweep.prefix,
                        new_tokens=sweep.new_tokens,
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


def _shares(sweep: Sweep, task: Choice, policy: Choice) -> bool | None:
    """Whether prompts are shared: as asked, where task and policy can take them over at all."""
    found = registry()
    can = not issubclass(found.find("task", task.name), ForcedTask) and found.find("policy", policy.name).cached
    return sweep.share_prefill if can else None


def _check_memory(
    loaded: LoadedModel, length: int, *, probed: bool, batch: int | Literal["auto"], at_once: int
) -> None:
    if loaded.weights is not None or loaded.device_map is not None:
        return  # neither the bytes of quantised weights nor those of all GPUs are known before they are loaded
    batch = 1 if batch == "auto" else batch  # which is sized to the memory
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


def run_together(plans: Sequence[Planned], loaded: LoadedModel, output: Path, progress: Progress) -> list[Outcome]:
    """Execute runs of one model, or what is left of them, together; a run's failure becomes its outcome."""
    by_hash = {planned.config.hash: planned for planned in plans}
    errors: dict[str, str] = {}

    def failed(config: RunConfig, error: Exception) -> None:
        errors[config.hash] = sentence(error)

    def tell(config: RunConfig, done: int, of: int, note: str) -> None:
        progress.examples(by_hash[config.hash], done)

    runs = execute([planned.config for planned in plans], loaded, output, tell, failed)
    for note in dict.fromkeys(note for run in runs for note in run.notes):
        progress.warn(note)
    documents = {run.config.hash: run.document() for run in runs}
    return [
        Outcome(planned, output / planned.config.folder, documents.get(key), errors.get(key))
        for key, planned in by_hash.items()
    ]


def run_local(plans: Sequence[Planned], output: Path, progress: Progress) -> list[Outcome]:
    """Run a sweep in this process, loading each model once; runs that share prompts go over the examples together."""
    outcomes, left = reuse(plans, output, progress)
    groups: dict[tuple[str, str, str], list[Planned]] = {}
    for planned in left:
        model = planned.model.model_dump_json()
        groups.setdefault((model, planned.config.model_fingerprint, alike(planned.config)), []).append(planned)
    loaded: LoadedModel | None = None
    of: tuple[str, str] | None = None
    for (model, fingerprint, _), together in groups.items():
        try:
            if of != (model, fingerprint):
                loaded = of = None  # freed before the next one is loaded
                loaded, of = together[0].load(), (model, fingerprint)
            assert loaded is not None
            ended = run_together(together, loaded, output, progress)
        except Exception as error:
            of = None
            ended = [Outcome(planned, output / planned.config.folder, None, sentence(error)) for planned in together]
        for outcome in ended:
            outcomes.append(outcome)
            progress.finished(outcome)
    return outcomes
