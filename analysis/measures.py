"""Measurements on arrays: distances between distributions, attention mass, recall, overlap and budgets.

Plain functions in float64. Shapes: n keys, q queries (or decoding steps), d head dimension; weights are softmax weights
[..., n] whose last axis sums to 1, with zeros where a token cannot be attended to yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvbench.contract.errors import KVBenchError

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]
Int = NDArray[np.int64]


def _finite(values: ArrayLike, name: str, dimensions: int | None = None) -> Float:
    array = np.asarray(values, dtype=np.float64)
    if dimensions is not None and array.ndim != dimensions:
        raise KVBenchError(f"The {name} have {array.ndim} dimensions, not {dimensions}: their shape is {array.shape}.")
    if not np.isfinite(array).all():
        raise KVBenchError(f"The {name} hold NaN or infinite values: measure vectors that are finite.")
    return array


# -- distances -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distribution:
    """Mean [d] and covariance of a sample, ready for distances.

    `whitening` [d, rank] maps a centred vector so that its length is the Mahalanobis distance; `rank` below d says that
    the pseudo-inverse ignores d − rank directions; `shrinkage` is the regularisation; `samples` the sample's size.
    """

    mean: Float
    whitening: Float
    rank: int
    samples: int
    shrinkage: float

    def distances(self, points: ArrayLike) -> Float:
        """Mahalanobis distances [m] of points [m, d], in standard deviations (Mahalanobis 1936)."""
        array = _finite(points, "points", 2)
        if array.shape[1] != len(self.mean):
            raise KVBenchError(f"The points have {array.shape[1]} dimensions and the sample {len(self.mean)}.")
        distances: Float = np.linalg.norm((array - self.mean) @ self.whitening, axis=1)
        return distances


def fit(sample: ArrayLike, *, shrinkage: float = 0.0, pseudo_inverse: bool = False) -> Distribution:
    """Estimate mean and covariance of a sample [n, d], unbiased (divided by n − 1).

    `shrinkage` s in [0, 1] replaces Σ by (1 − s)Σ + s·tr(Σ)/d·I (Ledoit and Wolf 2004's form). Raises KVBenchError for
    fewer than d + 1 samples without shrinkage, values that are not finite, and a singular covariance, unless
    `pseudo_inverse` asks to leave the directions without variance out.
    """
    array = _finite(sample, "samples", 2)
    n, d = array.shape
    if not 0 <= shrinkage <= 1:
        raise KVBenchError(f"The shrinkage {shrinkage} is not between 0 and 1.")
    if n < 2 or (n <= d and not shrinkage and not pseudo_inverse):
        raise KVBenchError(
            f"{n} samples are too few for a covariance of dimension {d}: give at least {d + 1}, or a shrinkage above 0."
        )
    mean = array.mean(0)
    centred = array - mean
    covariance = centred.T @ centred / (n - 1)
    if shrinkage:
        covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / d * np.eye(d)
    values, vectors = np.linalg.eigh(covariance)
    kept = values > max(values[-1], 0.0) * d * np.finfo(np.float64).eps
    rank = int(kept.sum())
    if rank == 0 or (rank < d and not pseudo_inverse):
        raise KVBenchError(
            f"The covariance of {n} samples is singular (rank {rank} of {d}): use the pseudo-inverse, which ignores "
            f"{d - rank} directions, or a shrinkage above 0."
        )
    return Distribution(mean, vectors[:, kept] / np.sqrt(values[kept]), rank, n, shrinkage)


@dataclass(frozen=True)
class OODDistances:
    """Mahalanobis distances of one head, and the sizes of the samples that made the two distributions.

    `keys`, `queries`: keys held out of the sample, and the prompt's queries, from the keys' distribution.
    `prompt_queries`, `decode_queries`: prompt queries held out, and decoding queries, from the prompt queries'
    distribution; `decode_to_keys`: decoding queries from the keys' distribution.
    """

    keys: Float
    queries: Float
    decode_to_keys: Float
    prompt_queries: Float
    decode_queries: Float
    key_samples: int
    query_samples: int
    key_rank: int
    query_rank: int


def ood_distances(
    keys: ArrayLike,
    queries: ArrayLike,
    decode_queries: ArrayLike,
    *,
    seed: int = 0,
    shrinkage: float = 0.0,
    pseudo_inverse: bool = False,
) -> OODDistances:
    """Measure how far queries [m, d] and decoding queries [t, d] lie from keys [n, d] (arXiv 2409.10516, figure 3).

    A random half of the keys makes the distribution and the other half is measured; likewise for the prompt's
    queries, so that no vector is measured against a distribution that it helped to make. In-distribution vectors
    give about √d. Raises KVBenchError as `fit` does.
    """
    rng = np.random.default_rng(seed)
    all_keys, all_queries = _finite(keys, "keys", 2), _finite(queries, "queries", 2)
    decoding = _finite(decode_queries, "decoding queries", 2)
    key_order, query_order = rng.permutation(len(all_keys)), rng.permutation(len(all_queries))
    key_half, query_half = len(all_keys) // 2, len(all_queries) // 2
    of_keys = fit(all_keys[key_order[:key_half]], shrinkage=shrinkage, pseudo_inverse=pseudo_inverse)
    of_queries = fit(all_queries[query_order[:query_half]], shrinkage=shrinkage, pseudo_inverse=pseudo_inverse)
    held_out_queries = all_queries[query_order[query_half:]]
    return OODDistances(
        keys=of_keys.distances(all_keys[key_order[key_half:]]),
        queries=of_keys.distances(held_out_queries),
        decode_to_keys=of_keys.distances(decoding),
        prompt_queries=of_queries.distances(held_out_queries),
        decode_queries=of_queries.distances(decoding),
        key_samples=of_keys.samples,
        query_samples=of_queries.samples,
        key_rank=of_keys.rank,
        query_rank=of_queries.rank,
    )


# -- attention -------------------------------------------------------------------------------------------------------


def attention_weights(
    queries: ArrayLike, keys: ArrayLike, *, scaling: float | None = None, visible: ArrayLike | None = None
) -> Float:
    """Softmax weights [q, n] of queries [q, d] over keys [n, d]; `scaling` is 1/√d unless given.

    `visible` [q] says how many of the first keys each query can attend to; all by default.
    """
    q, k = _finite(queries, "queries", 2), _finite(keys, "keys", 2)
    if q.shape[1] != k.shape[1]:
        raise KVBenchError(f"Queries have {q.shape[1]} dimensions and keys {k.shape[1]}.")
    logits = q @ k.T * (1 / math.sqrt(k.shape[1]) if scaling is None else scaling)
    if visible is not None:
        counts = np.asarray(visible)
        if counts.shape != (len(q),) or counts.min(initial=1) < 1 or counts.max(initial=1) > len(k):
            raise KVBenchError(f"Each of {len(q)} queries must see between 1 and {len(k)} keys.")
        logits = np.where(np.arange(len(k)) < counts[:, None], logits, -np.inf)
    logits -= logits.max(axis=1, keepdims=True)
    weights = np.exp(logits)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _beyond(weights: ArrayLike, sinks: int) -> tuple[Float, Float]:
    """The weights without the sinks, and their sum."""
    array = _finite(weights, "attention weights")
    if not 0 <= sinks < array.shape[-1]:
        raise KVBenchError(f"{sinks} sinks leave nothing of {array.shape[-1]} tokens.")
    rest = array[..., sinks:]
    return rest, np.maximum(rest.sum(-1), np.finfo(np.float64).tiny)


def recovered_mass(weights: ArrayLike, selected: ArrayLike, *, sinks: int = 0) -> Float:
    """Share [...] of the attention mass of weights [..., n] on the selected tokens (bool [..., n]).

    With `sinks` the first tokens are left out of both sums (arXiv 2409.10516).
    """
    rest, total = _beyond(weights, sinks)
    mass: Float = (rest * np.asarray(selected, dtype=bool)[..., sinks:]).sum(-1) / total
    return mass


def dynamic_recovery(weights: ArrayLike, ks: Sequence[int], *, sinks: int = 0) -> Float:
    """Mass [len(ks), ...] recovered by the k largest weights of every row of weights [..., n], sinks left out of both.

    The most that any k tokens recover: the upper bound of every policy. A k beyond the tokens recovers all.
    """
    rest, total = _beyond(weights, sinks)
    cumulative = np.cumsum(-np.sort(-rest, axis=-1), axis=-1)
    return np.stack([cumulative[..., min(_positive(k), rest.shape[-1]) - 1] / total for k in ks])


def static_recovery(
    weights: ArrayLike, ks: Sequence[int], *, sinks: int = 0, generated_from: int | None = None
) -> Float:
    """Mass [len(ks), steps] that the first step's top-k recovers at every step of weights [steps, n].

    With `generated_from`, the tokens from there on are attended as well: generated ones, which no first step sees.
    """
    rest, total = _beyond(weights, sinks)
    if rest.ndim != 2:
        raise KVBenchError(f"Static recovery takes weights [steps, n], not {rest.shape}.")
    order = np.argsort(-rest[0], kind="stable")
    result = []
    for k in ks:
        chosen = np.zeros(rest.shape[1], dtype=bool)
        chosen[order[: _positive(k)]] = True
        if generated_from is not None:
            chosen[max(generated_from - sinks, 0) :] = True
        result.append(rest[:, chosen].sum(-1) / total)
    return np.stack(result)


def tokens_for_mass(weights: ArrayLike, share: float) -> Int:
    """Fewest tokens [...] whose weights of weights [..., n] sum to at least `share` of the mass."""
    if not 0 < share <= 1:
        raise KVBenchError(f"The share {share} of the mass is not between 0 and 1.")
    array = _finite(weights, "attention weights")
    cumulative = np.cumsum(-np.sort(-array, axis=-1), axis=-1)
    # the sum's last digits: a share of 1 is reached when all but rounding is
    goal = share * cumulative[..., -1:] * (1 - 1e-12)
    counts: Int = (cumulative < goal).sum(-1) + 1
    return counts


# -- selections ------------------------------------------------------------------------------------------------------


def top_k(scores: ArrayLike, k: int) -> Bool:
    """Mark the k largest of each row of scores [..., n]; the lower index first among equals."""
    array = np.asarray(scores, dtype=np.float64)
    if np.isnan(array).any():
        raise KVBenchError("The scores hold NaN.")
    marked = np.zeros(array.shape, dtype=bool)
    order = np.argsort(-array, axis=-1, kind="stable")[..., : _positive(k)]
    np.put_along_axis(marked, order, True, axis=-1)
    return marked


def recall_at_k(selected: ArrayLike, scores: ArrayLike, k: int) -> Float:
    """Share [...] of the exact top-k of scores [..., n] that is selected (bool [..., n])."""
    array = np.asarray(scores)
    if k > array.shape[-1]:
        raise KVBenchError(f"Recall@{k} needs {k} keys; there are {array.shape[-1]}.")
    recall: Float = (top_k(array, k) & np.asarray(selected, dtype=bool)).sum(-1) / k
    return recall


def overlap(first: ArrayLike, second: ArrayLike) -> Float:
    """Share [...] of the tokens of `first` (bool [..., n]) that are in `second` too; NaN where `first` is empty."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    sizes = a.sum(-1)
    shares: Float = np.where(sizes > 0, (a & b).sum(-1) / np.maximum(sizes, 1), np.nan)
    return shares


# -- budgets ---------------------------------------------------------------------------------------------------------


def best_budgets(weights: ArrayLike, tokens: int) -> Int:
    """Tokens [...] that each layer and head should get of `tokens` in all, for weights [..., n] of one step.

    The `tokens` largest weights over all layers and heads recover the most mass of all ways to share them: what an
    allocator would do that knew the attention (Ada-KV, arXiv 2407.11550, within a layer).
    """
    array = _finite(weights, "attention weights")
    if not 0 < tokens <= array.size:
        raise KVBenchError(f"A budget of {tokens} tokens is not between 1 and the {array.size} there are.")
    places = np.argpartition(-array.reshape(-1), tokens - 1)[:tokens]
    counts: Int = np.bincount(places // array.shape[-1], minlength=math.prod(array.shape[:-1]))
    return counts.reshape(array.shape[:-1])


def _positive(k: Any) -> int:
    if int(k) < 1:
        raise KVBenchError(f"k is {k}; it starts at 1.")
    return int(k)
