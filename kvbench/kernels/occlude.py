"""Pruning of a graph's candidate links, for all keys at once: a candidate near a kept one is passed over."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.kernels.support import compiled, device_of, dots_in_float32, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None

DISTANCES = 2**24
"""Distances that the torch twin holds at a time."""


@jit
def _occlude(
    nodes: tl.tensor, keys: tl.tensor, norms: tl.tensor, ids: tl.tensor, scores: tl.tensor, most: tl.tensor,
    links: tl.tensor, lengths: tl.tensor, kg: int, kn: int, n: int, degree: int, width: int,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.load(nodes + tl.program_id(0))
    graph, node = row // n, row % n
    c = tl.arange(0, C)
    x = tl.arange(0, BLOCK_D)
    other = tl.load(ids + row * width + c)
    real = other >= 0
    place = tl.where(real, other, 0).to(tl.int64)
    source = keys + graph * kg
    theirs = tl.load(source + place[:, None] * kn + x[None, :], mask=(x < D)[None, :], other=0.0)
    own = tl.load(source + node * kn + x, mask=x < D, other=0.0).to(tl.float32)
    if UPCAST:
        theirs = theirs.to(tl.float32)
    norm = tl.load(norms + graph * n + place)
    distance = norm + tl.load(norms + row) - 2 * tl.sum(theirs.to(tl.float32) * own[None, :], 1)
    among = norm[:, None] + norm[None, :] - 2 * tl.dot(theirs, tl.trans(theirs), input_precision="ieee")
    limit = tl.load(most + row)
    key = tl.load(scores + row * width + c)
    key = tl.where(limit < 0, -distance, key)  # candidates without scores: the nearest first
    key = tl.where(real, key, float("-inf"))
    # [i, j]: whether j comes before i; and whether it would occlude it
    earlier = (key[None, :] > key[:, None]) | ((key[None, :] == key[:, None]) & (c[None, :] < c[:, None]))
    occludes = (earlier & (among < distance[:, None]) & real[None, :]).to(tl.int32)
    kept = real.to(tl.int32)
    changed = 1
    while changed > 0:
        new = tl.where(real & (tl.sum(occludes * kept[None, :], 1) == 0), 1, 0)
        changed = tl.sum(tl.abs(new - kept), 0)
        kept = new
    rank = tl.sum(earlier.to(tl.int32) * kept[None, :], 1)
    limit = tl.minimum(tl.abs(limit), degree)
    tl.store(links + row * degree + rank, other, mask=(kept > 0) & (rank < limit))
    tl.store(lengths + row, tl.minimum(tl.sum(kept, 0), limit))


@kernel
def occlude(keys: Tensor, ids: Tensor, scores: Tensor, most: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """Links int32 [S, n, degree] of each key, −1 behind them, and their numbers [S, n], of candidates `ids` [S, n, c].

    Candidates come by falling `scores` [S, n, c], equal ones in their order; one is passed over if a kept one is nearer
    to it (Euclidean) than the key is. A key gets at most `most` int32 [S, n] links; where that is below 0, as many as
    its magnitude, and its nearest candidates come first. Keys are [S, n, d].
    """
    norms = keys.float().square().sum(-1)
    if not compiled(keys):
        return _twin(keys, norms, ids, scores, most, degree)
    sets, n, d = keys.shape
    c = ids.shape[2]
    links = torch.full((sets, n, degree), -1, dtype=torch.int32, device=keys.device)
    lengths = torch.empty(sets, n, dtype=torch.int32, device=keys.device)
    half = c // 2 if c > 32 else c  # keys without candidates in the second half are a quarter of the work
    few = (ids[..., half:] < 0).all(-1).flatten()
    for nodes, used in ((few, half), (~few, c)):
        rows = nodes.nonzero().flatten()
        if len(rows):
            with device_of(keys):
                _occlude[(len(rows),)](
                    rows, keys, norms, ids, scores, most, links, lengths, keys.stride(0), keys.stride(1), n, degree, c,
                    d, max(16, next_power_of_2(d)), used, dots_in_float32(keys, keys), num_warps=4 if used <= 64 else 8,
                )  # fmt: skip
    return links, lengths


def _twin(keys: Tensor, norms: Tensor, ids: Tensor, scores: Tensor, most: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    sets, n, d = keys.shape
    c = ids.shape[2]
    rows, flat_norms = keys.reshape(-1, d).float(), norms.view(-1)
    found_links, found_lengths = [], []
    for nodes in torch.split(torch.arange(sets * n, device=keys.device), max(DISTANCES // (c * max(c, d)), 1)):
        other, limit = ids.view(-1, c)[nodes].long(), most.view(-1)[nodes]
        real = other >= 0
        place = (nodes[:, None] // n) * n + other.clamp_min(0)
        theirs, norm = rows[place], flat_norms[place]
        distance = norm + flat_norms[nodes, None] - 2 * (theirs @ rows[nodes][..., None])[..., 0]
        among = norm[:, :, None] + norm[:, None, :] - 2 * theirs @ theirs.transpose(1, 2)
        key = torch.where(limit[:, None] < 0, -distance, scores.view(-1, c)[nodes]).masked_fill(~real, -torch.inf)
        # candidates in their order, so that an earlier place comes first
        order = key.sort(dim=-1, descending=True, stable=True).indices
        other, real, distance = other.gather(1, order), real.gather(1, order), distance.gather(1, order)
        among = among.gather(1, order[:, :, None].expand_as(among)).gather(2, order[:, None, :].expand_as(among))
        occludes = ((among < distance[:, :, None]) & real[:, None, :]).tril(-1).float()
        kept, before = real, torch.zeros_like(real)
        while not torch.equal(kept, before):
            before, kept = kept, real & ((occludes @ kept.float()[..., None])[..., 0] == 0)
        rank = kept.cumsum(-1) - 1
        limit = limit.abs().clamp_max(degree)[:, None]
        kept = kept & (rank < limit)
        links = other.new_full((len(nodes), degree + 1), -1)
        links.scatter_(1, torch.where(kept, rank, degree), torch.where(kept, other, -1))
        found_links.append(links[:, :degree].int())
        found_lengths.append(kept.sum(-1).int())
    return torch.cat(found_links).view(sets, n, degree), torch.cat(found_lengths).view(sets, n)
