"""Proves of a model that policy `full`, and a selection and an eviction of everything, are plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.engine.conformance.covering import Covering
from kvbench.engine.conformance.report import Check
from kvbench.engine.conformance.trial import STEPS, Ends, Trial, centred, clause, full
from kvbench.engine.conformance.watch import ConformanceError, Watch, distance, first_difference
from kvbench.engine.survey import survey

PROMPT = 10
"""Tokens of the prompt."""
WHOLE, CHUNKS = (0, STEPS - 1), (0, 1)
"""Where forward calls end: after the prompt in one call eight tokens in one call, after it in two calls a single step.

A policy sees every token as a step of its own. In a call of one token a model reads all its weights, which on a CPU
takes as long as a call of several; calls of 2, 16 or 20 rows of numbers are the cheapest there.
"""
NOISE = 8
"""How many times the model's own rounding a difference may be."""


def model_checks(trial: Trial) -> Iterator[Check]:
    """Check a model; `trial` then knows whether it takes padding and how far rounding may go."""
    ids, mask = trial.tokens(PROMPT)
    plain: dict[Ends, Tensor] = {}
    try:
        plain[WHOLE] = trial.logits(ids, mask, WHOLE)
    except Exception as error:
        clause(error)
        trial.padding = False
    kept = mask if trial.padding else None
    try:
        if kept is None:
            plain[WHOLE] = trial.logits(ids, None, WHOLE)
        plain[CHUNKS] = trial.logits(ids, kept, CHUNKS, chunked=True)
    except Exception as error:
        if not plain:
            yield Check("transformers", "failed", f"plain transformers cannot run it ({clause(error)})")
            return
        yield Check("transformers in chunks", "skipped", f"it takes no prompt in chunks ({clause(error)})")
    if not all(bool(torch.isfinite(logits).all()) for logits in plain.values()):
        short = str(trial.dtype).removeprefix("torch.")
        yield Check("transformers", "failed", f"plain transformers gives logits that are NaN or infinite in {short}; "
                    "load it in another dtype")  # fmt: skip
        return
    trial.tolerance = _tolerance(trial, plain)
    sound = True
    for ends, logits in plain.items():
        check = _full(trial, ids, kept, ends, logits)
        sound = sound and check.status == "passed"
        yield check
    for ends, logits in plain.items() if sound else ():
        yield _covering(trial, ids, kept, ends, logits)


def _tolerance(trial: Trial, plain: dict[Ends, Tensor]) -> float:
    """Eight times what rounding alone does, at least 2^-14 and sixteen units of the dtype's rounding.

    The prompt in one call and in two gives plain transformers the same sums in another order: that difference is
    what rounding does on this model, device and dtype. A policy's attention merges parts in float32 where plain
    attention rounds weights and outputs to the dtype, so it may be further off. Where the difference is larger than
    the root of the unit it is no rounding: a model that forgets between chunks.
    """
    unit = torch.finfo(trial.dtype).eps
    least = max(16 * unit, 2.0**-14)
    noise = distance(centred(plain[CHUNKS][0]), centred(plain[WHOLE][0])) if CHUNKS in plain else 0.0
    return max(NOISE * noise, least) if noise < unit**0.5 else least


def _full(trial: Trial, ids: Tensor, mask: Tensor | None, ends: Ends, plain: Tensor) -> Check:
    name, chunked = "full" + _in_chunks(ends), ends == CHUNKS
    try:
        with trial.session(full()):
            logits = trial.logits(ids, mask, ends, chunked=chunked)
    except Exception as error:
        return Check(name, "failed", clause(error))
    exact = trial.device.type == "cpu" and trial.dtype == torch.float32
    check = trial.compare(name, logits, plain, ends, 0.0 if exact else None)
    if check.status == "passed":
        return check
    return replace(check, detail=f"policy 'full': {check.detail}{_differing_layer(trial, ids, mask, ends)}")


def _differing_layer(trial: Trial, ids: Tensor, mask: Tensor | None, ends: Ends) -> str:
    """The first layer whose output under `full` is not plain transformers', in words."""
    plain: list[tuple[Tensor, ...]] = []
    ours: list[tuple[Tensor, ...]] = []
    trial.logits(ids, mask, ends, chunked=ends == CHUNKS, hidden=plain)
    with trial.session(full()):
        trial.logits(ids, mask, ends, chunked=ends == CHUNKS, hidden=ours)
    for mine, theirs in zip(ours, plain, strict=True):
        for number, (one, other) in enumerate(zip(mine[1:], theirs[1:], strict=True)):
            if not torch.equal(one[:, -1], other[:, -1]):
                error = distance(one[:, -1], other[:, -1])
                return f"; first in the output of layer {number}, by {error:.2g} of it"
    return "; the layers' outputs are equal"


def _covering(trial: Trial, ids: Tensor, mask: Tensor | None, ends: Ends, plain: Tensor) -> Check:
    name, chunked = "covering selection and eviction" + _in_chunks(ends), ends == CHUNKS
    if (refusal := survey(trial.model).refusal) is not None:
        return Check(name, "skipped", f"only policy 'full' runs on it: {refusal}")
    policy = Covering(evicting=int(chunked))
    try:
        with trial.session(policy, Watch(policy, covering=True)):
            logits = trial.logits(ids, mask, ends, chunked=chunked)
    except ConformanceError as fault:
        return Check(name, "failed", str(fault))
    except KVBenchError as error:
        return Check(name, "skipped", f"only policy 'full' runs on it: {clause(error)}")
    except Exception as error:
        return Check(name, "failed", clause(error))
    check = trial.compare(name, logits, plain, ends)
    if check.status == "passed":
        return check
    covering, exact = Watch(Covering(policy.evicting), covering=True), Watch(full(), covering=False)
    for watch in (covering, exact):
        with trial.session(watch.policy, watch):
            trial.logits(ids, mask, tuple(range(STEPS)), chunked=chunked)  # step by step, to name the first
    where = first_difference(covering, exact, trial.tolerance)
    return replace(check, detail=f"{check.detail}; {where}" if where else check.detail)


def _in_chunks(ends: Ends) -> str:
    return ", prompt in two chunks" if ends == CHUNKS else ""
