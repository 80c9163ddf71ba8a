"""INT8: each key and value of a head in 8 bits a channel, with one scale for the vector."""

import torch
from torch import Tensor

from kvbench.kernels.codes import Layout
from kvbench.strategies.compressing.coded_tokens import CodedTokens, CodingPolicy


class Int8Tokens(CodedTokens):
    """Symmetric rounding: x ≈ scale · code, code in −127 … 127, scale = max |x| / 127 in float32."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round to nearest."""
        wide = x.float()
        scale = (wide.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return (wide / scale).round_().to(torch.int8).view(torch.uint8), scale

    @property
    def layout(self) -> Layout:
        """Integers."""
        return Layout("int8")


class Int8(CodingPolicy):
    """Keeps every token in 8 bits a number, the newest one as well: each head's key and value has a scale of its own.

    The plain baseline of quantised caches, at the granularity that serving engines call per token and head.
    """

    name = "int8"
    summary = "Keeps every token in 8-bit integers, with one scale for each head's key and value."
    never_exact = "keys and values are held in 8 bits"
    codes = Int8Tokens
