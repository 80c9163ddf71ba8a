"""What cached prefixes cost and gain, made of a run's examples."""

from __future__ import annotations

from typing import Any

REQUESTS = (1, 2, 4, 16, 64, 256)
"""Numbers of requests that one construction is shared out over."""


def prefix_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Times to first token with a hit and without, and what one construction costs shared out over requests."""
    mine = [row for row in rows if "load_s" in row]
    if not mine:
        return {}
    load, extend = _mean(mine, "load_s"), _mean(mine, "extend_s")
    prefill, index, save = (_mean(mine, name) for name in ("construct_prefill_s", "construct_index_s", "save_s"))
    hit = _sum(load, extend)
    miss = _sum(_mean(mine, "miss_prefill_s"), _mean(mine, "miss_index_s"))
    once = _sum(prefill, index, save)
    gained = None if miss is None or hit is None or miss <= hit else miss - hit
    aware = next((row["query_aware"] for row in mine if row.get("query_aware")), None)
    return {
        "prefix": {
            "tokens": _mean(mine, "prefix_tokens"), "new_tokens": _mean(mine, "new_tokens"),
            "constructions": sum("construct_prefill_s" in row for row in mine), "requests": len(mine),
            "ttft_hit_s": hit, "load_s": load, "extend_s": extend, "ttft_miss_s": miss, "construct_s": once,
            "construct_prefill_s": prefill, "construct_index_s": index, "save_s": save,
            "state_bytes": _mean(mine, "state_bytes"),
            "break_even_requests": None if gained is None or once is None else once / gained,
            "miss_score": _mean(mine, "miss_score"), "recall_before": _mean(mine, "recall_before"),
            "recall_after": _mean(mine, "recall_after"),
        },
        "amortised_ttft_s": {
            str(count): None if once is None or hit is None else once / count + hit for count in REQUESTS
        },
        **({"query_aware": aware} if aware else {}),
    }  # fmt: skip


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    """Over the rows that have it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def _sum(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
