"""A run's metrics, made of its examples."""

from __future__ import annotations

import math
from typing import Any

from kvbench.runs.prefix_costs import prefix_metrics
from kvbench.runs.timing import step_metrics
from kvbench.statistics import confidence_interval, mean_interval, percentiles

BEYOND = "tokens_beyond_budget"
"""Name under which the density probe says how far a step went beyond what its budget and its policy allow."""


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of a run from its examples; None where nothing was measured."""
    scores = [row["score"] for row in rows]
    low, high = confidence_interval(scores)
    steps = [step for row in rows for step in row["step_s"]]
    p50, p95 = percentiles(steps, 50, 95)
    fresh = [row for row in rows if not row.get("reused_tokens")]
    prefill, index = _mean([row["prefill_s"] for row in fresh]), _mean([row["index_s"] for row in fresh])
    peaks = [row["peak_memory_bytes"] for row in rows if row["peak_memory_bytes"] is not None]
    probed = [row["probes"] for row in rows if row.get("probes")]
    names = sorted({name for probes in probed for name in probes})
    measured = {name: _mean([p[name] for p in probed if p.get(name) is not None]) for name in names}
    named = sorted({name for row in rows for name in row.get("scores", {})})
    values = {name: [row["scores"][name] for row in rows if name in row.get("scores", {})] for name in named}
    return {
        **{name: _summary(found) for name, found in values.items()},
        "accuracy": {"mean": _mean(scores), "ci95": [_number(low), _number(high)], "n": len(scores)},
        "recall_at_k": measured.pop("recall_at_k", None),
        "recovered_mass": measured.pop("recovered_mass", None),
        "density": measured.pop("density", None),
        "bytes": {tier: _mean([row["bytes"][tier] for row in rows]) for tier in ("resident", "offloaded", "index")},
        "answer_bytes": _answer_bytes(rows),
        "ttft_s": {
            "prefill": prefill,
            "index": index,
            "total": None if prefill is None or index is None else prefill + index,
        },
        "tpot_s": {"p50": _number(p50), "p95": _number(p95)},
        **step_metrics(rows),
        **prefix_metrics(rows),
        **_sizes(rows),
        "peak_memory_bytes": max(peaks, default=None),
        "context_tokens": _mean([row["prompt_tokens"] for row in rows]),
        "generated_tokens": _mean([row["generated_tokens"] for row in rows]),
        "probed_examples": len(probed),
        "truncated_examples": sum("truncated_tokens" in row.get("info", {}) for row in rows),
        "prefix_left_out_examples": sum("prefix_left_out" in row.get("info", {}) for row in rows),
        "probe_overhead": _probe_overhead(rows),
        "budget_tokens": _mean([row["budget_tokens"] for row in rows if row.get("budget_tokens")]),
        "attended_bytes": _product(measured.get("attended_tokens"), _mean([row.get("token_bytes", 0) for row in rows])),
        "over_budget": _over_budget(rows),
        **measured,
    }


def _answer_bytes(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The most bytes held after any step, in the worst example, and their mean over each answer's steps."""
    found = [row["answer_bytes"] for row in rows if row.get("answer_bytes")]
    return {
        "peak": max((one["peak"] for one in found), default=None),
        "mean": _mean([one["mean"] for one in found]),
    }


def _sizes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sizes that memory decided and bytes by device; nothing of what no example states."""
    found: dict[str, Any] = {}
    for name in ("batch", "prefill_chunk"):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            found[name] = {"smallest": min(values), "largest": max(values)}
    if short := max((row.get("out_of_memory", 0) for row in rows), default=0):
        found["out_of_memory"] = short
    for name, merge in (("device_bytes", _mean), ("device_peak_bytes", max)):
        parts = [row[name] for row in rows if row.get(name)]
        if parts:
            places = sorted({place for part in parts for place in part})
            found[name] = {place: merge([part.get(place, 0) for part in parts]) for place in places}
    return found


def _over_budget(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """Tokens asked for and attended to at the step that went farthest beyond what was allowed; None where none did."""
    probed = [row for row in rows if row.get("budget_tokens") and (row.get("probes") or {}).get(BEYOND)]
    if not probed:
        return None
    worst = max(probed, key=lambda row: float(row["probes"][BEYOND]))
    attended = worst["probes"]["most_attended_tokens"]
    return {"asked": worst["budget_tokens"], "allowed": attended - worst["probes"][BEYOND], "attended": attended}


def over_budget_text(metrics: dict[str, Any]) -> str:
    """How a run went over its budget, in words; empty where it did not, or nobody measured it."""
    over = metrics.get("over_budget")
    return f"over budget: asked {over['asked']:.0f} tokens, attended {over['attended']:.0f}" if over else ""


def _probe_overhead(rows: list[dict[str, Any]]) -> float | None:
    """What the probes add to a decoding step, as a share of the undisturbed step of the same examples (medians)."""
    both = [row for row in rows if row["step_s"] and row.get("probed_step_s")]
    if not both:
        return None
    (plain,) = percentiles([step for row in both for step in row["step_s"]], 50)
    (probed,) = percentiles([step for row in both for step in row["probed_step_s"]], 50)
    return probed / plain - 1


def _summary(values: list[float]) -> dict[str, Any]:
    low, high = mean_interval(values)
    return {"mean": _mean(values), "ci95": [_number(low), _number(high)], "n": len(values)}


def _product(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
