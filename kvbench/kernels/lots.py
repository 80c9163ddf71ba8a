"""Random numbers that depend on a seed, a head, a step and a slot alone, drawn on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.kernels.support import compiled, device_of, jit, kernel

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _mix(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _lots(
    heads: tl.tensor, steps: tl.tensor, counts: tl.tensor, lots: tl.tensor, number: int, n: int, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(1)
    b, h = row // number, row % number
    head = _mix(tl.load(heads + h).to(tl.uint32))
    step = _mix(tl.load(steps + b).to(tl.uint32))
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = _mix(_mix(head ^ step) ^ slot.to(tl.uint32)) % 0x7F800000
    found = tl.where(slot < tl.load(counts + b), found.to(tl.int32).to(tl.float32, bitcast=True), float("-inf"))
    tl.store(lots + row.to(tl.int64) * n + slot, found, mask=slot < n)


@kernel
def lots(heads: Tensor, steps: Tensor, counts: Tensor, n: int) -> Tensor:
    """Random numbers of 0 and more, float32 [B, H, n], −∞ from `counts`, int32 [B], on.

    `heads`, int64 [H], are the heads' seeds, and `steps`, int32 [B], name each row's draw; their lowest 32 bits count.
    """
    batch, number = steps.shape[0], heads.shape[0]
    if compiled(steps):
        found = torch.empty(batch, number, n, device=steps.device)
        block = 1024
        with device_of(steps):
            _lots[(-(-n // block), batch * number)](heads, steps, counts, found, number, n, block, num_warps=4)
        return found
    slots = torch.arange(n, device=steps.device)
    return lots_of(heads, steps, slots).masked_fill(slots >= counts[:, None, None], -torch.inf)


def lots_of(heads: Tensor, steps: Tensor, slots: Tensor) -> Tensor:
    """The numbers of `lots` for some slots, integers [n] or [B, H, n]."""
    drawn = mixed(mixed(heads) ^ mixed(steps.long())[:, None])[..., None] ^ slots
    # the bits of positive floats, so that hardly any two are equal
    return (mixed(drawn) % 0x7F800000).int().view(torch.float32)


def seeds(seed: int, layer: int, heads: int, device: torch.device) -> Tensor:
    """What tells the draws of each of a layer's heads from others, int64 [H]."""
    return torch.arange(heads, device=device) + (seed * 1_000_003 + layer) * 1_009


def mixed(numbers: Tensor) -> Tensor:
    """A bijection of 32 bits whose every bit of input changes each bit of output half of the time (lowbias32).

    C. Wellons, Prospecting for Hash Functions, 2018.
    """
    x = numbers & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)
