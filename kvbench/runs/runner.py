"""Runs policies on a task's examples, side by side with exact attention."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.probe import Probe
from kvbench.contract.task import Example, ForcedTask, Prompt, Task, TokenExample
from kvbench.engine.attach import attach
from kvbench.engine.generation import Forced, Generation, exact_logits, force, generate, generate_batch
from kvbench.engine.governor import check_head_budgets, token_bytes
from kvbench.engine.prefill import PromptRecorder, prefill
from kvbench.engine.prompt import Prefill
from kvbench.models import LoadedModel, check_context
from kvbench.plugins import registry
from kvbench.runs.memory import PeakMemory, method, release
from kvbench.runs.results import Run, RunConfig, environment, processor
from kvbench.runs.sharing import STANDARD_PROBES, SharedPrompt, probe_passes, prompt_of, prompt_tokens, session_of
from kvbench.runs.traces import write_trace
from kvbench.tasks.prompts import prompt_length

EXACT_BYTES = 2**30
"""Most memory for the exact logits of earlier examples."""
WARM_UP_TOKENS = 18
"""Tokens after the prompt before measuring: enough for a policy that takes up new tokens by sixteen to do so once."""


_PREFIX_LEFT_OUT = {"prefix_left_out": "the chat template opens a thinking block"}
"""In an example's `info` where that is so."""


AnyTask = Task | ForcedTask
AnyExample = Example | TokenExample


class Progress(Protocol):
    """Is told of every finished generation."""

    def __call__(self, policy: str, done: int, of: int, note: str) -> None:
        """`done` of `of` examples of `policy` are finished."""


@dataclass(frozen=True)
class Request:
    """What to run: everything of a run's configuration that does not follow from the model and the plugins."""

    policy: str
    policy_options: dict[str, Any]
    budget: Budget | None
    task: str
    task_options: dict[str, Any]
    context_length: int
    examples: int
    seed: int
    question: Literal["aware", "agnostic"] = "aware"
    prefill_chunk: int | None = None
    recall_k: int = 100
    probe_examples: int = 1
    probes: tuple[str, ...] = ()
    batch_size: int = 1
    share_prefill: bool | None = None
    """Compute each prompt once for all that take it over; None: where nothing is lost by it."""


def plan(request: Request, loaded: LoadedModel) -> RunConfig:
    """Validate a request before anything runs, and complete it to a run's configuration."""
    found = registry()
    policy = found.find("policy", request.policy)
    options = found.options("policy", request.policy, request.policy_options)
    task_options = found.options("task", request.task, request.task_options)
    budget = request.budget if policy.takes_budget else None
    task: AnyTask = found.find("task", request.task)(task_options)
    forced = isinstance(task, ForcedTask)
    if forced and (request.batch_size > 1 or request.share_prefill):
        raise KVBenchError(
            f"Task '{task.name}' takes given tokens through a policy one sequence at a time: leave --batch-size at 1 "
            "and prompts unshared."
        )
    wanted = request.batch_size == 1 and not forced if request.share_prefill is None else request.share_prefill
    share_prefill = wanted and policy.cached
    if budget is not None:
        allocator = found.make("budget", budget.allocator, budget.options)
        check_head_budgets(policy, allocator)
        share_prefill = share_prefill and not allocator.reads_hidden
        budget = budget.model_copy(update={"options": allocator.options.model_dump(mode="json")})
        budget.size(request.context_length, token_bytes(loaded.model))
    check_context(loaded, request.context_length)
    if request.batch_size > 1 and request.question == "agnostic":
        raise KVBenchError(
            f"A batch of {request.batch_size} examples needs their questions inside their prompts: use --question "
            "aware, or --batch-size 1."
        )
    return RunConfig(
        model=loaded.name, model_fingerprint=loaded.fingerprint, device=loaded.device.type,
        dtype=str(loaded.dtype).removeprefix("torch."), policy=request.policy,
        policy_options=options.model_dump(mode="json"), budget=budget, task=request.task,
        task_options=task_options.model_dump(mode="json"), task_data=task.data(),
        context_length=request.context_length, examples=request.examples, seed=request.seed, question=request.question,
        prefill_chunk=request.prefill_chunk, recall_k=request.recall_k,
        probe_examples=min(request.probe_examples, request.examples), probes=_extra_probes(request),
        batch_size=request.batch_size, share_prefill=share_prefill,
    )  # fmt: skip


def _extra_probes(request: Request) -> tuple[str, ...]:
    """The probes asked for beyond the standard ones, checked to exist and to have examples to run on."""
    names = tuple(sorted({name for name in request.probes if name not in STANDARD_PROBES}))
    for name in names:
        registry().find("probe", name)
    if request.probes and not request.probe_examples:
        raise KVBenchError(f"Probe '{request.probes[0]}' has nothing to measure: give --probe-examples 1 or more.")
    return names


LeaveOut = Callable[[str, KVBenchError], bool]
"""Is told of a policy that failed; whether the others go on without it."""


def execute(
    configs: Sequence[RunConfig], loaded: LoadedModel, output: Path, progress: Progress,
    leave_out: LeaveOut = lambda policy, error: False,
) -> list[Run]:  # fmt: skip
    """Run configurations, or what is left of them, and return their completed folders.

    One after the other; those that differ in policy and budget alone and share prompts go over the examples together.
    """
    runs: list[Run] = []
    together: dict[str, list[Run]] = {}
    for config in configs:
        try:
            run = Run(output, config, environment_of(loaded))
        except KVBenchError as error:
            if not leave_out(config.policy, error):
                raise
            continue
        runs.append(run)
        if run.status == "complete":
            progress(run.config.policy, len(run.rows), len(run.rows), "reused")
        else:
            alike = config.model_copy(update={"policy": "", "policy_options": {}, "budget": None}).hash
            together.setdefault(alike if config.share_prefill else config.hash, []).append(run)
    for group in together.values():
        _execute(group, loaded, progress, leave_out)
    return [run for run in runs if run.status == "complete"]


def _execute(runs: list[Run], loaded: LoadedModel, progress: Progress, leave_out: LeaveOut) -> None:
    """Run configurations that differ in their policies and budgets alone, example by example."""
    shared = runs[0].config
    task: AnyTask = registry().make("task", shared.task, shared.task_options)
    with ExitStack() as everything:
        folders = {run.config.hash: everything.enter_context(ExitStack()) for run in runs}

        def attempt(run: Run, step: Callable[[], None]) -> None:
            try:
                step()
            except KVBenchError as error:
                if not leave_out(run.config.policy, error):
                    raise
                going.remove(run)
                folders[run.config.hash].__exit__(type(error), error, error.__traceback__)

        going = list(runs)
        for run in runs:
            attempt(run, partial(_open, folders[run.config.hash], run))
            progress(run.config.policy, len(run.rows), run.config.examples, "")
        prompts: dict[int, Prefill] = {}
        if any(len(run.rows) < run.config.examples for run in going):
            for run in list(going):
                attempt(run, partial(_warm_up, run.config, loaded, prompts))
        prompts.clear()
        before: Prefill | None = None
        for batch in _batches(_examples(task, shared, loaded), shared, loaded):
            ids = {example.id for example in batch}
            missing = [run for run in going if not ids <= {row["id"] for row in run.rows}]
            prompt = SharedPrompt(batch, missing, loaded, before) if missing and shared.share_prefill else None
            before = None
            for run in missing if prompt is None else prompt.order:
                attempt(run, partial(_extend, run, loaded, task, batch, prompt))
                progress(run.config.policy, len(run.rows), run.config.examples, "")
            before = None if prompt is None else prompt.latest


def _open(folder: ExitStack, run: Run) -> None:
    folder.enter_context(run.writing())


def _extend(run: Run, loaded: LoadedModel, task: AnyTask, batch: list[AnyExample], prompt: SharedPrompt | None) -> None:
    """Add a batch's examples to a run; those that a stopped run had finished keep what they have."""
    config, there = run.config, {row["id"] for row in run.rows}
    single = not registry().find("policy", config.policy).batched
    for part in [[example] for example in batch] if single else [batch]:
        if all(example.id in there for example in part):
            continue
        shared = prompt if len(part) == len(batch) else None
        for example, row, answer in _measure(config, loaded, task, part, shared):
            if example.id in there:
                continue
            if len(run.rows) < config.probe_examples:
                traces = run.path / "traces"
                row |= _probe(config, loaded, example, answer, shared, traces, f"{len(run.rows):06d}")  # noqa: PLW2901
            run.append(row)


def _batches(examples: Iterator[AnyExample], config: RunConfig, loaded: LoadedModel) -> Iterator[list[AnyExample]]:
    """The examples to generate together: probed ones alone, the others by length."""
    for example in islice(examples, config.probe_examples if config.batch_size > 1 else config.examples):
        yield [example]
    rest = sorted(examples, key=lambda example: _length(loaded, example))
    for first in range(0, len(rest), config.batch_size):
        yield rest[first : first + config.batch_size]


def environment_of(loaded: LoadedModel) -> dict[str, Any]:
    """What a run of this model is measured on."""
    device = loaded.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return environment(str(device), name, torch.get_num_threads(), method(device))


def _examples(task: AnyTask, config: RunConfig, loaded: LoadedModel) -> Iterator[AnyExample]:
    yield from task.examples(
        loaded.tokenizer, context_length=config.context_length, count=config.examples, seed=config.seed
    )


def _length(loaded: LoadedModel, example: AnyExample) -> int:
    """Tokens of a prompt."""
    return example.prompt_tokens if isinstance(example, TokenExample) else prompt_length(loaded.tokenizer, example)


def _longest(example: AnyExample, prompt: Prompt) -> int:
    """Tokens of a prompt and its longest answer."""
    if isinstance(example, TokenExample):
        return len(example.input_ids)
    return len(prompt.input_ids) + example.max_new_tokens


def _scored(
    config: RunConfig, loaded: LoadedModel, task: AnyTask, example: AnyExample, prediction: str, result: Generation
) -> dict[str, Any]:
    """An example's score and references, and what a task of given tokens measured besides."""
    if isinstance(example, Example):
        assert not isinstance(task, ForcedTask)
        return {"score": task.score(prediction, example), "references": list(example.references)}
    assert isinstance(task, ForcedTask) and isinstance(result, Forced)
    targets = list(example.input_ids[example.prompt_tokens + 1 :])
    exact = _exact(config, loaded, example)
    scores = task.score(result.logits, exact, torch.tensor(targets, device=result.logits.device))
    return {
        "score": scores.values[task.main],
        "scores": scores.values,
        "positions": scores.positions,
        "references": [loaded.tokenizer.decode(targets, skip_special_tokens=True)],
    }


_EXACT: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()
"""Exact logits of the latest examples, which all policies of a run are compared with."""


def _exact(config: RunConfig, loaded: LoadedModel, example: TokenExample) -> torch.Tensor:
    prompt, chunk = example.prompt_tokens, config.prefill_chunk
    key = (loaded.fingerprint, config.dtype, config.device, chunk, prompt, example.input_ids)
    if key not in _EXACT:
        _EXACT[key] = exact_logits(loaded.model, example.input_ids, prompt_tokens=prompt, prefill_chunk=chunk)
        while len(_EXACT) > 1 and sum(logits.nbytes for logits in _EXACT.values()) > EXACT_BYTES:
            _EXACT.popitem(last=False)
    return _EXACT[key]


def _measure(
    config: RunConfig, loaded: LoadedModel, task: AnyTask, batch: list[AnyExample], shared: SharedPrompt | None
) -> Iterator[tuple[AnyExample, dict[str, Any], list[int]]]:
    """Generate a batch's answers, or predict given tokens, undisturbed; each example's row, and the answer's tokens."""
    prompts = [prompt_of(loaded, example) for example in batch]
    for example, prompt in zip(batch, prompts, strict=True):
        check_context(loaded, _longest(example, prompt))
    token = token_bytes(loaded.model)
    prefilled = recorder = None
    if shared is not None and shared.is_own(config):
        recorder = shared.recorder(config)
    elif shared is not None:
        prefilled = shared.prefill()
    release()
    with PeakMemory(loaded.device) as peak:
        results = _generate(config, loaded, batch, [], shared, prefilled, recorder)
    if shared is not None and recorder is not None:
        shared.take(recorder)
    for example, prompt, result in zip(batch, prompts, results, strict=True):
        prediction = loaded.tokenizer.decode(result.tokens, skip_special_tokens=True)
        row: dict[str, Any] = {
            "id": example.id,
            **_scored(config, loaded, task, example, prediction, result),
            "prediction": prediction,
            "prompt_tokens": len(prompt.input_ids),
            "budget_tokens": config.budget and config.budget.size(prompt_tokens(config, prompt), token),
            "token_bytes": token,
            "generated_tokens": len(result.tokens),
            "prefill_s": result.prefill_s,
            "index_s": result.index_s,
            "step_s": result.step_s,
            "bytes": result.bytes,
            "peak_memory_bytes": peak.bytes if prefilled is None else None,
            "info": {**example.info, **(_PREFIX_LEFT_OUT if prompt.prefix_left_out else {})},
        }
        if prefilled is not None:
            row["reused_tokens"] = prefilled.reused
        yield example, row, result.tokens


def _probe(
    config: RunConfig,
    loaded: LoadedModel,
    example: AnyExample,
    answer: list[int],
    shared: SharedPrompt | None,
    folder: Path,
    name: str,
) -> dict[str, Any]:
    """Generate an example once more with probes, and once more for each that needs a generation of its own."""
    prompt = prompt_of(loaded, example)
    passes = probe_passes(config)
    probes = [probe for group in passes for probe in group]
    step_s: list[float] = []
    for group in passes:
        (again,) = _generate(
            config, loaded, [example], group, shared, None if shared is None else shared.probed(config)
        )
        if again.tokens != answer:
            raise KVBenchError(
                f"Policy '{config.policy}' answered example {example.id} differently when it was measured by probes: "
                "its results cannot be trusted. A policy must keep its state on the layer and be deterministic."
            )
        step_s = step_s or again.step_s
    measured: dict[str, Any] = {
        "probes": {key: value for probe in probes for key, value in probe.result().items()},
        "probed_step_s": step_s,
    }
    trace = {key: column for probe in probes for key, column in probe.trace().items() if column}
    if trace:
        write_trace(folder / f"{name}.safetensors", trace, example=example.id, prompt_tokens=len(prompt.input_ids))
        measured["trace"] = f"{folder.name}/{name}.safetensors"
    return measured


def _generate(
    config: RunConfig, loaded: LoadedModel, batch: list[AnyExample], probes: list[Probe], shared: SharedPrompt | None,
    prefilled: Prefill | None = None, recorder: PromptRecorder | None = None,
) -> list[Generation]:  # fmt: skip
    prompts = [prompt_of(loaded, example) for example in batch]
    session = session_of(config, loaded, probes if recorder is None else [*probes, recorder])
    torch.manual_seed(config.seed)  # a policy that samples gives an example the same answer in whatever order they run
    with session:
        if isinstance(batch[0], TokenExample):
            given = batch[0]
            prompt_tokens, chunk = len(prompts[0].input_ids), config.prefill_chunk
            return [force(session, given.input_ids, prompt_tokens=prompt_tokens, prefill_chunk=chunk)]
        return generate_batch(
            session, [prompt.input_ids for prompt in prompts],
            prompt_tokens=None if config.question == "aware" else prompts[0].context_tokens,
            max_new_tokens=[example.max_new_tokens for example in batch if isinstance(example, Example)],
            stop=stop_tokens(loaded), prefill_chunk=config.prefill_chunk, prefilled=prefilled,
            border=None if shared is None else shared.border, recorder=recorder,
        )  # fmt: skip


def _warm_up(config: RunConfig, loaded: LoadedModel, prompts: dict[int, Prefill]) -> None:
    """Compile and load what a first use compiles and loads, so that no example's time includes it.

    `prompts`, by length, are those of earlier calls, which runs that share prompts take over.
    """
    policy = registry().make("policy", config.policy, config.policy_options)
    length = min(config.context_length, max(256, 2 * sum(policy.static_tokens(config.context_length))))
    # Not the whole prompt: a policy that is given all of it selects nothing, and would load half of its code later.
    least = sum(policy.static_tokens(length))
    part = {"tokens": None, "bytes": None, "ratio": (least + length) / 2 / length}
    budget = None if config.budget is None else config.budget.model_copy(update=part)
    ids = [3 + i % 50 for i in range(length + WARM_UP_TOKENS)]
    if config.share_prefill and length not in prompts:
        prompts[length] = prefill(loaded.model, [ids[:length]])
    with attach(loaded.model, policy=policy, budget=budget, tokenizer=loaded.tokenizer) as session:
        # Most of the tokens in one call, which computes the model's other parts once for all of them.
        generate(session, ids, prompt_tokens=length, max_new_tokens=3, prefilled=prompts.get(length))


def stop_tokens(loaded: LoadedModel) -> set[int]:
    """Token ids that end an answer."""
    ends = loaded.model.generation_config.eos_token_id
    found = {ends} if isinstance(ends, int) else set(ends or ())
    if loaded.tokenizer.eos_token_id is not None:
        found.add(int(loaded.tokenizer.eos_token_id))
    return found
