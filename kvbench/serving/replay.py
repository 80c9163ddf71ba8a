"""A request trace replayed: what each policy's requests would take with a store of saved prefixes and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from kvbench.contract.errors import KVBenchError
from kvbench.serving.costs import BASELINE, Costs
from kvbench.serving.queueing import waiting_times
from kvbench.serving.requests import BLOCK, Request, statistics
from kvbench.serving.stores import BlockStore, ContextStore, NoStore, Store

SIMULATION = (
    "A simulation: hits are those of the trace's own blocks in a least-recently-used store, service times are fitted "
    "to measurements, the queue is a discrete-event simulation (simpy). A server has one request at a time, first come "
    "first served, from its prompt to its last token and the saving of its context; a prompt is in the store as "
    "soon as it has arrived, and loading takes what it took when it was measured."
)
KEPT = {
    "nothing": "nothing is saved", "keys": "keys and values are saved, the index is built anew",
    "index": "contexts are saved with the policy's state and index",
}  # fmt: skip
"""What a store keeps, by the name in the results."""
REUSE = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)
"""Shares of a prompt that are in the store, for which times to first token are given."""
AIMED = 0.7
"""Share of the time that servers are busy which is advised where they cannot keep up."""


@dataclass(frozen=True)
class Served:
    """One policy with one kind of store, request by request: tokens hit and the seconds of service."""

    costs: Costs
    kept: str
    hits: list[int]
    held: list[int]
    """Bytes in the store after each request."""
    first_s: list[float]
    """To the first token, without waiting."""
    step_s: list[float]
    """Per output token."""
    busy_s: list[float]
    """The server is taken for so long."""


def serve(requests: Sequence[Request], costs: Costs, exact: Costs, kept: str, limit: int | None) -> Served:
    """What requests take of a policy; `exact` are full attention's costs, which saved keys and values are read with."""
    store: Store = NoStore()
    if kept == "keys":
        store = BlockStore(limit, round(BLOCK * costs.token_bytes))
    elif kept == "index":
        store = ContextStore(limit, lambda tokens: costs.of("state_bytes", tokens))
    hits, held, first_s, step_s, busy_s = [], [], [], [], []
    for request in requests:
        tokens = request.input_tokens
        hit = min(store.take(request), tokens - 1)  # a token has to be read for the next
        first = first_token(costs, exact, kept, hit, tokens)
        step = costs.of("step", tokens + request.output_tokens / 2)
        save = 0.0
        if kept == "keys":
            save = exact.of("save", tokens) - (exact.of("save", hit) if hit else 0.0)
        elif kept == "index" and hit // BLOCK < request.whole_blocks:
            save = costs.of("save", tokens)
        hits.append(hit)
        held.append(store.held)
        first_s.append(first)
        step_s.append(step)
        busy_s.append(first + max(request.output_tokens - 1, 0) * step + save)
    return Served(costs, kept, hits, held, first_s, step_s, busy_s)


def first_token(costs: Costs, exact: Costs, kept: str, hit: int, tokens: int) -> float:
    """Seconds of service to the first token of a prompt, of which `hit` tokens are in the store."""
    if not hit:
        return costs.anew(tokens)
    if kept == "keys":
        return exact.hit(hit, tokens - hit) + costs.of("index", tokens)
    return costs.hit(hit, tokens - hit)


def kinds(costs: Costs) -> tuple[str, ...]:
    """What stores are compared for a policy: exact attention has no index."""
    return ("nothing", "keys") if costs.label == BASELINE else ("nothing", "keys", "index")


def replay(
    requests: Sequence[Request], costs: Sequence[Costs], *, limit: int | None, servers: int = 1, speed: float = 1.0
) -> dict[str, Any]:
    """Replay requests over a store of `limit` bytes and give the results' document.

    `speed` makes the trace that many times faster. Raises KVBenchError for a store in which not even a block fits.
    """
    exact = next(one for one in costs if one.label == BASELINE)
    if limit is not None and limit < BLOCK * exact.token_bytes:
        raise KVBenchError(
            f"A store of {limit} bytes holds no block of {BLOCK} tokens, which take {round(BLOCK * exact.token_bytes)} "
            "bytes: give a larger --store."
        )
    arrivals = [one.at / speed for one in requests]
    rows = [
        _row(requests, serve(requests, one, exact, kept, limit), arrivals, servers)
        for one in costs
        for kept in kinds(one)
    ]
    longest = min(one.longest for one in costs)
    beyond = sum(one.input_tokens > longest for one in requests) / len(requests)
    notes = [SIMULATION]
    if beyond:
        notes.append(
            f"{100 * beyond:.0f}% of the prompts are longer than the longest that was measured ({longest} tokens): "
            "their times are extrapolated."
        )
    worst = max(row["busy_share"] for row in rows)
    if worst >= 1:
        notes.append(
            f"The servers cannot keep up (busiest: {worst:.3g} of the time), so that waiting grows with the trace's "
            f"length: with --speed {speed * AIMED / worst:.2g} the busiest would be so {100 * AIMED:.0f}% of the time."
        )
    return {
        "schema": 1, "trace": statistics(list(requests)), "store_bytes": limit, "servers": servers, "speed": speed,
        "block_tokens": BLOCK, "rows": rows, "break_even": [_break_even(requests, one, exact, limit) for one in costs],
        "reuse": _reuse(requests, costs, exact),
        "fits": {one.label: {name: fit.document() for name, fit in one.fits.items()} for one in costs}, "notes": notes,
    }  # fmt: skip


def _row(requests: Sequence[Request], served: Served, arrivals: Sequence[float], servers: int) -> dict[str, Any]:
    waited = waiting_times(arrivals, served.busy_s, servers)
    ttft = [wait + first for wait, first in zip(waited, served.first_s, strict=True)]
    tpot = [step for step, one in zip(served.step_s, requests, strict=True) if one.output_tokens > 1]
    hit = [tokens for tokens in served.hits if tokens]
    blocks = sum(len(one.blocks) for one in requests)
    span = max(arrivals[-1] - arrivals[0], 1e-9)
    held = fmean(served.held)
    return {
        "policy": served.costs.label, "kept": served.kept,
        "requests_hit": len(hit) / len(requests),
        "block_hit_ratio": sum(-(-tokens // BLOCK) for tokens in hit) / max(blocks, 1),
        "token_hit_ratio": sum(hit) / sum(one.input_tokens for one in requests),
        "ttft_s": _quantiles(ttft), "ttft_service_s": _quantiles(served.first_s), "wait_s": _quantiles(waited),
        "tpot_s": _quantiles(tpot), "busy_share": sum(served.busy_s) / servers / span,
        "mean_bytes": held, "peak_bytes": max(served.held), "bytes_per_hit": held / len(hit) if hit else None,
    }  # fmt: skip


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "p50": None, "p90": None, "p99": None}
    p50, p90, p99 = np.percentile(np.asarray(values), [50, 90, 99])
    return {"mean": fmean(values), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def _break_even(requests: Sequence[Request], costs: Costs, exact: Costs, limit: int | None) -> dict[str, Any]:
    """How many hits a saved index needs until it pays, on the mean of the requests that hit one.

    Against exact attention with saved keys and values, and against the same policy with its index built at every hit.
    """
    found = {"policy": costs.label, "hits_against_full": None, "hits_against_rebuilding": None}
    if costs.label == BASELINE:
        return found
    hits = serve(requests, costs, exact, "index", limit).hits
    pairs = [(hit, one) for hit, one in zip(hits, requests, strict=True) if hit]
    if not pairs:
        return found
    against_full, rebuilding, once, again = [], [], [], []
    for hit, one in pairs:
        tokens, new, steps = one.input_tokens, one.input_tokens - hit, max(one.output_tokens - 1, 0)
        end = tokens + one.output_tokens / 2
        faster = steps * (exact.of("step", end) - costs.of("step", end))
        saved = costs.hit(hit, new)
        saving = costs.of("save", hit) - exact.of("save", hit)
        against_full.append(exact.hit(hit, new) - saved + faster)
        once.append(costs.of("index", hit) + saving - faster)  # the first request decodes by the index, too
        rebuilding.append(exact.hit(hit, new) + costs.of("index", tokens) - saved)
        again.append(saving)
    return {
        "policy": costs.label, "hits_against_full": _hits(fmean(once), fmean(against_full)),
        "hits_against_rebuilding": _hits(fmean(again), fmean(rebuilding)),
        "gained_by_a_hit_s": {"against_full": fmean(against_full), "against_rebuilding": fmean(rebuilding)},
        "paid_once_s": {"against_full": fmean(once), "against_rebuilding": fmean(again)},
    }  # fmt: skip


def _hits(once: float, gained: float) -> float | None:
    """Hits after which what is paid once has come back; None where it never does."""
    if gained <= 0:
        return None
    return max(once, 0.0) / gained


def _reuse(requests: Sequence[Request], costs: Sequence[Costs], exact: Costs) -> list[dict[str, Any]]:
    """Times to first token of the trace's mean prompt, by the share of it that is in the store."""
    tokens = round(fmean(one.input_tokens for one in requests))
    return [
        {"policy": one.label, "kept": kept, "tokens": tokens, "share": share,
         "ttft_service_s": first_token(one, exact, kept, round(share * tokens), tokens)}
        for one in costs for kept in kinds(one)[1:] for share in REUSE
    ]  # fmt: skip
