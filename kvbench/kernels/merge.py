"""Merges partial attentions over disjoint sets of tokens by their log-sum-exps, in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.kernels.support import compiled, device_of, empty_or, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _merge(
    parts: tl.tensor, part_lses: tl.tensor, output: tl.tensor, lse: tl.tensor, heads: int, count: int,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    head = tl.program_id(0)
    channel = tl.arange(0, BLOCK_D)
    every = tl.arange(0, COUNT)
    all_lses = tl.load(part_lses + every * heads + head, mask=every < count, other=float("-inf"))
    peak = tl.max(all_lses, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(all_lses - peak), 0)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, count, STEP):
        part = first + tl.arange(0, STEP)
        own = tl.load(part_lses + part * heads + head, mask=part < count, other=float("-inf"))
        weights = tl.exp(own - peak)
        # an empty part's output was never written
        mask = (weights > 0)[:, None] & (channel < D)[None, :]
        rows = (part.to(tl.int64) * heads + head)[:, None] * D + channel[None, :]
        sums += tl.sum(tl.load(parts + rows, mask=mask, other=0.0).to(tl.float32) * weights[:, None], 0)
    filled = total > 0
    total = tl.where(filled, total, 1.0)
    result = sums / total
    tl.store(output + head.to(tl.int64) * D + channel, result.to(output.dtype.element_ty), mask=channel < D)
    tl.store(lse + head, tl.where(filled, peak + tl.log(total), float("-inf")))


def launch_merge(parts: Tensor, part_lses: Tensor, output: Tensor, lse: Tensor) -> None:
    """Launch the kernel: contiguous `parts` [P, B, H, 1, d] and `part_lses` [P, B, H] into `output` and `lse`."""
    count, batch, heads = part_lses.shape
    dim = parts.shape[-1]
    with device_of(output):
        _merge[(batch * heads,)](
            parts, part_lses, output, lse, batch * heads, count,
            dim, next_power_of_2(dim), next_power_of_2(count), min(16, next_power_of_2(count)), num_warps=4,
        )  # fmt: skip


@kernel
def merge(
    parts: Tensor,
    part_lses: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    output: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge P partial attentions, contiguous outputs [P, B, H, 1, d] and log-sum-exps [P, B, H] (float32).

    Gives the attention over the union, [B, H, 1, d] in `dtype`, and its log-sum-exp [B, H] in float32, written to
    `output` and `lse` where given. A part with log-sum-exp −∞ is empty and its output is not read; where all are
    empty the output is 0. RetrievalAttention (arXiv 2409.10516), equation 5.
    """
    shape = (*part_lses.shape[1:], 1, parts.shape[-1])
    output = empty_or(output, shape, dtype, parts.device)
    lse = empty_or(lse, tuple(part_lses.shape[1:]), torch.float32, parts.device)
    if compiled(parts):
        launch_merge(parts.contiguous(), part_lses.contiguous(), output, lse)
    else:
        _twin(parts, part_lses, output, lse)
    return output, lse


def _twin(parts: Tensor, part_lses: Tensor, output: Tensor, lse: Tensor) -> None:
    lse.copy_(part_lses.logsumexp(0))
    weights = (part_lses - torch.where(lse.isfinite(), lse, 0)).exp()[..., None, None]
    output.copy_(torch.where(weights > 0, parts.float(), 0).mul_(weights).sum(0))
