"""k-means in two kernels: the nearest centroid of every point, and the sums of the points of every cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import compiled, device_of, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None

BLOCK = 2**22
"""Products of points with centroids that the torch twin computes at a time on the CPU, where they stay in the cache."""
GPU_BLOCK = 2**26
"""The same on a GPU: 256 MiB."""


@jit
def _nearest(
    points: tl.tensor, centroids: tl.tensor, halves: tl.tensor, found: tl.tensor, pb: int, pn: int, n: int, c: int,
    D: tl.constexpr, BLOCK_D: tl.constexpr, POINTS: tl.constexpr, CLUSTERS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    number = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    x = tl.arange(0, BLOCK_D)
    mask = (i < n)[:, None] & (x < D)[None, :]
    mine = tl.load(points + number * pb + i.to(tl.int64)[:, None] * pn + x[None, :], mask=mask, other=0.0)
    mine = mine.to(tl.float32)
    best = tl.full((POINTS,), float("-inf"), tl.float32)
    place = tl.zeros((POINTS,), tl.int32)
    centroids += number * c * D
    for first in range(0, c, CLUSTERS):
        j = first + tl.arange(0, CLUSTERS)
        theirs = tl.load(centroids + j[None, :] * D + x[:, None], mask=(j < c)[None, :] & (x < D)[:, None], other=0.0)
        half = tl.load(halves + number * c + j, mask=j < c, other=float("inf"))
        scores = tl.dot(mine, theirs, input_precision=PRECISION) - half[None, :]
        top = tl.max(scores, 1)
        at = tl.argmax(scores, 1) + first
        place = tl.where(top > best, at, place)
        best = tl.maximum(top, best)
    tl.store(found + number * n + i, place, mask=i < n)


@jit
def _sums(
    vectors: tl.tensor, order: tl.tensor, ends: tl.tensor, sums: tl.tensor, vb: int, vn: int, n: int, c: int,
    D: tl.constexpr, BLOCK_D: tl.constexpr, POINTS: tl.constexpr,
) -> None:  # fmt: skip
    cluster = tl.program_id(0).to(tl.int64)
    start = tl.load(ends + cluster - 1, mask=cluster > 0, other=0)
    stop = tl.load(ends + cluster)
    x = tl.arange(0, BLOCK_D)
    vectors += (cluster // c) * vb
    first = (cluster // c) * n
    total = tl.zeros((POINTS, BLOCK_D), tl.float32)
    for place in range(start, stop, POINTS):
        i = place + tl.arange(0, POINTS)
        member = tl.load(order + i, mask=i < stop, other=0) - first
        mask = (i < stop)[:, None] & (x < D)[None, :]
        total += tl.load(vectors + member[:, None] * vn + x[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + cluster * D + x, tl.sum(total, 0), mask=x < D)


@contextmanager
def _tensor_cores(points: Tensor) -> Iterator[None]:
    """Products of float32 on a GPU in TF32, which ranks centroids as well as keys of 16 bits can tell them apart."""
    if not points.is_cuda:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _check(points: Tensor, sets: int, what: str) -> None:
    if points.dim() != 3 or points.shape[0] != sets or (points.stride(2) != 1 and points.shape[2] > 1):
        raise KVBenchError(f"{what} {list(points.shape)} are not [{sets}, n, d] with d contiguous.")


@kernel
def nearest(points: Tensor, centroids: Tensor, *, offsets: Tensor | None = None) -> Tensor:
    """The nearest of centroids [b, c, d], by Euclidean distance, to each of points [b, n, d]: int64 [b, n].

    With `offsets` [b, c] the one with the largest inner product minus its offset. Of equally near ones the first.
    Products are TF32 on a GPU. Nothing of n × c numbers is held by the kernel. Raises KVBenchError where shapes or
    strides do not fit.
    """
    _check(points, centroids.shape[0], "points")
    centroids = centroids.float().contiguous()
    halves = centroids.square().sum(-1) / 2 if offsets is None else offsets.float().contiguous()
    if not compiled(points):
        return _twin(points.float(), centroids, halves)
    (sets, n, d), c = points.shape, centroids.shape[1]
    found = torch.empty(sets, n, dtype=torch.int32, device=points.device)
    if n:
        wide = d > 128
        with device_of(points):
            _nearest[(-(-n // 128), sets)](
                points, centroids, halves, found, points.stride(0), points.stride(1), n, c, d,
                max(16, next_power_of_2(d)), 128, max(16, min(32 if wide else 64, next_power_of_2(c))),
                "tf32" if points.is_cuda else "ieee", num_warps=8 if d >= 64 else 4, num_stages=2 if wide else 3,
            )  # fmt: skip
    return found.long()


def _twin(points: Tensor, centroids: Tensor, halves: Tensor) -> Tensor:
    # on the CPU distances take no more memory than the points
    most = GPU_BLOCK if points.is_cuda else min(BLOCK, points.numel())
    step = max(most // (centroids.shape[0] * centroids.shape[1]), 1)
    with _tensor_cores(points):
        parts = [
            torch.baddbmm(halves[:, None], block, centroids.transpose(1, 2), beta=-1).argmax(-1)
            for block in torch.split(points, step, dim=1)
        ]
    return torch.cat(parts, dim=1)


@kernel
def cluster_sums(vectors: Tensor, assigned: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sums, float32 [b, c, d], of the vectors [b, n, d] assigned [b, n] to each of c clusters; their numbers [b, c].

    The same however often it runs. Raises KVBenchError where shapes or strides do not fit.
    """
    _check(vectors, assigned.shape[0], "vectors")
    sets, n, d = vectors.shape
    flat = (assigned + torch.arange(sets, device=assigned.device)[:, None] * clusters).reshape(-1)
    if not vectors.is_cuda:
        sizes = torch.bincount(flat, minlength=sets * clusters)
    else:  # `bincount` waits for the device
        sizes = torch.zeros(sets * clusters, dtype=torch.int64, device=flat.device)
        sizes.scatter_add_(0, flat, torch.ones_like(flat))
    if not compiled(vectors):
        sums = _twin_sums(vectors.float().reshape(-1, d), flat, sizes)
    else:
        order = flat.int().sort(stable=True).indices
        sums = torch.empty(sets * clusters, d, dtype=torch.float32, device=vectors.device)
        with device_of(vectors):
            _sums[(sets * clusters,)](
                vectors, order, sizes.cumsum(0), sums, vectors.stride(0), vectors.stride(1), n, clusters,
                d, next_power_of_2(d), 32, num_warps=4,
            )  # fmt: skip
    return sums.view(sets, clusters, d), sizes.view(sets, clusters)


def _twin_sums(vectors: Tensor, flat: Tensor, sizes: Tensor) -> Tensor:
    sums = vectors.new_zeros(len(sizes), vectors.shape[1])
    if not vectors.is_cuda:
        return sums.index_add_(0, flat, vectors)
    # additions to one place come in any order on a GPU
    order = flat.sort(stable=True).indices
    return torch.segment_reduce(vectors[order], "sum", lengths=sizes, unsafe=True, initial=0)
