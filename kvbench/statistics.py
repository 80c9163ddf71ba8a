"""Confidence intervals."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from scipy import stats


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        low, high = stats.bootstrap(
            (values,), np.mean, confidence_level=level, rng=np.random.default_rng(seed), method="BCa"
        ).confidence_interval
    return float(low), float(high)


def percentiles(values: Sequence[float], *points: float) -> list[float]:
    """Percentiles of `values` (NaN for none)."""
    return [float(value) for value in np.percentile(values, points)] if values else [float("nan")] * len(points)
