"""Softmax-weighted sums of the rows that a search found, by the scores that it found them with."""

from __future__ import annotations

import numpy as np

from kvbench.indexes.compiled import Float32, Int32, Int64, Rows, kernel, widen


@kernel
def weigh_rows(
    part: int,
    parts: int,
    rows: Rows,
    stride: int,
    groups: int,
    ids: Int32,
    scores: Float32,
    counts: Int64,
    scaling: float,
    sums: Float32,
    lses: Float32,
) -> None:
    """Attention of this part's heads over the found rows: `sums` [H, d] and the log-sum-exp of scaled scores [H].

    The first `counts` [H] of ids and scores [H, k] count, and an id of −1 is none. Head h reads row
    `(h // (H // groups)) * stride + id`. A head with no row has a sum of 0 and a log-sum-exp of −∞.
    """
    heads = ids.shape[0]
    share = heads // groups
    for head in range(part, heads, parts):
        base = head // share * stride
        out = sums[head]
        out[:] = 0
        count = min(counts[head], ids.shape[1])
        peak = np.float32(-np.inf)
        for i in range(count):
            if ids[head, i] >= 0:
                peak = max(peak, np.float32(scores[head, i] * scaling))
        total = np.float32(0)
        for i in range(count):
            if ids[head, i] < 0:
                continue
            weight = np.exp(np.float32(scores[head, i] * scaling) - peak)
            total += weight
            row = base + ids[head, i]
            for j in range(out.shape[0]):
                out[j] += weight * widen(rows[row, j])
        if total > 0:
            for j in range(out.shape[0]):
                out[j] /= total
            lses[head] = peak + np.log(total)
        else:
            lses[head] = -np.inf


@kernel
def score_rows(
    part: int, parts: int, rows: Rows, stride: int, groups: int, count: int, queries: Float32, scores: Float32
) -> None:
    """Inner products [H, ≥ count] of this part's heads' queries [H, d] with the first `count` rows of their groups."""
    heads = queries.shape[0]
    share = heads // groups
    for head in range(part, heads, parts):
        base = head // share * stride
        for i in range(count):
            total = np.float32(0)
            for j in range(queries.shape[1]):
                total += widen(rows[base + i, j]) * queries[head, j]
            scores[head, i] = total
