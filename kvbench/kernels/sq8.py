"""Numbers held as 8-bit codes with each channel's minimum and range, as faiss' scalar quantiser QT_8bit holds them.

x = low + span · (code + ½) / 255 (Douze et al., The Faiss library, arXiv 2401.08281). Kernels fold the channels' ranges
into the queries, so that the codes themselves, less 128, are the operand of a product: bfloat16 holds them exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import jit

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def fold(queries: tl.tensor, ranges: tl.tensor, c: tl.tensor, D: tl.constexpr) -> tl.tensor:
    """Queries [rows, d] to be multiplied with codes − 128, and each one's product with what all keys share."""
    low = tl.load(ranges + c, mask=c < D, other=0.0)
    span = tl.load(ranges + D + c, mask=c < D, other=0.0)
    shared = tl.sum(queries * (low + span * (128.5 / 255.0))[None, :], 1)
    return queries * (span * (1.0 / 255.0))[None, :], shared


@jit
def unfold(sums: tl.tensor, ranges: tl.tensor, c: tl.tensor, D: tl.constexpr) -> tl.tensor:
    """Weighted means [rows, d] of numbers from those of their codes − 128."""
    low = tl.load(ranges + c, mask=c < D, other=0.0)
    span = tl.load(ranges + D + c, mask=c < D, other=0.0)
    return sums * (span * (1.0 / 255.0))[None, :] + (low + span * (128.5 / 255.0))[None, :]


def check_codes(what: str, codes: Tensor, ranges: Tensor | None, groups: tuple[int, int], dim: int) -> None:
    """Raise KVBenchError unless uint8 codes, and no other rows, have ranges, contiguous float32 [B, G, 2, d]."""
    if ranges is None:
        if not codes.dtype.is_floating_point:
            raise KVBenchError(f"{what} are {codes.dtype}: codes need the channels' minima and ranges [B, G, 2, d].")
        return
    if codes.dtype != torch.uint8:
        raise KVBenchError(f"{what} with minima and ranges are {codes.dtype}, not codes of torch.uint8.")
    if tuple(ranges.shape) != (*groups, 2, dim) or ranges.dtype != torch.float32 or not ranges.is_contiguous():
        raise KVBenchError(
            f"minima and ranges of {what} {list(ranges.shape)} ({ranges.dtype}) are not contiguous float32 "
            f"[{groups[0]}, {groups[1]}, 2, {dim}]."
        )


def decoded(codes: Tensor, ranges: Tensor | None) -> Tensor:
    """Rows [B, G or H, n, d] in float32, from codes where `ranges` [B, G, 2, d] are given."""
    if ranges is None:
        return codes.float()
    ranges = ranges.to(codes.device).repeat_interleave(codes.shape[1] // ranges.shape[1], dim=1)
    return ranges[:, :, :1] + ranges[:, :, 1:] * ((codes.float() + 0.5) / 255)
