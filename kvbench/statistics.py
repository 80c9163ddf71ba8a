"""Confidence intervals, paired differences between policies, and the correction for many comparisons."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from kvbench.contract.errors import KVBenchError

Scores = Mapping[int, Mapping[str, float]]
"""Scores in [0, 1] of one configuration: seed -> example id -> score."""


def confidence_interval(scores: Sequence[float], *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Confidence interval of the mean of scores in [0, 1].

    Wilson's interval where every score is 0 or 1 (Wilson 1927; it stays honest at 0% and 100%), else the bias-corrected
    and accelerated bootstrap (Efron 1987), both from scipy. NaN for no scores; a single fractional score gives [0, 1].
    """
    if not scores:
        return float("nan"), float("nan")
    values = np.asarray(scores, dtype=np.float64)
    if np.isin(values, (0.0, 1.0)).all():
        interval = stats.binomtest(int(values.sum()), len(values)).proportion_ci(level, method="wilson")
        return float(interval.low), float(interval.high)
    if len(values) == 1:
        return 0.0, 1.0
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    return _bootstrap((tuple(map(float, values)),), level, seed)


def mean_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval (Efron 1987) of the mean of values of any range.

    NaN for fewer than two values.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    array = np.asarray(values, dtype=np.float64)
    if np.ptp(array) == 0:
        return float(array[0]), float(array[0])
    return _bootstrap((tuple(map(float, array)),), level, seed)


def percentiles(values: Sequence[float], *points: float) -> list[float]:
    """Percentiles of `values` (NaN for none)."""
    return [float(value) for value in np.percentile(values, points)] if values else [float("nan")] * len(points)


@dataclass(frozen=True)
class PairedDifference:
    """How much higher `b` scores than `a` on the same examples, in [-1, 1].

    `n` observations, one for each example: an example scored under several seeds counts once, with its mean over them.
    `pairs` counts (seed, example) scored on both sides, `unpaired` those scored on one side only and left out.
    `by_seed` holds each seed's own mean difference, `seed_std` their standard deviation (None below two seeds).
    """

    n: int
    pairs: int
    unpaired: int
    mean_a: float
    mean_b: float
    difference: float
    ci95: tuple[float, float]
    wins: int
    losses: int
    ties: int
    p_value: float
    test: Literal["mcnemar", "permutation"]
    by_seed: dict[int, float]
    seed_std: float | None


def paired_difference(a: Scores, b: Scores, *, seed: int = 0) -> PairedDifference:
    """Compare two configurations on the examples and seeds that both were scored on.

    The interval is the bias-corrected and accelerated bootstrap over examples (Efron 1987). Where every difference is
    the same, and no resample can vary, it is what the exact bound (Clopper & Pearson 1934) on the share of examples
    that would differ allows. The p-value, two-sided, is McNemar's exact test (1947) where every observation is 0 or 1,
    else the paired permutation test of the mean (Fisher 1935; exact where up to 13 observations differ). `seed` draws
    the resamples. Raises KVBenchError where the two have no example in common.
    """
    keys_a, keys_b = _keys(a), _keys(b)
    pairs = sorted(keys_a & keys_b)
    left, right = _observations(a, b, pairs)
    by_seed: dict[int, list[float]] = defaultdict(list)
    for run, example in pairs:
        by_seed[run].append(b[run][example] - a[run][example])
    change = np.round(right - left, 12)  # rounding errors are no wins
    means = {run: fmean(values) for run, values in by_seed.items()}
    wins, losses = int((change > 0).sum()), int((change < 0).sum())
    binary = bool(np.isin((left, right), (0.0, 1.0)).all())
    return PairedDifference(
        n=len(change), pairs=len(pairs), unpaired=len(keys_a ^ keys_b),
        mean_a=float(left.mean()), mean_b=float(right.mean()), difference=float(change.mean()),
        ci95=_difference_interval(change, seed), wins=wins, losses=losses, ties=len(change) - wins - losses,
        p_value=_mcnemar(wins, losses) if binary else _permutation(left, right, seed),
        test="mcnemar" if binary else "permutation",
        by_seed=means, seed_std=stdev(means.values()) if len(means) > 1 else None,
    )  # fmt: skip


def averaged_difference(strata: Sequence[tuple[Scores, Scores]], *, seed: int = 0) -> PairedDifference:
    """The mean over several tasks of the paired differences `b` minus `a`, each task with the same weight.

    With one task it is `paired_difference`. With more the interval is the bootstrap that draws examples within each
    task (bias-corrected and accelerated, but for tasks of one example), and the p-value that of the paired permutation
    test of the mean over the tasks. Where no task's differences vary, the interval is that of `paired_difference` for
    as many examples as count with these weights (Kish 1965). Raises KVBenchError where a task has no example in common.
    """
    if len(strata) == 1:
        return paired_difference(*strata[0], seed=seed)
    keys = [(_keys(a), _keys(b)) for a, b in strata]
    common = [sorted(one & other) for one, other in keys]
    observed = [_observations(a, b, pairs) for (a, b), pairs in zip(strata, common, strict=True)]
    changes = [np.round(right - left, 12) for left, right in observed]
    weights = np.concatenate([np.full(len(change), 1 / len(change) / len(changes)) for change in changes])
    left, right = (np.concatenate([pair[side] for pair in observed]) for side in (0, 1))
    change = np.concatenate(changes)
    value = float(weights @ change)
    if any(np.ptp(one) > 0 for one in changes):
        interval = _bootstrap(tuple(tuple(map(float, one)) for one in changes), 0.95, seed)
    else:
        interval = _bound(value, 1 / float(weights @ weights))
    wins, losses = int((change > 0).sum()), int((change < 0).sum())
    return PairedDifference(
        n=len(change), pairs=sum(map(len, common)), unpaired=sum(len(one ^ other) for one, other in keys),
        mean_a=float(weights @ left), mean_b=float(weights @ right), difference=value, ci95=interval, wins=wins,
        losses=losses, ties=len(change) - wins - losses, p_value=_permutation(left, right, seed, weights),
        test="permutation", by_seed={}, seed_std=None,
    )  # fmt: skip


def least_examples(margin: float) -> int:
    """Examples without a single loss that it takes to rule out a drop of more than `margin` (0 to 1) in the mean.

    97.5% confidence (Clopper & Pearson 1934): with fewer, losses that nobody has seen may be as many as that.
    """
    return ceil(log(0.025) / log(1 - margin)) if 0 < margin < 1 else 1 if margin else 2**31 - 1


def examples_needed(found: PairedDifference, margin: float) -> int | None:
    """About how many examples in all tell whether `b` is more than `margin` (0 to 1) below `a`; None where none would.

    From the spread of the differences seen (normal approximation), and never fewer than `least_examples` where the
    difference itself is within the margin.
    """
    distance = found.difference + margin
    if abs(distance) < 1e-9:
        return None
    spread = max((found.wins + found.losses) / found.n - found.difference**2, 0.0)
    needed = ceil(1.96**2 * spread / distance**2)
    return max(needed, least_examples(margin)) if distance > 0 else max(needed, 6)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of a family of comparisons by Holm's step-down method (Holm 1979), in their order."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _keys(scores: Scores) -> set[tuple[int, str]]:
    return {(run, example) for run in scores for example in scores[run]}


def _observations(
    a: Scores, b: Scores, pairs: Sequence[tuple[int, str]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The scores of both sides by example, means over the seeds."""
    if not pairs:
        raise KVBenchError(
            "The two have no example and seed in common, and only paired scores can be compared: run both with the "
            "same model, task, context length and seed."
        )
    by_example: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for run, example in pairs:
        by_example[example].append((a[run][example], b[run][example]))
    left, right = (np.array([fmean(pair[side] for pair in group) for group in by_example.values()]) for side in (0, 1))
    return left, right


def _difference_interval(change: NDArray[np.float64], seed: int) -> tuple[float, float]:
    if np.ptp(change) > 0:
        return _bootstrap((tuple(map(float, change)),), 0.95, seed)
    return _bound(float(change[0]), len(change))


def _bound(value: float, n: float) -> tuple[float, float]:
    """With 97.5% confidence at most a share of examples differs from what all n showed; each by at most to -1 or 1."""
    share = 1 - 0.025 ** (1 / n)
    return value - share * (1 + value), value + share * (1 - value)


def _mcnemar(wins: int, losses: int) -> float:
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _permutation(
    left: NDArray[np.float64], right: NDArray[np.float64], seed: int, weights: NDArray[np.float64] | None = None
) -> float:
    change = right - left
    differs = change != 0
    if differs.sum() < 2:
        return 1.0
    shares = np.full(len(change), 1 / len(change)) if weights is None else weights
    found = stats.permutation_test(  # of one sample: flips signs, which is to swap the sides of a pair
        (change[differs],), lambda x, axis: np.moveaxis(x, axis, -1) @ shares[differs], permutation_type="samples",
        vectorized=True, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)


@lru_cache(maxsize=4096)
def _bootstrap(strata: tuple[tuple[float, ...], ...], level: float, seed: int) -> tuple[float, float]:
    """BCa interval of the mean over the strata of their means, each resampled by itself."""

    def mean(*samples: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        total = sum(np.mean(sample, axis=axis) for sample in samples)
        return np.asarray(total / len(samples), np.float64)

    method: Literal["percentile", "BCa"] = "BCa" if min(map(len, strata)) > 1 else "percentile"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        low, high = stats.bootstrap(
            strata, mean, confidence_level=level, rng=np.random.default_rng(seed), method=method, vectorized=True
        ).confidence_interval
    return float(low), float(high)
