"""Which keys are most often nearest to the same queries: candidates of a graph's links, for all keys at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.kernels.support import compiled, device_of, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None

FEW = 4
"""Lists of a key up to which a smaller program counts, and half as many candidates are given."""
PROGRAMS = 4096
"""Programs that share the keys; each has scratch memory of its own."""
NEARER = 1 / 64
"""How much a key's place in the lists counts: the score of one that is never near their beginning is so much less."""
ENTRIES = 2**24
"""Entries of lists that the torch twin sorts at a time."""


@dataclass(frozen=True)
class Lists:
    """The lists of nearest keys that each key is in, for S graphs over n keys.

    `knn` int32 [S, m, K]; `order` int64 [S·m·K]: entries of all lists by graph and key; `ends` int64 [S·n]: where each
    key's entries end in `order`; `frequency` int32 [S, n].
    """

    knn: Tensor
    order: Tensor
    ends: Tensor
    frequency: Tensor


def lists_of(knn: Tensor, n: int) -> Lists:
    """Sort the entries of the lists `knn` [S, m, K] of ids below n."""
    sets = knn.shape[0]
    flat = (knn.view(sets, -1) + torch.arange(sets, device=knn.device)[:, None] * n).reshape(-1)
    frequency = torch.zeros(sets * n, dtype=torch.int32, device=knn.device)
    frequency.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    order = flat.int().sort(stable=True).indices if sets * n < 2**31 else flat.sort(stable=True).indices
    return Lists(knn, order, frequency.cumsum(0), frequency.view(sets, n))


@jit
def _count(
    knn: tl.tensor, order: tl.tensor, ends: tl.tensor, frequency: tl.tensor, weights: tl.tensor, scratch: tl.tensor,
    ids: tl.tensor, scores: tl.tensor, n: int, nodes: int,
    FROM: tl.constexpr, LISTS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
    FEW: tl.constexpr, NEARER: tl.constexpr, LAST: tl.constexpr,
) -> None:  # fmt: skip
    """Keys in FROM to LISTS lists; the `LAST` program takes those in more, too, and looks at LISTS of them."""
    SIZE: tl.constexpr = LISTS * BLOCK_K
    p = tl.arange(0, SIZE)
    sorted_ids = scratch + tl.program_id(0).to(tl.int64) * (3 * SIZE + 1)
    ranks = sorted_ids + SIZE
    begins = ranks + SIZE
    slot = tl.arange(0, LISTS)
    place = tl.arange(0, BLOCK_K)
    for node in range(tl.program_id(0), nodes, tl.num_programs(0)):
        number = tl.load(frequency + node)
        if (number >= FROM) & ((number <= LISTS) | LAST):
            graph = node // n + tl.zeros((), tl.int64)
            taken = tl.minimum(number, LISTS)
            first = tl.load(ends + node) - number
            entry = tl.load(order + first + slot * number // tl.maximum(taken, 1), mask=slot < taken, other=0)
            query = entry // K
            there = slot < taken
            listed = tl.load(
                knn + query[:, None] * K + place[None, :], mask=there[:, None] & (place < K)[None, :], other=n
            )
            listed = tl.where(listed == node % n, n, listed) * BLOCK_K + place[None, :]
            listed = tl.sort(tl.reshape(listed, (SIZE,)))
            rank = listed % BLOCK_K
            listed = listed // BLOCK_K
            tl.store(sorted_ids + p, listed)
            tl.store(ranks + p, rank)
            tl.debug_barrier()
            before = tl.load(sorted_ids + p - 1, mask=p > 0, other=-1)
            new = (listed != before) & (listed < n)
            run = tl.cumsum(new.to(tl.int32), 0) - 1
            total = tl.sum(new.to(tl.int32), 0)
            tl.store(begins + run, p, mask=new)
            tl.store(begins + total, tl.sum((listed < n).to(tl.int32), 0))
            tl.debug_barrier()
            real = p < total
            begin = tl.load(begins + p, mask=real, other=0)
            count = tl.load(begins + p + 1, mask=real, other=0) - begin
            other = tl.load(sorted_ids + begin, mask=real, other=0)
            rank = tl.load(ranks + begin, mask=real, other=0)
            score = count.to(tl.float32) * tl.load(weights + graph * n + other, mask=real, other=0.0)
            score *= 1.0 - rank.to(tl.float32) * (NEARER / BLOCK_K)
            key = tl.where(real, score, 0.0).to(tl.int32, bitcast=True)  # positive floats rank as integers
            limit = tl.where(number > FEW, C, C // 2)
            threshold = tl.zeros((), tl.int32)
            for step in range(31):
                candidate = threshold | (tl.full((), 0x40000000, tl.int32) >> step)
                threshold = tl.where(tl.sum((key >= candidate).to(tl.int32), 0) >= limit, candidate, threshold)
            above = tl.sum((key > threshold).to(tl.int32), 0)
            tie = (key == threshold) & real
            chosen = real & ((key > threshold) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= limit - above)))
            at = tl.cumsum(chosen.to(tl.int32), 0) - 1
            target = (node + tl.zeros((), tl.int64)) * C
            tl.store(ids + target + at, other, mask=chosen)
            tl.store(scores + target + at, score, mask=chosen)
            rest = tl.arange(0, C)
            free = rest >= tl.sum(chosen.to(tl.int32), 0)
            tl.store(ids + target + rest, tl.full((C,), -1, tl.int32), mask=free)
            tl.store(scores + target + rest, tl.zeros((C,), tl.float32), mask=free)
            tl.debug_barrier()


@kernel
def candidates(lists: Lists, most: int, count: int) -> tuple[Tensor, Tensor]:
    """For each key the `count` others, a power of two, with the largest scores: ids int32 and scores [S, n, count].

    A score is the number of lists with both keys divided by the fourth root of the lists with the other one, and a
    little more for one near a list's beginning. Of a key in more than `most` lists, a power of two, as many are looked
    at, spread evenly; a key in at most `FEW` has half as many candidates. Equal scores rank by smaller id. The order is
    that of the ids; −1 and 0 fill the end.
    """
    sets, n = lists.frequency.shape
    weights = lists.frequency.clamp_min(1).float().pow(-0.25)
    if not compiled(lists.knn):
        return _twin(lists, weights, most, count)
    width = lists.knn.shape[2]
    device, block = lists.knn.device, next_power_of_2(width)
    ids = torch.empty(sets, n, count, dtype=torch.int32, device=device)
    scores = torch.empty(sets, n, count, dtype=torch.float32, device=device)
    programs = min(PROGRAMS, sets * n)
    first, size = 0, min(FEW, most)
    while first <= most:  # keys in more and more lists, by larger and larger programs
        scratch = torch.empty(programs * (3 * size * block + 1), dtype=torch.int32, device=device)
        with device_of(lists.knn):
            _count[(programs,)](
                lists.knn, lists.order, lists.ends, lists.frequency, weights, scratch, ids, scores,
                n, sets * n, first, size, width, block, count, FEW, NEARER, size == most,
                num_warps=2 if size * block <= 512 else 4,
            )  # fmt: skip
        first, size = size + 1, min(2 * size, most)
    return ids, scores


def _twin(lists: Lists, weights: Tensor, most: int, count: int) -> tuple[Tensor, Tensor]:
    sets, n = lists.frequency.shape
    width = lists.knn.shape[2]
    frequency, flat = lists.frequency.view(-1).long(), lists.knn.view(-1, width)
    block, slot = next_power_of_2(width), torch.arange(most, device=flat.device)
    found_ids, found_scores = [], []
    for nodes in torch.split(torch.arange(sets * n, device=flat.device), max(ENTRIES // (most * width), 1)):
        number = frequency[nodes, None]
        graph = nodes[:, None] // n
        taken = number.clamp_max(most)
        first = lists.ends[nodes, None] - number
        entry = lists.order[(first + slot * number // taken.clamp_min(1)).clamp_max(len(lists.order) - 1)]
        listed = torch.where((slot < taken)[..., None], flat[entry // width], n)
        listed = torch.where(listed == (nodes % n)[:, None, None], n, listed).long() * block
        listed = (listed + torch.arange(width, device=flat.device)).flatten(1).sort(-1).values
        rank, listed = listed % block, listed // block
        new = torch.ones_like(listed, dtype=torch.bool)
        new[:, 1:] = listed[:, 1:] != listed[:, :-1]
        place = torch.arange(listed.shape[1], device=flat.device)
        following = torch.where(new, place, listed.shape[1]).roll(-1, 1)
        following[:, -1] = listed.shape[1]
        following = following.flip(1).cummin(1).values.flip(1)
        real = new & (listed < n)
        score = (following - place).float() * weights.view(-1)[(graph * n + listed).clamp_max(sets * n - 1)]
        score = score * (1.0 - rank.float() * (NEARER / block))
        score = torch.where(real, score, -torch.inf)
        best = score.sort(dim=-1, descending=True, stable=True)
        allowed = torch.where(number > FEW, count, count // 2)
        score = score.masked_fill(
            torch.zeros_like(new).scatter(1, best.indices, (place >= allowed).expand(new.shape)), -torch.inf
        )
        order = best.indices[:, :count].sort(-1).values
        score, ids = score.gather(1, order), listed.gather(1, order)
        ids = torch.where(score > 0, ids, n)
        rank = ids.sort(-1).indices  # −1 behind
        ids, score = ids.gather(1, rank), score.gather(1, rank).clamp_min(0)
        pad = (0, count - ids.shape[1])
        found_ids.append(torch.nn.functional.pad(torch.where(ids < n, ids, -1).int(), pad, value=-1))
        found_scores.append(torch.nn.functional.pad(score, pad))
    return torch.cat(found_ids).view(sets, n, count), torch.cat(found_scores).view(sets, n, count)
