"""Further passes of the model over a stored prompt, which see every layer's vectors and leave the cache as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.policy import Observe

if TYPE_CHECKING:
    from kvbench.engine.cache import PolicyCache
    from kvbench.engine.lanes import Lane


class ReplayCache(Cache):
    """What a replay attends to: one lane of a `PolicyCache`, read and never written.

    Governed layers give the store's tokens and the replayed ones; sliding-window layers are copies that go their own
    way.
    """

    def __init__(self, cache: PolicyCache, lane: Lane, layers: list[Layer], observe: Observe) -> None:
        governed = {layer.number: layer for layer in layers}
        own = [
            _ReplayLayer(governed[number])
            if number in governed and not isinstance(held, LinearAttentionCacheLayerMixin)
            else _copied(held, lane, layers[0].tokens)
            for number, held in enumerate(cache.layers)
        ]
        super().__init__(layers=own)
        self._observe, self._latest = observe, own[0]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass new keys and values on to a layer."""
        self._latest = self.layers[layer_idx]
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def observed(self, queries: Tensor, keys: Tensor) -> None:
        """Show the policy what the layer that was updated last attends with, where a policy governs it."""
        held = self._latest
        if isinstance(held, _ReplayLayer) and held.pending:
            held.pending = False
            self._observe(held.layer, queries, keys[:, :, held.layer.tokens :])


class Replayer:
    """`kvbench.contract.policy.Replay` for one lane of a session's cache."""

    def __init__(
        self, run: Callable[[Tensor, Observe], Tensor], first: Tensor | None, known: Tensor | None, ends: set[int]
    ) -> None:
        """`run` gives the logits [B, V] after the ids; `first` are those after the prompt, `known` the ids [B, m] that
        follow it, where there are any, `ends` the ids that end an answer."""
        self._run, self._first, self._known, self._ends = run, first, known, ends

    def __call__(self, ids: Tensor, observe: Observe) -> None:
        """Run ids [B, m] through the model, show each layer's vectors and forget them."""
        self._run(ids, observe)

    def continuation(self, tokens: int) -> Tensor:
        """What follows the prompt under exact attention; see `kvbench.contract.policy.Replay`."""
        found, logits = self._known, self._first
        if found is not None and found.shape[1] >= tokens:
            return found[:, :tokens]
        ended: Tensor | None = None
        while found is None or found.shape[1] < tokens:
            if found is not None:
                logits = self._run(found.clamp_min(0), _unseen)
            if logits is None:
                raise KVBenchError("The model gave no logits after its prompt, so what follows it is not known.")
            after = logits.argmax(-1, keepdim=True)
            ended = torch.zeros_like(after, dtype=torch.bool) if ended is None else ended
            for end in self._ends:
                ended = ended | (after == end)
            after = after.masked_fill(ended, -1)
            if bool(ended.all()):
                break
            found = after if found is None else torch.cat([found, after], dim=1)
        return after[:, :0] if found is None else found


def ends_of(model: Any) -> set[int]:
    """Token ids that end what a model generates."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {found} if isinstance(found, int) else set(found or ())


def _unseen(layer: Layer, queries: Tensor, keys: Tensor) -> None:
    """What a layer sees of the continuation is not looked at."""


class _ReplayLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer, self.is_initialized, self.pending = layer, True, False
        if layer.store.static_tokens != layer.tokens or layer.store.static_ids.dim() != 1:
            raise KVBenchError(
                f"The prompt of layer {layer.number} is not whole any more, so nothing can be replayed after it: "
                "a policy evicts and sets tokens aside after its last replay."
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The stored prompt's keys and values with the replayed ones [B, G, m, d] behind them; nothing is kept."""
        self.pending = True
        keys, values = self.layer.store.raw()
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover the prompt and the replayed tokens."""
        return self.layer.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of the prompt: positions count on from here."""
        return self.layer.tokens

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


def _copied(held: CacheLayerMixin, lane: Lane, tokens: int) -> CacheLayerMixin:
    """A sliding-window layer's state for the lane's rows of `tokens` tokens, without their padding."""
    if not isinstance(held, CacheLayerMixin | LinearAttentionCacheLayerMixin):  # one that holds nothing
        return held
    if type(held) is not DynamicSlidingWindowLayer:
        raise KVBenchError(
            f"A policy cannot replay tokens through a cache layer of type {type(held).__name__}, whose state cannot be "
            "set back: choose a policy that makes one pass, or another model."
        )
    copied = copy.copy(held)
    keys, values = lane.take(held.keys), lane.take(held.values)
    copied.keys, copied.values = keys[:, :, -tokens:], values[:, :, -tokens:]
    copied.cumulative_length = tokens
    return copied
