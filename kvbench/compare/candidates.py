"""The policies and budgets that a decision is made among: how near exact attention, how large, how fast, how sure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from kvbench.compare.comparison import Side, policy_text
from kvbench.compare.wording import budget_text, bytes_text, count
from kvbench.contract.errors import KVBenchError
from kvbench.statistics import PairedDifference, averaged_difference, examples_needed, least_examples, mean_interval

FEW = 6
"""Fewest examples whose two-sided sign test can reach 5%."""
Verdict = Literal["within", "beyond", "unknown"]


@dataclass(frozen=True)
class Candidate:
    """One policy under one budget, beside exact attention on the same examples of the same tasks."""

    policy: str
    """Its name and its options that are not the default ones."""
    budget: str
    budget_tokens: float | None
    difference: PairedDifference | None
    """Of the accuracy, the mean over the tasks; None where only the divergence was measured."""
    worst_task: str | None
    kl: float | None
    """Mean divergence from exact attention, nats per token."""
    kl_ci95: tuple[float, float] | None
    bytes: dict[str, float]
    ttft_s: float | None
    tpot_s: float | None
    verdict: Verdict
    """Whether the data show it within the limits, show it beyond them, or cannot tell."""
    examples: int
    examples_needed: int | None
    """About how many examples in all would tell; None where no number would."""
    fits: bool
    """Whether its bytes are within those asked for."""
    dominated_by: str | None
    """A configuration here that is at least as good in accuracy (or divergence), bytes and TPOT, and better in one."""
    over_budget: bool
    folders: tuple[str, ...]

    @property
    def name(self) -> str:
        """Policy and budget."""
        return f"{self.policy} at {self.budget}" if self.budget else self.policy

    @property
    def total_bytes(self) -> float:
        """Of all tiers and the index."""
        return sum(self.bytes.values())

    @property
    def observed_within(self) -> bool:
        """Whether it is within the limits on these examples, proven or not."""
        return self.verdict == "within" or (self.verdict == "unknown" and self._near)

    _near: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class Scope:
    """A decision: all candidates for one model, context length and device, over the tasks that were run there."""

    title: str
    model: str
    context_length: int
    tasks: tuple[str, ...]
    kl_tasks: tuple[str, ...]
    accuracy: float | None
    """Of exact attention, the mean over the tasks."""
    bytes: dict[str, float]
    tpot_s: float | None
    ttft_s: float | None
    candidates: tuple[Candidate, ...]
    choices: tuple[Candidate, ...]
    """Of each policy the smallest budget shown within the limits, else the smallest within them on these examples, else
    the nearest to exact attention."""
    sentences: tuple[str, ...]
    """The decision, what is dominated, and what the data cannot tell."""


@dataclass(frozen=True)
class Recommendation:
    """What `recommend` found: a scope for each model, context length and device, and what was left out."""

    max_drop: float | None
    max_kl: float | None
    max_bytes: int | None
    max_device_bytes: int | None
    scopes: tuple[Scope, ...]
    left_out: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The `--json` document."""
        found: dict[str, Any] = {"schema": 1, **dataclasses.asdict(self)}
        for scope, written in zip(self.scopes, found["scopes"], strict=True):
            for name in ("candidates", "choices"):
                for candidate, row in zip(getattr(scope, name), written[name], strict=True):
                    del row["_near"]
                    row |= {"name": candidate.name, "total_bytes": candidate.total_bytes,
                            "observed_within": candidate.observed_within}  # fmt: skip
        return found


@dataclass(frozen=True)
class Limits:
    """What a candidate must keep to: percentage points, nats, bytes."""

    drop: float | None
    kl: float | None
    bytes: int | None = None
    device_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.drop is not None and not 0 < self.drop < 100:
            raise KVBenchError(f"--max-drop {self.drop:g} is no number of points: give one above 0 and below 100.")
        if self.kl is not None and not self.kl > 0:
            raise KVBenchError(f"--max-kl {self.kl:g} is no divergence: give a number of nats above 0.")

    @property
    def text(self) -> str:
        """The limits on accuracy and divergence in words."""
        parts = [] if self.drop is None else [count(f"{self.drop:g}", "point")]
        parts += [] if self.kl is None else [f"{self.kl:g} nats"]
        return f"within {' and '.join(parts)} of exact attention"

    @property
    def size_text(self) -> str:
        """The limits on bytes in words; empty without one."""
        parts = [] if self.bytes is None else [f"{bytes_text(self.bytes)} in all"]
        parts += [] if self.device_bytes is None else [f"{bytes_text(self.device_bytes)} on the device"]
        return " and ".join(parts)


def candidate(pairs: Sequence[tuple[Side, Side]], limits: Limits) -> Candidate:
    """A configuration beside exact attention, a pair of sides (exact attention's first) for each task."""
    mine = [side for _, side in pairs]
    config = mine[0].config
    answered = [(exact, side) for exact, side in pairs if not side.kl]
    difference = averaged_difference([(e.scores, s.scores) for e, s in answered]) if answered else None
    divergences = [value for side in mine for value in side.kl]
    kl = fmean(divergences) if divergences else None
    kl_ci95 = mean_interval(divergences) if divergences else None
    parts: list[tuple[Verdict, bool, int | None]] = []
    if difference is not None and limits.drop is not None:
        parts.append(_verdict(difference, limits.drop / 100))
    if kl is not None and kl_ci95 is not None and limits.kl is not None:
        parts.append(_kl_verdict(divergences, kl, kl_ci95, limits.kl))
    verdict: Verdict = "unknown"
    if any(part[0] == "beyond" for part in parts):
        verdict = "beyond"
    elif all(part[0] == "within" for part in parts):
        verdict = "within"
    needed = [more for judged, _, more in parts if judged == "unknown"]
    sizes = tier_bytes(mine)
    tokens = [one for one in (_mean(side, "budget_tokens") for side in mine) if one is not None]
    worst = min(answered, key=lambda pair: _drop(*pair))[1].config["task"] if len(answered) > 1 else None
    return Candidate(
        policy_text(config), budget_text(config["budget"], options=True) if config["budget"] else "",
        fmean(tokens) if tokens else None, difference, worst, kl, kl_ci95, sizes,
        metric(mine, "ttft_s", "total"), metric(mine, "tpot_s", "p50"), verdict,
        difference.n if difference else len(divergences),
        None if None in needed or not needed else max(more for more in needed if more is not None),
        (limits.bytes is None or sum(sizes.values()) <= limits.bytes)
        and (limits.device_bytes is None or sizes["resident"] <= limits.device_bytes),
        None, any(side.over_budget for side in mine), tuple(folder for side in mine for folder in side.folders),
        all(part[1] for part in parts),
    )  # fmt: skip


def _verdict(found: PairedDifference, margin: float) -> tuple[Verdict, bool, int | None]:
    """The verdict, whether the mean itself is within the margin, and the examples that would tell."""
    low, high = found.ci95
    near = found.difference >= -margin
    if low >= -margin and found.n >= least_examples(margin):
        return "within", near, None
    if high < -margin and found.p_value < 0.05:
        return "beyond", near, None
    needed = examples_needed(found, margin)
    return "unknown", near, None if needed is None else max(needed, found.n + 1)


def _kl_verdict(
    values: Sequence[float], mean: float, interval: tuple[float, float], limit: float
) -> tuple[Verdict, bool, int | None]:
    low, high = interval
    near = mean <= limit
    if len(values) >= FEW and high <= limit:
        return "within", near, None
    if len(values) >= FEW and low > limit:
        return "beyond", near, None
    if abs(mean - limit) < 1e-9:
        return "unknown", near, None
    spread = fmean((value - mean) ** 2 for value in values)
    return "unknown", near, max(FEW, len(values) + 1, round(1.96**2 * spread / (mean - limit) ** 2))


def distance(one: Candidate) -> float:
    """How far from exact attention."""
    if one.difference is not None:
        return -one.difference.difference
    return one.kl or 0.0


def _drop(exact: Side, side: Side) -> float:
    pairs = [(exact.scores[seed][name], scores[name]) for seed, scores in side.scores.items() if seed in exact.scores
             for name in scores if name in exact.scores[seed]]  # fmt: skip
    return fmean(theirs - ours for ours, theirs in pairs)


def _mean(side: Side, *names: str) -> float | None:
    """A metric of a side, the mean over its runs weighted by their examples."""
    values = []
    for metrics in side.metrics:
        value: Any = metrics
        for name in names:
            value = (value or {}).get(name)
        if value is not None:
            values.append((float(value), (metrics.get("accuracy") or {}).get("n") or 1))
    return sum(value * n for value, n in values) / sum(n for _, n in values) if values else None


def metric(found: Sequence[Side], *names: str) -> float | None:
    """A metric, the mean over the sides; None where one lacks it."""
    values = [_mean(side, *names) for side in found]
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def tier_bytes(found: Sequence[Side]) -> dict[str, float]:
    """Bytes of each tier, means over the sides."""
    return {tier: metric(found, "bytes", tier) or 0.0 for tier in ("resident", "offloaded", "index")}
