"""Runs policies on a task's examples, side by side with exact attention."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from kvbench.contract.errors import out_of_memory
from kvbench.contract.policy import KVCachePolicy
from kvbench.engine.attach import attach
from kvbench.engine.conformance.report import Report
from kvbench.engine.generation import generate
from kvbench.engine.prefill import prefill
from kvbench.engine.prompt import Prefill
from kvbench.models import LoadedModel
from kvbench.plugins import registry
from kvbench.runs.commit import commit
from kvbench.runs.environment import environment, processor
from kvbench.runs.examples import AnyExample, examples_of, extend, stop_tokens
from kvbench.runs.group import Failed, Group, telling
from kvbench.runs.memory import method, quick_release, release
from kvbench.runs.planning import AnyTask, Request, check_plugins, plan
from kvbench.runs.proofs import checker
from kvbench.runs.results import Run, RunConfig
from kvbench.runs.sharing import SharedPrompt, prompt_of
from kvbench.runs.sizing import Sizing
from kvbench.runs.timing import bandwidths

__all__ = ["WARM_UP_TOKENS", "Failed", "Progress", "Request", "environment_of", "execute", "plan", "stop_tokens"]


WARM_UP_TOKENS = 20
"""Tokens generated before measuring: enough for a policy that takes up new tokens by sixteen to do so once."""


class Progress(Protocol):
    """Is told of every finished generation."""

    def __call__(self, config: RunConfig, done: int, of: int, note: str) -> None:
        """`done` of `of` examples of a run are finished."""


def execute(
    configs: Sequence[RunConfig], loaded: LoadedModel, output: Path, progress: Progress,
    failed: Failed | None = None, *, check_anew: bool = False,
) -> list[Run]:  # fmt: skip
    """Run configurations, or what is left of them, and return their completed folders.

    One after the other; those that share prompts go over the examples together. A run that fails leaves the others
    alone and is told to `failed`; without it, the first failure is raised and ends them all. With `check_anew` what the
    conformance checks found in earlier processes does not count.
    """
    runs = []
    for config in configs:
        with telling(failed, config):
            check_plugins(config)
            runs.append(Run(output, config, environment_of(loaded) | bandwidths(loaded.device, config.decoding)))
    together: dict[str, list[Run]] = {}
    for run in runs:
        if run.status == "complete":
            progress(run.config, len(run.rows), len(run.rows), "reused")
        else:
            together.setdefault(alike(run.config), []).append(run)
    proofs = _prove([run for group in together.values() for run in group], loaded, progress, failed, check_anew)
    with quick_release():
        for group in together.values():
            proven = [run for run in group if run.config.hash in proofs]
            if proven:
                _execute(proven, loaded, progress, proofs, failed)
    return [run for run in runs if run.status == "complete"]


def alike(config: RunConfig) -> str:
    """The same for configurations that share prompts and differ in policy and budget alone."""
    own: dict[str, Any] = {"policy": "", "policy_options": {}, "budget": None, "plugins": {}, "dense_layers": 0}
    return config.model_copy(update=own).hash if config.share_prefill else config.hash


def _prove(
    runs: Sequence[Run], loaded: LoadedModel, progress: Progress, failed: Failed | None, anew: bool
) -> dict[str, list[Report]]:
    """Check the model and each run's policy, where that has not been done; the findings by a run's hash."""
    conformance, found = checker(loaded, anew=anew), {}
    for run in runs:
        with telling(failed, run.config):
            progress(run.config, len(run.rows), run.config.examples, "conformance check")
            policy = registry().make("policy", run.config.policy, run.config.policy_options)
            found[run.config.hash] = conformance.check(policy)
    return found


def _execute(
    runs: list[Run], loaded: LoadedModel, progress: Progress, proofs: Mapping[str, Sequence[Report]],
    failed: Failed | None,
) -> None:  # fmt: skip
    """Run configurations that differ in their policies and budgets alone, example by example."""
    shared = runs[0].config
    with ExitStack() as folders:
        group = Group(failed)
        for run in runs:
            with group.alone(run):
                run.conformance = [report.document() for report in proofs[run.config.hash]]
                group.open(run, folders)
                for report in proofs[run.config.hash]:
                    report.require()
                progress(run.config, len(run.rows), run.config.examples, "")
        if any(len(run.rows) < run.config.examples for run in group.runs):
            prompts: dict[int, Prefill] = {}
            warm = _WARM.setdefault(loaded.model, set())
            for run in group.runs:
                if (key := _warm_key(run.config)) not in warm:
                    with group.alone(run):
                        _warm_up(run.config, loaded, prompts)
                        warm.add(key)
            prompts.clear()
        with group.together():
            task: AnyTask = registry().make("task", shared.task, shared.task_options)
            sizing = Sizing(shared, loaded)
            before: Prefill | None = None
            for batch in sizing.batches(examples_of(task, shared, loaded)):
                waiting = deque([batch])
                while waiting and group.runs:
                    if len(waiting[0]) > sizing.most:  # a half that was left, and too many by now
                        waiting.extendleft(reversed(sizing.parts(waiting.popleft())))
                    left, before = _together(group, loaded, task, waiting.popleft(), sizing, before, progress)
                    waiting.extendleft(reversed(left))
                if not group.runs:
                    break
        for run in group.runs:
            with group.alone(run):
                group.close(run)


def _together(
    group: Group, loaded: LoadedModel, task: AnyTask, batch: list[AnyExample], sizing: Sizing, before: Prefill | None,
    progress: Progress,
) -> tuple[list[list[AnyExample]], Prefill | None]:  # fmt: skip
    """Take a batch through all runs that lack it; what is left of it where memory ran out, and its prompt for a next.

    `before` is an earlier batch's prompt.
    """
    ids = {example.id for example in batch}
    missing = [run for run in group.runs if not ids <= {row["id"] for row in run.rows}]
    if not missing:
        return [], before
    chunk = sizing.chunk(len(batch), max(len(prompt_of(loaded, example).input_ids) for example in batch))
    for run in missing:
        run.chunk, run.shortages = chunk, sizing.shortages
    prompt = SharedPrompt(batch, missing, loaded, before) if missing[0].config.share_prefill else None
    left: list[list[AnyExample]] | None = None
    for run in missing if prompt is None else prompt.order:
        with group.alone(run):
            try:
                extend(run, loaded, task, batch, prompt)
                progress(run.config, len(run.rows), run.config.examples, "")
                if len(run.rows) == run.config.examples:
                    group.close(run)  # whatever becomes of the others
            except Exception as error:
                left = sizing.less(batch, chunk) if out_of_memory(error) else None
                if left is None:
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
        if left is not None:
            size = f"{len(batch)} examples at once" if len(batch) > 1 else f"prompts in chunks of {chunk or 'all'}"
            for one in missing:
                one.notes.append(f"Memory ran out with {size}: less was tried, and nothing that was finished is lost.")
            prompt = before = None
            release()
            return left, None
    return [], None if prompt is None else prompt.latest


def environment_of(loaded: LoadedModel) -> dict[str, Any]:
    """What a run of this model is measured on."""
    device, spread, weights = loaded.device, loaded.placed, loaded.computed_with
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        **({"commit": known} if (known := commit()) else {}),
        **environment(str(device), name, torch.get_num_threads(), method(device)),
        **({"device_map": spread} if spread else {}),
        **({"weights": weights} if weights else {}),
    }


_WARM: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
"""By model, what `_warm_key` gave for the runs that were warmed up."""


def _warm_key(config: RunConfig) -> str:
    """The same for configurations whose warm-ups do the same."""
    sizes = {"tokens": None, "bytes": None, "ratio": 1.0}
    budget = None if config.budget is None else config.budget.model_copy(update=sizes)
    same = {"task": "", "task_options": {}, "task_data": {}, "plugins": {}, "examples": 1, "seed": 0, "budget": budget,
            "context_length": _policy_and_length(config)[1]}  # fmt: skip
    return config.model_copy(update=same).hash


def _policy_and_length(config: RunConfig) -> tuple[KVCachePolicy, int]:
    """A run's policy, and the tokens of the prompt that it is warmed up with."""
    policy: KVCachePolicy = registry().make("policy", config.policy, config.policy_options)
    return policy, min(config.context_length, max(256, 2 * sum(policy.static_tokens(config.context_length))))


def _warm_up(config: RunConfig, loaded: LoadedModel, prompts: dict[int, Prefill]) -> None:
    """Compile and load what a first use compiles and loads, so that no example's time includes it.

    `prompts`, by length, are those of earlier calls, which runs that share prompts take over.
    """
    policy, length = _policy_and_length(config)
    # Not the whole prompt: a policy that is given all of it selects nothing, and would load half of its code later.
    least = sum(policy.static_tokens(length))
    part = {"tokens": None, "bytes": None, "ratio": (least + length) / 2 / length}
    budget = None if config.budget is None else config.budget.model_copy(update=part)
    more = WARM_UP_TOKENS if loaded.max_context is None else min(WARM_UP_TOKENS, max(loaded.max_context - length, 0))
    ids = [3 + i % 50 for i in range(length + max(more - 3, 0))]
    if config.share_prefill and length not in prompts:
        prompts[length] = prefill(loaded.model, [ids[:length]])
    with attach(
        loaded.model, policy=policy, budget=budget, tokenizer=loaded.tokenizer, dense_layers=config.dense_layers
    ) as session:
        # Most of the tokens in one call, which computes the model's other parts once for all of them.
        generate(
            session, ids, prompt_tokens=length, max_new_tokens=min(more, 3), prefilled=prompts.get(length),
            decoding=config.decoding,
        )  # fmt: skip
