"""FP8: each number of keys and values as an 8-bit float, as serving engines store caches without calibration."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.kernels.codes import Layout
from kvbench.strategies.compressing.coded_tokens import CodedTokens, CodingPolicy

_KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class FP8Tokens(CodedTokens):
    """8-bit floats, x ≈ scale · code; what exceeds the format's largest number is held as that number."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round to nearest even, within the format's range."""
        kind, wide = _KINDS[self.options.format], x.float()
        largest = torch.finfo(kind).max
        scale = wide[..., :0]
        if self.options.scale == "token":
            scale = (wide.abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
            wide = wide / scale
        return wide.clamp(-largest, largest).to(kind).view(torch.uint8), scale

    @property
    def layout(self) -> Layout:
        """Floats of the format."""
        return Layout(self.options.format)


class FP8(CodingPolicy):
    """Keeps every token in 8-bit floats (Micikevicius et al., FP8 Formats for Deep Learning), the newest one as well.

    Without a scale, as serving engines store caches by default: E4M3 holds up to 448. With `scale=token` each head's
    key and value has one of its own, in float32.
    """

    name = "fp8"
    summary = "Keeps every token in 8-bit floats, E4M3 without a scale by default."
    reference = "Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433"
    never_exact = "keys and values are held in 8 bits"
    codes = FP8Tokens

    class Options(extension.Options):
        """Options of FP8."""

        format: Literal["e4m3", "e5m2"] = Field("e4m3", description="bits of exponent and mantissa")
        scale: Literal["none", "token"] = Field("none", description="none, or one for each head's key and value")
