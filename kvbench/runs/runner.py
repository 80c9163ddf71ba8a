"""Runs policies on a task's examples, side by side with exact attention."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.probe import Probe
from kvbench.contract.reading import validating
from kvbench.contract.task import Example, ForcedTask, Prompt, Task, TokenExample
from kvbench.engine.attach import attach
from kvbench.engine.conformance.report import Report
from kvbench.engine.generation import Decoding, Forced, Generation, exact_logits, force, generate, generate_batch
from kvbench.engine.governor import check_head_budgets, chosen_layers
from kvbench.engine.prefill import PromptRecorder, prefill
from kvbench.engine.prompt import Prefill
from kvbench.engine.survey import token_bytes
from kvbench.engine.validation import check_hooks
from kvbench.identity import Identity
from kvbench.models import LoadedModel, check_context
from kvbench.plugins import registry
from kvbench.runs.measured import checked_score, probed_trace, probed_values, task_errors
from kvbench.runs.memory import PeakMemory, method, quick_release, release
from kvbench.runs.proofs import checker
from kvbench.runs.results import Run, RunConfig, environment, processor
from kvbench.runs.sharing import (
    STANDARD_PROBES,
    SharedPrompt,
    is_probed,
    probe_passes,
    prompt_of,
    prompt_tokens,
    session_of,
)
from kvbench.runs.timing import bandwidths, can_be_fixed, check_decoding, step_row
from kvbench.runs.traces import write_trace
from kvbench.tasks.prompts import prompt_length

EXACT_BYTES = 2**30
"""Most memory for the exact logits of earlier examples."""
WARM_UP_TOKENS = 20
"""Tokens generated before measuring: enough for a policy that takes up new tokens by sixteen to do so once."""


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
    dense_layers: int = 0
    share_prefill: bool | None = None
    """Compute each prompt once for all that take it over; None: where nothing is lost by it."""
    decoding: Decoding = "auto"


@validating(lambda reason: f"There is no such run ({reason}): change that value.")
def plan(request: Request, loaded: LoadedModel) -> RunConfig:
    """Validate a request before anything runs, and complete it to a run's configuration."""
    found = registry()
    policy = found.find("policy", request.policy)
    for plugin in (policy, *(found.find("probe", name) for name in request.probes)):
        check_hooks(plugin)
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
    own_prompt = hasattr(policy, "attend_prompt")
    share_prefill = wanted and policy.cached and not own_prompt
    if budget is not None:
        allocator = found.make("budget", budget.allocator, budget.options)
        check_head_budgets(policy, allocator)
        share_prefill = share_prefill and not allocator.reads_hidden
        budget = budget.model_copy(update={"options": allocator.options.model_dump(mode="json")})
    own = policy(options)
    dense_layers = 0 if policy.exact or not policy.cached else request.dense_layers
    layers = chosen_layers(loaded.model, own, dense_layers) if policy.cached else []
    if budget is not None:
        size = budget.size(request.context_length, token_bytes(loaded.model, layers))
        _check_size(own, request.context_length, size)
    check_context(loaded, request.context_length)
    if request.batch_size > 1 and request.question == "agnostic":
        raise KVBenchError(
            f"A batch of {request.batch_size} examples needs their questions inside their prompts: use --question "
            "aware, or --batch-size 1."
        )
    check_decoding(request.decoding, loaded.device, policy, forced=forced)
    return RunConfig(
        model=loaded.name, model_fingerprint=loaded.fingerprint, device=loaded.device.type,
        dtype=str(loaded.dtype).removeprefix("torch."), policy=request.policy,
        policy_options=options.model_dump(mode="json"), budget=budget, task=request.task,
        task_options=task_options.model_dump(mode="json"), task_data=task.data(),
        context_length=request.context_length, examples=request.examples, seed=request.seed, question=request.question,
        prefill_chunk=request.prefill_chunk, recall_k=request.recall_k,
        probe_examples=min(request.probe_examples, request.examples), probes=_extra_probes(request),
        batch_size=request.batch_size, share_prefill=share_prefill, dense_layers=dense_layers,
        prompt_attention="policy" if own_prompt else "exact", decoding=request.decoding,
        plugins=_plugins(request, budget),
    )  # fmt: skip


def _check_size(policy: KVCachePolicy, context: int, size: int) -> None:
    """Refuse a budget of `size` tokens that no prompt's static set fits into; prompts fill most of the context."""
    least = min(sum(policy.static_tokens(length)) for length in (context, context // 2))
    if size < least:
        raise KVBenchError(
            f"The budget of {size} tokens per layer is smaller than the policy's static set of {least} tokens: raise "
            "--tokens or --ratio, or lower the sinks and window options."
        )


def _plugins(request: Request, budget: Budget | None) -> dict[str, Identity]:
    """The code that a run's numbers depend on."""
    found = registry()
    named = {"policy": ("policy", request.policy), "task": ("task", request.task)}
    if budget is not None:
        named["budget"] = ("budget", budget.allocator)
    if request.probe_examples:
        named |= {f"probe {name}": ("probe", name) for name in (*STANDARD_PROBES, *_extra_probes(request))}
    return {role: found.identity(*chosen) for role, chosen in sorted(named.items())}


def _check_plugins(config: RunConfig) -> None:
    """Refuse to run a configuration that was planned with other code, on another machine or earlier."""
    names = {"policy": config.policy, "task": config.task}
    if config.budget is not None:
        names["budget"] = config.budget.allocator
    for role, planned in config.plugins.items():
        kind, _, probe = role.partition(" ")
        here = registry().identity(kind, probe or names[kind])
        if here != planned:
            raise KVBenchError(
                f"{role.capitalize()} {probe or names[kind]} is {here} here and was {planned} when this run was "
                "planned: install the same version wherever it runs, and plan it again."
            )


def _extra_probes(request: Request) -> tuple[str, ...]:
    """The probes asked for beyond the standard ones, checked to exist and to have examples to run on."""
    names = tuple(sorted({name for name in request.probes if name not in STANDARD_PROBES}))
    for name in names:
        registry().find("probe", name)
    if request.probes and not request.probe_examples:
        raise KVBenchError(f"Probe '{request.probes[0]}' has nothing to measure: give --probe-examples 1 or more.")
    return names


Failed = Callable[[RunConfig, Exception], None]
"""Is told of a run that failed, and how."""


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
        with _telling(failed, config):
            _check_plugins(config)
            runs.append(Run(output, config, environment_of(loaded) | bandwidths(loaded.device, config.decoding)))
    together: dict[str, list[Run]] = {}
    for run in runs:
        if run.status == "complete":
            progress(run.config.policy, len(run.rows), len(run.rows), "reused")
        else:
            together.setdefault(_alike(run.config), []).append(run)
    proofs = _prove([run for group in together.values() for run in group], loaded, progress, failed, check_anew)
    with quick_release():
        for group in together.values():
            proven = [run for run in group if run.config.hash in proofs]
            if proven:
                _execute(proven, loaded, progress, proofs, failed)
    return [run for run in runs if run.status == "complete"]


def _alike(config: RunConfig) -> str:
    """The same for configurations that share prompts and differ in policy and budget alone."""
    own: dict[str, Any] = {"policy": "", "policy_options": {}, "budget": None, "plugins": {}, "dense_layers": 0}
    return config.model_copy(update=own).hash if config.share_prefill else config.hash


def _prove(
    runs: Sequence[Run], loaded: LoadedModel, progress: Progress, failed: Failed | None, anew: bool
) -> dict[str, list[Report]]:
    """Check the model and each run's policy, where that has not been done; the findings by a run's hash."""
    conformance, found = checker(loaded, anew=anew), {}
    for run in runs:
        with _telling(failed, run.config):
            progress(run.config.policy, len(run.rows), run.config.examples, "conformance check")
            policy = registry().make("policy", run.config.policy, run.config.policy_options)
            found[run.config.hash] = conformance.check(policy)
    return found


@contextmanager
def _telling(failed: Failed | None, config: RunConfig) -> Iterator[None]:
    """Tell `failed`, where there is one, of an error of the block instead of raising it."""
    try:
        yield
    except Exception as error:  # a plugin may raise anything
        if failed is None:
            raise
        failed(config, error)


def _execute(
    runs: list[Run], loaded: LoadedModel, progress: Progress, proofs: Mapping[str, Sequence[Report]],
    failed: Failed | None,
) -> None:  # fmt: skip
    """Run configurations that differ in their policies and budgets alone, example by example."""
    shared = runs[0].config
    with ExitStack() as folders:
        group = _Group(failed)
        for run in runs:
            with group.alone(run):
                run.conformance = [report.document() for report in proofs[run.config.hash]]
                group.open(run, folders)
                for report in proofs[run.config.hash]:
                    report.require()
                progress(run.config.policy, len(run.rows), run.config.examples, "")
        if any(len(run.rows) < run.config.examples for run in group.runs):
            prompts: dict[int, Prefill] = {}
            for run in group.runs:
                with group.alone(run):
                    _warm_up(run.config, loaded, prompts)
            prompts.clear()
        with group.together():
            task: AnyTask = registry().make("task", shared.task, shared.task_options)
            before: Prefill | None = None
            for batch in _batches(_examples(task, shared, loaded), shared, loaded):
                ids = {example.id for example in batch}
                missing = [run for run in group.runs if not ids <= {row["id"] for row in run.rows}]
                prompt = SharedPrompt(batch, missing, loaded, before) if missing and shared.share_prefill else None
                for run in missing if prompt is None else prompt.order:
                    with group.alone(run):
                        _extend(run, loaded, task, batch, prompt)
                        progress(run.config.policy, len(run.rows), run.config.examples, "")
                before = None if prompt is None else prompt.latest
                if not group.runs:
                    break
        for run in group.runs:
            with group.alone(run):
                group.close(run)


class _Group:
    """Runs that go over a task's examples together, each with its open folder; one that fails leaves the group."""

    def __init__(self, failed: Failed | None) -> None:
        self._failed = failed
        self._folders: dict[str, ExitStack] = {}
        self._runs: dict[str, Run] = {}

    @property
    def runs(self) -> list[Run]:
        """Those that have not failed."""
        return list(self._runs.values())

    def open(self, run: Run, folders: ExitStack) -> None:
        """Open a run's folder for writing, until the run is closed or fails, or `folders` ends."""
        self._runs[run.config.hash] = run
        folder = self._folders[run.config.hash] = folders.enter_context(ExitStack())
        folder.enter_context(run.writing())

    def close(self, run: Run) -> None:
        """Finish a run."""
        self._folders.pop(run.config.hash).close()

    @contextmanager
    def alone(self, run: Run) -> Iterator[None]:
        """Let an error of the block end this run only."""
        with _telling(self._failed, run.config):
            try:
                yield
            except Exception as error:
                del self._runs[run.config.hash]
                folder = self._folders.pop(run.config.hash, None)
                if folder is not None:
                    folder.__exit__(type(error), error, error.__traceback__)
                raise

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error of the block, which is no single run's, end all that are left."""
        try:
            yield
        except Exception as error:
            if self._failed is None:
                raise
            for run in self.runs:
                with self.alone(run):
                    raise error from None


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
            if is_probed(run):
                row |= _probe(run, loaded, task, example, answer, shared)  # noqa: PLW2901
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
        with task_errors(task, f"the score of example {example.id}"):
            score = task.score(prediction, example)
        return {"score": checked_score(task, example.id, score), "references": list(example.references)}
    assert isinstance(task, ForcedTask) and isinstance(result, Forced)
    targets = list(example.input_ids[example.prompt_tokens + 1 :])
    exact = _exact(config, loaded, example)
    with task_errors(task, f"the score of example {example.id}"):
        scores = task.score(result.logits, exact, torch.tensor(targets, device=result.logits.device))
        values = {name: checked_score(task, example.id, value, name) for name, value in scores.values.items()}
        main = values[task.main]
    return {
        "score": main,
        "scores": values,
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
    policy = registry().make("policy", config.policy, config.policy_options)
    layers = chosen_layers(loaded.model, policy, config.dense_layers) if policy.cached else []
    governed = token_bytes(loaded.model, layers)
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
            "budget_tokens": config.budget and config.budget.size(prompt_tokens(config, prompt), governed),
            "token_bytes": token_bytes(loaded.model),
            "generated_tokens": len(result.tokens),
            "prefill_s": result.prefill_s,
            "index_s": result.index_s,
            **step_row(result, loaded.device),
            "bytes": result.bytes,
            "peak_memory_bytes": peak.bytes if prefilled is None else None,
            "info": {**example.info, **(_PREFIX_LEFT_OUT if prompt.prefix_left_out else {})},
        }
        if prefilled is not None:
            row["reused_tokens"] = prefilled.reused
        yield example, row, result.tokens


def _probe(
    run: Run, loaded: LoadedModel, task: AnyTask, example: AnyExample, answer: list[int], shared: SharedPrompt | None
) -> dict[str, Any]:
    """Generate an example once more with probes, and once more for each that needs a generation of its own."""
    # Probes wrap hooks, and what a captured step answers may differ from them by rounding.
    config, prompt = run.config.model_copy(update={"decoding": "eager"}), prompt_of(loaded, example)
    passes = probe_passes(config)
    probes = [probe for group in passes for probe in group]
    step_s: list[float] = []
    for group in passes:
        prefilled = None if shared is None else shared.probed(config)
        (again,) = _generate(config, loaded, [example], group, shared, prefilled)
        if again.tokens != answer and can_be_fixed(loaded.device, run.config.decoding):
            (undisturbed,) = _generate(config, loaded, [example], [], shared, prefilled)
            answer = undisturbed.tokens
        if again.tokens != answer:
            raise KVBenchError(
                f"Policy '{config.policy}' answered example {example.id} differently when it was measured by probes: "
                "its results cannot be trusted. A policy must keep its state on the layer and be deterministic."
            )
        step_s = step_s or again.step_s
    measured: dict[str, Any] = {
        "probes": probed_values(probes, reserved=getattr(task, "metrics", ())),
        "probed_step_s": step_s,
    }
    trace = probed_trace(probes)
    if trace:
        taken = {row.get("trace") for row in run.rows}
        name = next(name for name in (f"traces/{number:06d}.safetensors" for number in count()) if name not in taken)
        write_trace(run.path / name, trace, example=example.id, prompt_tokens=len(prompt.input_ids))
        measured["trace"] = name
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
            decoding=config.decoding,
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


def stop_tokens(loaded: LoadedModel) -> set[int]:
    """Token ids that end an answer."""
    ends = loaded.model.generation_config.eos_token_id
    found = {ends} if isinstance(ends, int) else set(ends or ())
    if loaded.tokenizer.eos_token_id is not None:
        found.add(int(loaded.tokenizer.eos_token_id))
    return found
