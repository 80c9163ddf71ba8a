"""Examples whose context was read and saved before: what a request takes that hits it, and one that misses it."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from typing import Any

import torch

from kvbench.contract.probe import StepTrace
from kvbench.contract.task import Example
from kvbench.engine.generation import Generation, generate_batch
from kvbench.engine.prefixes import PrefixStore
from kvbench.models import LoadedModel
from kvbench.runs.memory import PeakMemory, release
from kvbench.runs.results import Run
from kvbench.runs.sharing import prompt_of, prompt_tokens, session_of

NEAR = 16
"""Steps right after the prefix, before whose tokens hardly any was inserted, that `recall_before` is the mean of."""


@dataclass(frozen=True)
class Prefixed:
    """An example's two requests: `hit` went on from the saved prefix, `miss` read the whole prompt anew.

    `peak` are the bytes of memory at the hit's peak; `measured` the values that the example's row has of both requests,
    beside the answers'.
    """

    hit: Generation
    miss: Generation
    peak: float | None
    measured: dict[str, Any]


def generate_prefixed(run: Run, loaded: LoadedModel, example: Example, stop: set[int]) -> Prefixed:
    """Answer an example with its prefix from a store, which reads and saves it first where it is new, and without."""
    try:
        return _generate(run, loaded, example, stop)
    except BaseException:
        forget(run)
        raise


def _generate(run: Run, loaded: LoadedModel, example: Example, stop: set[int]) -> Prefixed:
    config, prompt = run.working, prompt_of(loaded, example)
    border, ids = prompt_tokens(config, prompt), torch.tensor([prompt.input_ids], device=loaded.device)
    store = PrefixStore(run.path / "prefix")
    measured: dict[str, Any] = {"prefix_tokens": border, "new_tokens": len(prompt.input_ids) - border}
    common: dict[str, Any] = {"prefill_chunk": config.chunk}
    with session_of(config, loaded) as session:
        known = store.find(session, ids[:, : border + 1])
        timed = any("construct_prefill_s" in row for row in run.rows)
        if known is None or known.tokens != border or not timed:
            torch.manual_seed(config.seed)
            (made,) = generate_batch(session, [prompt.input_ids[:border]], max_new_tokens=[0], **common)
            for old in store.prefixes():
                old.path.unlink()
            began = session.now()
            saved = store.save(session)
            measured |= {
                "construct_prefill_s": made.prefill_s, "construct_index_s": made.index_s,
                "save_s": session.now() - began, "state_bytes": saved.bytes,
            }  # fmt: skip
    common |= {
        "max_new_tokens": [example.max_new_tokens], "stop": stop, "prefill_chunk": config.chunk,
        "decoding": config.decoding,
    }  # fmt: skip
    release()
    with PeakMemory(loaded.device) as peak, session_of(config, loaded) as session:
        torch.manual_seed(config.seed)
        began = session.now()
        found = store.load(session, ids)
        measured["load_s"] = session.now() - began
        assert found.tokens == border, "a prefix that is not this example's"
        (hit,) = generate_batch(session, [prompt.input_ids], begun=True, **common)
        query_aware = session.query_aware
    release()
    with session_of(config, loaded) as session:
        torch.manual_seed(config.seed)
        (miss,) = generate_batch(session, [prompt.input_ids], **common)
    measured |= {"extend_s": hit.prefill_s, "miss_prefill_s": miss.prefill_s, "miss_index_s": miss.index_s}
    if query_aware:
        measured["query_aware"] = query_aware
    return Prefixed(hit, miss, peak.bytes, measured)


def forget(run: Run) -> None:
    """Remove a run's prefixes."""
    shutil.rmtree(run.path / "prefix", ignore_errors=True)


def recall_around(trace: StepTrace, prefix: int, prompt: int) -> dict[str, float]:
    """Mean recall@k of the first steps after the prefix, and of those after the whole prompt, new tokens inserted."""
    steps = trace.get("recall_at_k", {})
    found = {}
    for name, first, last in (("recall_before", prefix, prefix + NEAR), ("recall_after", prompt, None)):
        values = [
            value
            for (tokens, _), heads in steps.items()
            if tokens > first and (last is None or tokens <= last)
            for value in heads
            if not math.isnan(value)
        ]
        if values:
            found[name] = sum(values) / len(values)
    return found
