"""The cache of a batch: collects the prompt, hands it to the policy's stores and counts what is held."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, LinearAttentionLayer

from kvbench.contract.budget import BudgetRequest, LayerBudget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.storage import KVStore
from kvbench.engine.cached_layer import NO_COPY, HybridCacheLayer, PolicyCacheLayer
from kvbench.engine.governor import Governor
from kvbench.engine.lanes import Lane
from kvbench.engine.prompt import Attends


class PolicyCache(Cache):
    """The cache of one batch: transformers' own layers, but for those of full attention, which a policy governs."""

    def __init__(self, session: Governor, prompt_tokens: int | None, rows: int | None) -> None:
        """A cache of `rows` rows (None where unknown) whose prompt ends after `prompt_tokens`, or the first call."""
        self.session = session
        self.prompt_tokens, self.rows = prompt_tokens, rows
        layers = DynamicCache(config=session.config).layers
        self.governed: list[PolicyCacheLayer] = []
        for index, number in enumerate(session.numbers):
            kind = HybridCacheLayer if isinstance(layers[number], LinearAttentionLayer) else PolicyCacheLayer
            layers[number] = kind(session, self, index, number, layers[number])
            self.governed.append(layers[number])
        super().__init__(layers=layers)
        self._latest: Any = None
        self.dense: dict[int, Attends | None] = dict.fromkeys(session.dense)
        """What the full-attention layers that the policy leaves exact were called with, by number, once known."""
        self.lanes = [Lane(None, 0)]
        self.mask: Any = None
        """The attention mask of the prompt's last forward call."""
        self.budgets: dict[int, tuple[BudgetRequest | None, list[LayerBudget]]] = {}
        self.index_s = 0.0
        self.prompt_ids: list[Tensor | None] = []
        self.complete = False
        """Whether the policy has taken over the whole prompt."""
        self.handed_over = False
        """Whether steps of fixed shapes have taken over what the stores held."""
        self.known_ids: list[Tensor] | None = []
        """The token ids so far, call by call; None once a call brought embeddings."""
        self.open = self.failed = False
        """Whether a forward call of the attached model is under way with this cache; whether one ended in an error."""

    def expect(self, ids: Tensor | None, padding: Tensor | None) -> None:
        """Prepare for a further part of the prompt: its ids [B, m], where given, and all rows' padding [B] so far."""
        self.prompt_ids.append(ids)
        if self.session.policy.exact or padding is None:
            return
        if self.session.defers:  # a budget for each row
            self.lanes = [Lane(torch.tensor([row]), pad) for row, pad in enumerate(padding.tolist())]
        elif bool(padding.any()):
            pads = sorted(set(padding.tolist()))
            self.lanes = [Lane((padding == pad).nonzero().squeeze(-1), pad) for pad in pads]
        else:
            self.lanes = [Lane(None, 0)]

    def note(self, ids: Tensor | None) -> None:
        """Keep the ids [B, m] of a forward call, where it has any."""
        if ids is None:
            self.known_ids = None
        elif self.known_ids is not None:
            self.known_ids.append(ids)

    @property
    def ids(self) -> Tensor | None:
        """The token ids [B, n] so far; None where the model was given embeddings."""
        if not self.known_ids:
            return None
        self.known_ids = [torch.cat(self.known_ids, dim=1)]
        return self.known_ids[0]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise KVBenchError(NO_COPY)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass new keys and values on to a layer."""
        self._latest = self.layers[layer_idx]
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def source(self, key: Tensor) -> PolicyCacheLayer | None:
        """The governed layer whose tokens an attention call attends to, by the `key` that it was given.

        Layers of some models share another layer's keys, or are run several times: their number does not say it.
        """
        if isinstance(self._latest, PolicyCacheLayer) and self._latest.pending:
            return self._latest
        return next((layer for layer in self.governed if layer.returned is not None and layer.returned() is key), None)

    def stores(self) -> list[KVStore]:
        """The stores of all governed layers and lanes."""
        return [layer.store for cached in self.governed for layer in cached.by_lane]

    def bytes(self) -> dict[str, int]:
        """Bytes held now: `resident` on the device, `offloaded` on the host, `index` in the policy's structures."""
        stores = self.stores()
        own = sum(_tensor_bytes(layer) for layer in self.layers if type(layer) is not PolicyCacheLayer)
        return {
            "resident": own + sum(store.resident_bytes for store in stores),
            "offloaded": sum(store.offloaded_bytes for store in stores),
            "index": sum(store.index_bytes for store in stores),
        }

    def device_bytes(self) -> dict[str, int]:
        """The `resident` bytes by the device that holds them; empty where the model lies on one."""
        found: dict[str, int] = {}
        for layer in self.governed:
            for lane in layer.by_lane:
                place = str(lane.store.device)
                found[place] = found.get(place, 0) + lane.store.resident_bytes
        return found if len(found) > 1 else {}

    def allocate(self, lane: int, tokens: int) -> tuple[BudgetRequest | None, list[LayerBudget]]:
        """What was asked for a lane, rows of `tokens` prompt tokens, and the budgets of the governed layers."""
        key = lane if self.session.defers else tokens
        if key not in self.budgets:
            numbers = [layer.number for layer in self.governed]
            measured = [layer.measured(self.lanes[lane]) for layer in self.governed] if self.session.defers else []
            self.budgets[key] = self.session.allocate(numbers, tokens, measured)
        return self.budgets[key]

    def finish_prompt(self) -> None:
        """Let the policy take over the layers that waited, once the whole prompt has passed through the model."""
        if all(layer.waiting is not None for layer in self.governed):
            start = self.session.now()
            for place, lane in enumerate(self.lanes):
                self.allocate(place, lane.tokens(self.governed[0].prompt_keys))
            self.index_s += self.session.now() - start
            for layer in self.governed:
                layer.finish_prompt()


def _tensor_bytes(layer: Any) -> int:
    """Bytes of the keys, values and states that one of transformers' own cache layers holds."""
    held = [part for value in vars(layer).values() for part in (value.values() if isinstance(value, dict) else [value])]
    tensors = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in held if isinstance(part, Tensor)}
    return sum(storage.nbytes() for storage in tensors.values())
