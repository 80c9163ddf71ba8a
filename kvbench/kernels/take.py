"""Which clusters a budget has room for, the best first, the next ones' summaries, and the tokens of those taken."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import compiled, device_of, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _take(
    order: tl.tensor, sizes: tl.tensor, left: tl.tensor, zone: tl.tensor, number: tl.tensor, ends: tl.tensor,
    taken: tl.tensor, next_ids: tl.tensor, masses: tl.tensor, clusters: int, groups: int, most: int,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    b = row // groups
    long_row = row.to(tl.int64)
    order += long_row * clusters
    sizes += long_row * clusters
    j = tl.arange(0, BLOCK)
    room = tl.load(left + row)
    full = tl.zeros((), tl.int32)
    count = tl.zeros((), tl.int32)
    base = 0
    while (base < clusters) & (full <= room):
        at = base + j
        cluster = tl.load(order + at, mask=at < clusters, other=0)
        size = tl.load(sizes + cluster, mask=at < clusters, other=0)
        end = full + tl.cumsum(size, 0)
        fits = (at < clusters) & (end <= room)
        tl.store(ends + long_row * clusters + at, end, mask=fits)
        count += tl.sum(fits.to(tl.int32), 0)
        full += tl.sum(size, 0)
        base += BLOCK
    tl.store(taken + row, count)
    g = tl.arange(0, GROUPS)
    widest = tl.max(tl.load(left + b * groups + g, mask=g < groups, other=0), 0)
    some = tl.where(widest > 0, tl.minimum(tl.load(zone + b), most), 0)
    known = tl.load(number + b)
    for base in range(0, most, BLOCK):
        at = base + j
        real = (at < some) & (count + at < known)
        cluster = tl.load(order + count + at, mask=real, other=0)
        size = tl.load(sizes + cluster, mask=real, other=1)
        tl.store(next_ids + long_row * most + at, tl.where(real, cluster, -1).to(tl.int32), mask=at < most)
        mass = tl.where(size > 0, tl.log(tl.maximum(size, 1).to(tl.float32)), float("-inf"))
        tl.store(masses + long_row * most + at, mass, mask=at < most)


@jit
def _expand(
    order: tl.tensor, sizes: tl.tensor, starts: tl.tensor, members: tl.tensor, ends: tl.tensor, taken: tl.tensor,
    tokens: tl.tensor, clusters: int, held: int, most: int, STEPS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(1)
    long_row = row.to(tl.int64)
    count = tl.load(taken + row)
    ends += long_row * clusters
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(ends + count - 1, mask=count > 0, other=0)
    valid = slot < last
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.zeros((BLOCK,), tl.int32) + count
    for _ in range(STEPS):  # the first cluster that ends behind the slot
        middle = (low + high) // 2
        going = low < high
        end = tl.load(ends + middle, mask=valid & going, other=0)
        behind = end > slot
        high = tl.where(going & behind, middle, high)
        low = tl.where(going & (behind == 0), middle + 1, low)
    cluster = tl.load(order + long_row * clusters + low, mask=valid, other=0)
    size = tl.load(sizes + long_row * clusters + cluster, mask=valid, other=0)
    start = tl.load(starts + long_row * clusters + cluster, mask=valid, other=0)
    end = tl.load(ends + low, mask=valid, other=0)
    token = tl.load(members + long_row * held + start + slot - (end - size), mask=valid, other=-1)
    tl.store(tokens + long_row * most + slot, token, mask=slot < most)


@kernel
def take_clusters(
    order: Tensor, sizes: Tensor, starts: Tensor, members: Tensor, left: Tensor, zone: Tensor, number: Tensor,
    most: int, most_next: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Take the first clusters of `order` whose tokens together fit into `left`, int32 [B, G], and name the next ones.

    `order`, int64 [B, G, c], has each head's clusters, the best first; cluster i has `sizes` tokens, those from
    `starts` on in `members`, int32 [B, G, n]. Gives the tokens of the clusters taken, int32 [B, G, most], the `zone`,
    int32 [B], next ones of the first `number`, int32 [B], clusters, int32 [B, G, most_next], and the logarithms of
    their sizes, float32; −1 fills ids. Where no head of a row has room there are no next ones. All tensors are
    contiguous. Raises KVBenchError where shapes do not fit.
    """
    batch, groups, clusters = order.shape
    for what, tensor, shape in (
        ("the order", order, (batch, groups, clusters)), ("sizes", sizes, (batch, groups, clusters)),
        ("starts", starts, (batch, groups, clusters)), ("members", members, (batch, groups, members.shape[-1])),
        ("room", left, (batch, groups)), ("the zone", zone, (batch,)), ("the number of clusters", number, (batch,)),
    ):  # fmt: skip
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise KVBenchError(f"{what} {list(tensor.shape)} are not a contiguous {list(shape)}.")
    if not compiled(sizes):
        return _twin(order, sizes, starts, members, left, zone, number, most, most_next)
    ends = torch.empty_like(sizes)
    taken = torch.empty_like(left)
    tokens = sizes.new_empty(batch, groups, most)
    next_ids = sizes.new_empty(batch, groups, most_next)
    masses = torch.empty(batch, groups, most_next, device=sizes.device)
    with device_of(sizes):
        _take[(batch * groups,)](
            order, sizes, left, zone, number, ends, taken, next_ids, masses, clusters, groups, most_next,
            min(1024, next_power_of_2(clusters)), next_power_of_2(groups), num_warps=4,
        )  # fmt: skip
        block = 128
        _expand[(-(-most // block), batch * groups)](
            order, sizes, starts, members, ends, taken, tokens, clusters, members.shape[2], most,
            clusters.bit_length() + 1, block, num_warps=4,
        )  # fmt: skip
    return tokens, next_ids, masses


def _twin(
    order: Tensor, sizes: Tensor, starts: Tensor, members: Tensor, left: Tensor, zone: Tensor, number: Tensor,
    most: int, most_next: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    clusters = order.shape[2]
    ordered = sizes.gather(-1, order)
    ends = ordered.cumsum(-1)
    fits = ends <= left[..., None]
    slots = torch.arange(most, device=sizes.device)
    within = ends.masked_fill(~fits, torch.iinfo(torch.int64).max)
    place = torch.searchsorted(within, slots.expand(*sizes.shape[:2], most).contiguous(), right=True)
    place = place.clamp_max(clusters - 1)
    first = starts.gather(-1, order).gather(-1, place) - (ends - ordered).gather(-1, place)
    token = members.gather(-1, (first + slots).clamp(0, members.shape[2] - 1).long())
    last = (ordered * fits).sum(-1, keepdim=True)
    ranks = torch.arange(most_next, device=sizes.device)
    zone = torch.where(left.amax(1) > 0, zone, 0)
    at = fits.sum(-1, keepdim=True) + ranks
    real = (ranks < zone[:, None, None]) & (at < number[:, None, None])
    cluster = order.gather(-1, at.clamp_max(clusters - 1))
    masses = sizes.gather(-1, cluster).float().log().masked_fill(~real, 0)
    return torch.where(slots < last, token, -1).int(), torch.where(real, cluster, -1).int(), masses
