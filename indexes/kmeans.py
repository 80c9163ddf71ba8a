"""Lloyd's k-means over several sets of vectors at once, as policies cluster the keys of all heads of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 2**22
"""Products of points with centroids computed at a time on the CPU, where they stay in the cache."""
GPU_BLOCK = 2**26
"""The same on a GPU: 256 MiB."""
FEW = 1024
"""Clusters up to which a GPU adds up points by a product with their assignments: so few sums collide when added to."""


def _step(points: Tensor, clusters: int) -> int:
    """Points of every set that are compared with the clusters at a time."""
    return max((GPU_BLOCK if points.is_cuda else BLOCK) // (points.shape[0] * clusters), 1)


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


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """The nearest of centroids [b, c, d], by Euclidean distance, to each of points [b, n, d]: int64 [b, n]."""
    offset = centroids.square().sum(-1)[:, None] / 2
    with _tensor_cores(points):
        parts = [
            torch.baddbmm(offset, block, centroids.transpose(1, 2), beta=-1).argmax(-1)
            for block in torch.split(points, _step(points, centroids.shape[1]), dim=1)
        ]
    return torch.cat(parts, dim=1)


def cluster_sums(vectors: Tensor, assigned: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sums [b, c, d] of the vectors [b, n, d] assigned [b, n] to each of c clusters, and their numbers [b, c]."""
    sets, _, d = vectors.shape
    if vectors.is_cuda and clusters <= FEW:
        return products(vectors, assigned, clusters)
    flat = (assigned + torch.arange(sets, device=assigned.device)[:, None] * clusters).reshape(-1)
    sums = vectors.new_zeros(sets * clusters, d).index_add_(0, flat, vectors.reshape(-1, d))
    if vectors.is_cuda:  # `bincount` waits for the device
        sizes = torch.zeros(sets * clusters, dtype=torch.int64, device=flat.device)
        sizes.scatter_add_(0, flat, torch.ones_like(flat))
    else:
        sizes = torch.bincount(flat, minlength=sets * clusters)
    return sums.view(sets, clusters, d), sizes.view(sets, clusters)


def products(vectors: Tensor, assigned: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """`cluster_sums` as a product of the assignments, as zeros and ones, with the vectors."""
    sets, _, d = vectors.shape
    sums = vectors.new_zeros(sets, clusters, d)
    sizes = torch.zeros(sets, clusters, dtype=torch.int64, device=vectors.device)
    names, step = torch.arange(clusters, device=assigned.device)[:, None], _step(vectors, clusters)
    for block, labels in zip(torch.split(vectors, step, dim=1), torch.split(assigned, step, dim=1), strict=True):
        ones = labels[:, None] == names
        sums.baddbmm_(ones.to(vectors.dtype), block)
        sizes += ones.sum(-1)
    return sums, sizes


def kmeans(points: Tensor, clusters: int, rounds: int, *, spherical: bool = False) -> tuple[Tensor, Tensor]:
    """Cluster each set of points [b, n, d] by itself: centroids [b, c, d] and assignments int64 [b, n].

    Starts from points spread evenly over the n, so the same points give the same clusters; a cluster that loses all
    its points keeps its centroid. `spherical` compares directions: points and centroids are normalised. float32.
    """
    points = functional.normalize(points.float(), dim=-1) if spherical else points.float()
    start = torch.linspace(0, points.shape[1] - 1, clusters, device=points.device).long()
    centroids = points[:, start]
    for _ in range(rounds):
        sums, sizes = cluster_sums(points, nearest(points, centroids), clusters)
        means = functional.normalize(sums, dim=-1) if spherical else sums / sizes.clamp_min(1)[..., None]
        centroids = torch.where(sizes[..., None] > 0, means, centroids)
    return centroids, nearest(points, centroids)
