"""How decoding steps ran, their times, and how far these are from the floor of the bytes that a step must read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from kvbench.contract.errors import KVBenchError
from kvbench.engine.bandwidth import bandwidth
from kvbench.statistics import percentiles

if TYPE_CHECKING:
    from kvbench.contract.policy import KVCachePolicy
    from kvbench.engine.generation import Decoding, Generation

STEP_METRICS = (
    "mode",
    "mode_reason",
    "device_tpot_s",
    "step_parts_s",
    "capture_s",
    "floor_s",
    "floor_ratio",
    "hot_hit_rate",
)
"""Names of what `step_metrics` gives."""


def can_be_fixed(device: torch.device, decoding: Decoding) -> bool:
    """Whether steps may run otherwise than hook by hook."""
    return decoding in ("graph", "fixed") or (decoding == "auto" and device.type == "cuda")


def check_decoding(decoding: Decoding, device: torch.device, policy: type[KVCachePolicy], *, forced: bool) -> None:
    """Refuse steps that can't run so; `forced`: the task gives the tokens itself."""
    if decoding == "graph" and device.type != "cuda":
        raise KVBenchError(f"A CUDA graph needs a GPU, and the model is on {device}: use --decoding auto or fixed.")
    if decoding in ("graph", "fixed") and (forced or not policy.cached):
        why = "given tokens go" if forced else f"policy '{policy.name}' keeps no cache and goes"
        raise KVBenchError(
            f"--decoding {decoding} is for policies that keep a cache and for answers that a model generates, and here "
            f"{why} another way: use --decoding auto or eager."
        )


def bandwidths(device: torch.device, decoding: Decoding) -> dict[str, dict[str, float] | None]:
    """The `bandwidth` of a run's environment, bytes a second, where its steps can have a floor; else nothing.

    None where it could not be measured.
    """
    if not can_be_fixed(device, decoding):
        return {}
    found = bandwidth(device)
    return {"bandwidth": None if found is None else {"device": found.device, "host": found.host}}


def step_row(result: Generation, device: torch.device) -> dict[str, Any]:
    """What an example's row states of its decoding steps; nothing of what was not measured."""
    found: dict[str, Any] = {"step_s": result.step_s}
    if not result.step_s:
        return found
    found["mode"] = result.mode
    if result.mode_reason:
        found["mode_reason"] = result.mode_reason
    if result.device_step_s:
        found["device_step_s"] = result.device_step_s
    if result.parts_s:
        found["step_parts_s"] = step_parts(result)
    if result.hot_hit_rate is not None:
        found["hot_hit_rate"] = result.hot_hit_rate
    if result.reads:
        found |= {"capture_s": result.capture_s, "read_bytes": result.reads}
        rates = bandwidth(device)
        if rates is not None:
            found["floor_s"] = rates.floor_s(result.reads)
    return found


def step_parts(result: Generation) -> dict[str, float]:
    """Mean seconds of the parts of steps that the host takes part in, which add up to the mean step.

    `search`, `insertion`, `attention` (over the found tokens), `transfer`, and the `rest`: the model, the static set.
    """
    count = len(result.parts_s)
    parts = {
        name: sum(step.get(name, 0.0) for step in result.parts_s) / count
        for name in ("search", "insertion", "attention", "transfer")
    }
    return {**parts, "rest": sum(result.step_s) / len(result.step_s) - sum(parts.values())}


def step_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of the decoding steps of a run's examples; None where nothing was measured.

    The ratio is the median of step / floor, by device events where there are any, else by wall clock.
    """
    modes = sorted({row["mode"] for row in rows if row.get("mode")})
    reasons = sorted({row["mode_reason"] for row in rows if row.get("mode_reason")})
    p50, p95 = percentiles([step for row in rows for step in row.get("device_step_s", ())], 50, 95)
    ratios = [
        step / row["floor_s"] for row in rows if row.get("floor_s") for step in row.get("device_step_s", row["step_s"])
    ]
    split = [row for row in rows if row.get("step_parts_s")]
    return {
        "mode": ", ".join(modes) or None,
        "mode_reason": "; ".join(reasons) or None,
        "device_tpot_s": {"p50": _number(p50), "p95": _number(p95)},
        "step_parts_s": {
            name: _mean([row["step_parts_s"][name] for row in split])
            for name in (split[0]["step_parts_s"] if split else ())
        },
        "capture_s": _mean([row["capture_s"] for row in rows if row.get("capture_s") is not None]),
        "floor_s": _mean([row["floor_s"] for row in rows if row.get("floor_s") is not None]),
        "floor_ratio": _number(percentiles(ratios, 50)[0]),
        "hot_hit_rate": _mean([row["hot_hit_rate"] for row in rows if row.get("hot_hit_rate") is not None]),
    }


def mode_text(metrics: dict[str, Any]) -> str:
    """How the steps ran, and why not captured; empty for runs of versions that did not say."""
    mode, reason = metrics.get("mode"), metrics.get("mode_reason")
    return f"{mode} ({reason})" if mode and reason else mode or ""


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
