"""Measures a task's examples: the answer undisturbed, its score, and the answer again with probes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch

from kvbench.contract.errors import KVBenchError
from kvbench.contract.probe import Probe
from kvbench.contract.task import Example, ForcedTask, Prompt, TokenExample
from kvbench.engine.generation import Forced, Generation, exact_logits, force, generate_batch
from kvbench.engine.governor import chosen_layers
from kvbench.engine.prefill import PromptRecorder
from kvbench.engine.prompt import Prefill
from kvbench.engine.survey import token_bytes
from kvbench.models import LoadedModel, check_context
from kvbench.plugins import registry
from kvbench.runs.excerpts import excerpt
from kvbench.runs.measured import checked_measures, checked_score, probed_trace, probed_values, task_errors
from kvbench.runs.memory import PeakMemory, gpus_of, release
from kvbench.runs.planning import AnyTask
from kvbench.runs.prefixed import forget, generate_prefixed, recall_around
from kvbench.runs.results import Run, RunConfig
from kvbench.runs.sharing import SharedPrompt, is_probed, probe_passes, prompt_of, prompt_tokens, session_of
from kvbench.runs.timing import can_be_fixed, step_row
from kvbench.runs.traces import write_trace


class OneByOne(Probe):
    """Measures nothing; with it new tokens go through a policy one by one, as with any probe that takes them so."""

    name, summary = "one_by_one", "Measures nothing."


EXACT_BYTES = 2**30
"""Most memory for the exact logits of earlier examples."""
_PREFIX_LEFT_OUT = {"prefix_left_out": "the chat template opens a thinking block"}
"""In an example's `info` where that is so."""
AnyExample = Example | TokenExample


def extend(run: Run, loaded: LoadedModel, task: AnyTask, batch: list[AnyExample], prompt: SharedPrompt | None) -> None:
    """Add a batch's examples to a run; those that a stopped run had finished keep what they have."""
    config, there = run.config, {row["id"] for row in run.rows}
    single = not registry().find("policy", config.policy).batched
    for part in [[example] for example in batch] if single else [batch]:
        if all(example.id in there for example in part):
            continue
        shared = prompt if len(part) == len(batch) else None
        for example, row, answer in _measure(run, loaded, task, part, shared):
            if example.id in there:
                continue
            if is_probed(run):
                row |= _probe(run, loaded, task, example, answer, shared)  # noqa: PLW2901
            run.append(row)
    if config.prefix == "cached" and len(run.rows) == config.examples:
        forget(run)


def examples_of(task: AnyTask, config: RunConfig, loaded: LoadedModel) -> Iterator[AnyExample]:
    """The examples of a run, as its task makes them."""
    yield from task.examples(
        loaded.tokenizer, context_length=config.context_length, count=config.examples, seed=config.seed
    )


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
            score, measures = task.score(prediction, example), task.measures(prediction, example)
        values = checked_measures(task, example.id, measures)
        return {
            "score": checked_score(task, example.id, score),
            **({"scores": values} if values else {}),
            "references": list(example.references),
        }
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
    prompt, chunk = example.prompt_tokens, config.chunk
    key = (loaded.fingerprint, config.dtype, config.device, chunk, prompt, example.input_ids)
    if key not in _EXACT:
        _EXACT[key] = exact_logits(loaded.model, example.input_ids, prompt_tokens=prompt, prefill_chunk=chunk)
        while len(_EXACT) > 1 and sum(logits.nbytes for logits in _EXACT.values()) > EXACT_BYTES:
            _EXACT.popitem(last=False)
    return _EXACT[key]


def _measure(
    run: Run, loaded: LoadedModel, task: AnyTask, batch: list[AnyExample], shared: SharedPrompt | None
) -> Iterator[tuple[AnyExample, dict[str, Any], list[int]]]:
    """Generate a batch's answers, or predict given tokens, undisturbed; each example's row, and the answer's tokens."""
    config, prompts = run.working, [prompt_of(loaded, example) for example in batch]
    for example, prompt in zip(batch, prompts, strict=True):
        check_context(loaded, _longest(example, prompt))
    policy = registry().make("policy", config.policy, config.policy_options)
    layers = chosen_layers(loaded.model, policy, config.dense_layers) if policy.cached else []
    governed = token_bytes(loaded.model, layers)
    prefilled = recorder = None
    if shared is not None and shared.is_own(run.config):
        recorder = shared.recorder(run.config)
    elif shared is not None:
        prefilled = shared.prefill()
    release()
    peaks: dict[str, int] = {}
    if config.prefix == "cached":
        (first,) = batch
        assert isinstance(first, Example)
        prefixed = generate_prefixed(run, loaded, first, stop_tokens(loaded))
        results, most = [prefixed.hit], prefixed.peak
    else:
        with PeakMemory(loaded.device, gpus_of(loaded)) as peak:
            prefixed, results = None, _generate(config, loaded, batch, [], shared, prefilled, recorder)
        most, peaks = peak.bytes, peak.by_device
    if shared is not None and recorder is not None:
        shared.take(recorder)
    for example, prompt, result in zip(batch, prompts, results, strict=True):
        prediction = loaded.tokenizer.decode(result.tokens, skip_special_tokens=True)
        row: dict[str, Any] = {
            "id": example.id,
            **_scored(config, loaded, task, example, prediction, result),
            "prediction": prediction,
            "prompt": excerpt(example, loaded.tokenizer),
            "prompt_tokens": len(prompt.input_ids),
            "budget_tokens": config.budget and config.budget.size(prompt_tokens(config, prompt), governed),
            "token_bytes": token_bytes(loaded.model),
            "generated_tokens": len(result.tokens),
            "prefill_s": result.prefill_s,
            "index_s": result.index_s,
            **step_row(result, loaded.device),
            "bytes": result.bytes,
            **({"answer_bytes": result.answer_bytes} if result.answer_bytes else {}),
            **({"held_tokens": result.held_tokens} if result.held_tokens else {}),
            **({"device_bytes": result.device_bytes} if result.device_bytes else {}),
            **({"device_peak_bytes": peaks} if peaks and prefilled is None else {}),
            "peak_memory_bytes": most if prefilled is None else None,
            **_sizes(run, len(batch), len(prompt.input_ids)),
            "info": {**example.info, **(_PREFIX_LEFT_OUT if prompt.prefix_left_out else {})},
        }
        if prefilled is not None:
            row["reused_tokens"] = prefilled.reused
        if prefixed is not None:
            other = loaded.tokenizer.decode(prefixed.miss.tokens, skip_special_tokens=True)
            row |= prefixed.measured
            row["miss_score"] = _scored(config, loaded, task, example, other, prefixed.miss)["score"]
            row["prefill_s"] = row["load_s"] + row["extend_s"]
        yield example, row, result.tokens


def _sizes(run: Run, rows: int, tokens: int) -> dict[str, int]:
    """What an example's row states of sizes that memory decided: batch and chunk, and how often it ran out before."""
    return {
        **({"batch": rows} if run.config.in_batches else {}),
        **({"prefill_chunk": run.chunk or tokens} if run.config.prefill_chunk == "auto" else {}),
        **({"out_of_memory": run.shortages} if run.shortages else {}),
    }


def _probe(
    run: Run, loaded: LoadedModel, task: AnyTask, example: AnyExample, answer: list[int], shared: SharedPrompt | None
) -> dict[str, Any]:
    """Generate an example once more with probes, and once more for each that needs a generation of its own."""
    # Probes wrap hooks, and what a captured step answers may differ from them by rounding.
    config, prompt = run.working.model_copy(update={"decoding": "eager"}), prompt_of(loaded, example)
    most = None if config.probe_tokens == "all" else config.probe_tokens
    passes = probe_passes(config)
    probes = [probe for group in passes for probe in group]
    step_s: list[float] = []
    if isinstance(example, Example):
        answer = answer[:most]
    for group in passes:
        prefilled = None if shared is None else shared.probed(config)
        (again,) = _generate(config, loaded, [example], group, shared, prefilled, most=most)
        followed = config.question == "agnostic" or config.prefix == "cached"
        if again.tokens != answer and (followed or can_be_fixed(loaded.device, run.config.decoding)):
            # A block of new tokens differs from its tokens one by one by rounding, as a captured step does.
            (undisturbed,) = _generate(config, loaded, [example], [OneByOne()], shared, prefilled, most=most)
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
    if config.prefix == "cached":
        measured |= recall_around(trace, prompt_tokens(config, prompt), len(prompt.input_ids))
    return measured


def _generate(
    config: RunConfig, loaded: LoadedModel, batch: list[AnyExample], probes: list[Probe], shared: SharedPrompt | None,
    prefilled: Prefill | None = None, recorder: PromptRecorder | None = None, *,
    most: int | None = None,
) -> list[Generation]:  # fmt: skip
    """A batch's answers, the first `most` tokens of them, or predictions of given tokens, which are always all."""
    prompts = [prompt_of(loaded, example) for example in batch]
    session = session_of(config, loaded, probes if recorder is None else [*probes, recorder])
    torch.manual_seed(config.seed)  # a policy that samples gives an example the same answer in whatever order they run
    with session:
        if isinstance(batch[0], TokenExample):
            given = batch[0]
            read, chunk = len(prompts[0].input_ids), config.chunk
            return [force(session, given.input_ids, prompt_tokens=read, prefill_chunk=chunk)]
        return generate_batch(
            session, [prompt.input_ids for prompt in prompts],
            prompt_tokens=(
                prompt_tokens(config, prompts[0])
                if config.question == "agnostic" or config.prefix == "cached"
                else None
            ),
            max_new_tokens=[
                example.max_new_tokens if most is None else min(example.max_new_tokens, most)
                for example in batch
                if isinstance(example, Example)
            ],
            stop=stop_tokens(loaded), prefill_chunk=config.chunk, prefilled=prefilled,
            border=None if shared is None else shared.border, recorder=recorder,
            decoding=config.decoding,
        )  # fmt: skip


def stop_tokens(loaded: LoadedModel) -> set[int]:
    """Token ids that end an answer."""
    ends = loaded.model.generation_config.eos_token_id
    found = {ends} if isinstance(ends, int) else set(ends or ())
    if loaded.tokenizer.eos_token_id is not None:
        found.add(int(loaded.tokenizer.eos_token_id))
    return found
