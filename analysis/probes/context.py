"""The whole context beside a policy: every key and value, kept for probes, and what a policy attended to at a step."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbench.contract.attention import scores
from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.probe import Probe
from kvbench.contract.selection import Selection
from kvbench.contract.storage import TokenBuffer

_CONTEXT, _STEP = "kvbench.analysis.probes.context", "kvbench.analysis.step"


@dataclass
class Step:
    """One decoding step of one layer against exact attention over the whole context of n tokens.

    `logits`: scaled scores q·k/√d, float32 [B, H, n]. `attended`: bool [B, H, n]. `candidates`: bool [n], the tokens
    that the policy chooses from (all but sinks and window). `wanted`: how many of them the budget lets it choose;
    `counts`, int64 [B, H], where heads have different budgets, of which `wanted` is the largest.
    """

    logits: Tensor
    attended: Tensor
    candidates: Tensor
    wanted: int
    counts: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """Softmax weights over the whole context, float64 [B, H, n]."""
        return self.logits.double().softmax(-1)


class ContextProbe(Probe):
    """A probe that compares the policy with exact attention: keeps all keys and values, for all probes of its kind."""

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> Generator[None, Any, Any]:
        """Copy the prompt before the policy evicts any of it."""
        if _CONTEXT not in layer.state:
            layer.state[_CONTEXT] = TokenBuffer(keys.clone(), values.clone())
        return (yield)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> Generator[None, Any, Any]:
        """Copy the new tokens."""
        context = layer.state[_CONTEXT]
        if context.length < layer.tokens:
            context.append(keys, values)
        return (yield)

    @staticmethod
    def context(layer: Layer) -> TokenBuffer:
        """All keys and values of the context so far."""
        found: TokenBuffer = layer.state[_CONTEXT]
        return found

    @staticmethod
    def step(layer: Layer, queries: Tensor, selection: Selection) -> Step:
        """The current step, computed once for all probes."""
        known = layer.state.get(_STEP)
        if known is None or known[0] != layer.tokens:
            known = layer.state[_STEP] = layer.tokens, _step(layer, queries, selection)
        found: Step = known[1]
        return found


def _step(layer: Layer, queries: Tensor, selection: Selection) -> Step:
    keys = layer.state[_CONTEXT].keys
    store, tokens = layer.store, layer.tokens
    attended = torch.zeros(layer.rows, layer.heads, tokens + 1, dtype=torch.bool, device=keys.device)
    static = store.static_ids
    if static.dim() == 1:
        attended[:, :, static] = True
    else:
        share = static.repeat_interleave(layer.heads // layer.kv_heads, dim=1)
        attended.scatter_(2, torch.where(share < 0, tokens, share), True)
    if selection.everything:
        heads = torch.ones(1, layer.kv_heads, dtype=torch.bool) if selection.heads is None else selection.heads
        everywhere = heads.to(keys.device).repeat_interleave(layer.heads // layer.kv_heads, dim=1)[..., None]
        attended[:, :, store.aside_start : store.aside_stop] = everywhere
    elif selection.ids is not None:
        ids = selection.ids.to(keys.device)
        if ids.shape[1] != layer.heads:
            ids = ids.repeat_interleave(layer.heads // layer.kv_heads, dim=1)
        _check(layer, ids, attended)
        attended.scatter_(2, torch.where(ids < 0, tokens, ids), True)
    positions = torch.arange(tokens, device=keys.device)
    sinks, window = layer.static
    if store.aside_stop > store.aside_start:
        candidates = (positions >= store.aside_start) & (positions < store.aside_stop)
        static_tokens = store.static_tokens
    else:
        candidates = (positions >= sinks) & (positions < tokens - window)
        static_tokens = sinks + window
    available = int(candidates.sum())
    return Step(
        layer.capped(scores(queries, keys, layer.scaling)), attended[..., :tokens], candidates,
        layer.budget.beside(static_tokens, available), layer.budget.counts(static_tokens, available, layer.heads),
    )  # fmt: skip


def _check(layer: Layer, ids: Tensor, attended: Tensor) -> None:
    """Hold a selection to the contract: set-aside tokens only, none twice."""
    chosen = ids[ids >= 0]
    start, stop = layer.store.aside_start, layer.store.aside_stop
    if chosen.numel() and (int(chosen.min()) < start or int(chosen.max()) >= stop):
        raise KVBenchError(
            f"The policy selected tokens {int(chosen.min())} to {int(chosen.max())} at layer {layer.number}; expected "
            f"set-aside tokens, {start} to {stop - 1}: the others are attended already and would count twice."
        )
    counts = torch.zeros_like(attended, dtype=torch.int32)
    counts.scatter_add_(2, torch.where(ids < 0, layer.tokens, ids), (ids >= 0).int())
    if bool((counts > 1).any()):
        raise KVBenchError(f"The policy selected a token twice at layer {layer.number}: it would be attended twice.")
