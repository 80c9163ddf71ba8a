"""Published times of a decoding step, to be shown beside measured ones where they apply."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """A step's published time: `fixed_s` and `token_s` for each token of context, on one card, at batch 1."""

    text: str
    model: str
    card: str
    dtype: str
    fixed_s: float
    token_s: float

    def seconds(self, tokens: float) -> float:
        """A step's seconds at `tokens` tokens of context."""
        return self.fixed_s + self.token_s * tokens


BARS = (
    Bar(
        "vLLM, Llama-3.1-8B on one H100, bfloat16, batch 1, as published: 6.44 ms + 43.7 ns a token of context",
        r"llama-3(\.1)?-8b", "H100", "bfloat16", 6.44e-3, 43.7e-9,
    ),
)  # fmt: skip


def published(model: str, dtype: str, device_name: str | None, batch: int | str) -> Bar | None:
    """The bar for a model on a card; None where nothing was published for just these."""
    for bar in BARS:
        fits = re.search(bar.model, model, re.IGNORECASE) and bar.card in (device_name or "")
        if fits and dtype == bar.dtype and batch == 1:
            return bar
    return None
