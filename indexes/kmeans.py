"""Lloyd's k-means over several sets of vectors at once, as policies cluster the keys of all heads of a layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.kernels.assign import cluster_sums, nearest

__all__ = ["cluster_sums", "kmeans", "nearest"]


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
