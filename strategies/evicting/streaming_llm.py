"""StreamingLLM (arXiv 2309.17453): attention sinks and a sliding window."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.kernels.steps import CompressingStep, GrowingStep, RingStep


class StreamingLLM(KVCachePolicy):
    """Keeps the first tokens and the most recent ones, as many as the budget allows; evicts the rest."""

    name = "streaming_llm"
    summary = "Keeps the first tokens (sinks) and a sliding window of recent ones; evicts the rest."
    reference = "Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453"
    head_budgets = True
    query_window = 0

    class Options(extension.Options):
        """Options of StreamingLLM."""

        sinks: int = Field(4, ge=0, description="first tokens, always kept")

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The sinks and at least one recent token."""
        return self.options.sinks, 1

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep the sinks and fill the rest of the budget with the prompt's last tokens."""
        if layer.budget.covers_all:
            return
        sinks = self.options.sinks
        if layer.budget.heads is not None or layer.budget.every:
            recency = torch.arange(layer.tokens - sinks, device=keys.device, dtype=torch.float32)
            layer.keep_top(recency.expand(layer.rows, layer.kv_heads, -1), first=sinks)
            return
        oldest = layer.tokens - (layer.budget.tokens - sinks)
        kept = torch.cat([torch.arange(sinks), torch.arange(oldest, layer.tokens)])
        layer.store.keep(kept.to(keys.device))
        layer.state["oldest"] = oldest

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """A ring behind the sinks; None where only some rows of the layer evict."""
        if parts[0].layer.budget.every:
            return CompressingStep(self, parts, clock)
        evicting = {not part.layer.budget.covers_all for part in parts}
        if len(evicting) > 1:
            return None
        return RingStep(parts, clock, self.options.sinks) if evicting.pop() else GrowingStep(parts, clock)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Slide the window: each new token drives the oldest one out."""
        if layer.budget.covers_all or layer.budget.every:
            return
        if layer.budget.heads is not None:
            ids = layer.store.static_ids
            layer.store.evict_slots(ids.masked_fill(ids < self.options.sinks, layer.tokens).argmin(-1))
        else:
            layer.store.evict(layer.state["oldest"], keys.shape[2])
            layer.state["oldest"] += keys.shape[2]

    def score_held(self, layer: Layer, held: HeldTokens) -> Tensor:
        """The sinks and the most recent tokens stay."""
        return held.ids.float().masked_fill(held.ids < self.options.sinks, torch.inf)
