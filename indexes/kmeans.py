"""Lloyd's k-means over several sets of vectors at once, as policies cluster the keys of all heads of a layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 2**22
"""Products of points with centroids computed at a time."""


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """The nearest of centroids [b, c, d], by Euclidean distance, to each of points [b, n, d]: int64 [b, n]."""
    offset = centroids.square().sum(-1)[:, None] / 2
    step = max(BLOCK // (centroids.shape[0] * centroids.shape[1]), 1)
    parts = [
        torch.baddbmm(offset, block, centroids.transpose(1, 2), beta=-1).argmax(-1)
        for block in torch.split(points, step, dim=1)
    ]
    return torch.cat(parts, dim=1)


def cluster_sums(vectors: Tensor, assigned: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sums [b, c, d] of the vectors [b, n, d] assigned [b, n] to each of c clusters, and their numbers [b, c]."""
    sets, _, d = vectors.shape
    flat = (assigned + torch.arange(sets, device=assigned.device)[:, None] * clusters).reshape(-1)
    sums = vectors.new_zeros(sets * clusters, d).index_add_(0, flat, vectors.reshape(-1, d))
    sizes = torch.bincount(flat, minlength=sets * clusters)
    return sums.view(sets, clusters, d), sizes.view(sets, clusters)


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
