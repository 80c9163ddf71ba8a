"""CAGRA's rank-based pruning: each key's links ordered by their detours, for all keys of all graphs at once."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.kernels.support import compiled, device_of, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None

LOOKUPS = 2**24
"""Entries of the tables that the torch twin holds at a time."""


@jit
def _detours(
    near: tl.tensor, out: tl.tensor, n: int, c: int, degree: int, C: tl.constexpr
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = row // n * n
    place = tl.arange(0, C)
    mine = tl.load(near + row * c + place, mask=place < c, other=-1)
    counts = tl.zeros((C,), tl.int32)
    for rank in range(c):
        middle = tl.load(near + row * c + rank).to(tl.int64)
        theirs = tl.load(near + (first + middle) * c + place, mask=place < c, other=-2)
        # [i, j]: whether the j-th link of the middle key leads to my i-th link, over two links of lower rank
        leads = (mine[:, None] == theirs[None, :]) & (place[None, :] < place[:, None]) & (rank < place[:, None])
        counts += tl.sum(leads.to(tl.int32), 1)
    # fewest detours first, equal ones by rank; what fills up the block comes last
    order = tl.sort(tl.where(place < c, counts, C + 1) * C + place) % C
    taken = place < tl.minimum(c, degree)
    tl.store(out + row * degree + place, tl.load(near + row * c + order, mask=taken, other=0), mask=taken)


@kernel
def by_detours(near: Tensor, degree: int) -> Tensor:
    """The first `degree`, at most c, of each key's links, by how many detours they have, equal ones by rank.

    `near` int32 [G, n, c]: the ids of other keys, best first, none twice. A detour of the link to j is a pair of links
    i → k → j whose ranks are both lower. Gives int32 [G, n, degree] (Ootomo et al., arXiv:2308.15136).
    """
    groups, n, c = near.shape
    degree = min(degree, c)
    if not compiled(near):
        return torch.stack([_twin(graph, degree) for graph in near])
    near = near.contiguous()
    out = torch.empty(groups, n, degree, dtype=torch.int32, device=near.device)
    block = max(16, next_power_of_2(c))
    with device_of(near):
        _detours[(groups * n,)](near, out, n, c, degree, block, num_warps=4)
    return out


def _twin(near: Tensor, degree: int) -> Tensor:
    n, c = near.shape
    device = near.device
    rank = torch.arange(c, dtype=torch.int16, device=device)
    parts = []
    for nodes in torch.split(torch.arange(n, device=device), max(LOOKUPS // max(n, c * c), 1)):
        mine = near[nodes].long()
        places = torch.full((len(nodes), n), c, dtype=torch.int16, device=device)
        places.scatter_(1, mine, rank.expand(mine.shape))
        # the place that a neighbour's neighbour has among the key's own links; c: none
        place = places.gather(1, near[mine].long().view(len(nodes), -1)).view(-1, c, c)
        detour = (torch.maximum(rank[:, None], rank) < place) & (place < c)
        counts = torch.zeros(len(nodes), c + 1, dtype=torch.int32, device=device)
        counts.scatter_add_(1, place.long().flatten(1), detour.int().flatten(1))
        order = counts[:, :c].sort(dim=-1, stable=True).indices[:, :degree]
        parts.append(mine.gather(1, order).int())
    return torch.cat(parts)
