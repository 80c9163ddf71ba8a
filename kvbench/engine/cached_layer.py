"""A layer of a policy's cache: collects its part of the prompt and hands it to the policy's stores."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from kvbench.contract.budget import BudgetRequest, LayerBudget, PromptLayer, allocate_heads
from kvbench.contract.errors import KVBenchError
from kvbench.contract.latents import LatentStore
from kvbench.contract.layer import Layer
from kvbench.contract.storage import KVStore, TokenBuffer
from kvbench.engine.governor import Governor
from kvbench.engine.lanes import Lane, last_queries
from kvbench.engine.prompt import Attends, finite
from kvbench.engine.rotary import Rotary
from kvbench.engine.validation import static_tokens

NO_COPY = (
    "A policy's cache cannot be copied, since its stores and indexes belong to one conversation: start the other one "
    "from its prompt."
)


class LayersCache(Protocol):
    """What a layer asks of the cache that it is part of."""

    open: bool
    prompt_tokens: int | None
    lanes: list[Lane]
    index_s: float
    dense: dict[int, Attends | None]

    @property
    def governed(self) -> Sequence[PolicyCacheLayer]:
        """The governed layers, in the model's order."""

    def allocate(self, lane: int, tokens: int) -> tuple[BudgetRequest | None, list[LayerBudget]]:
        """What was asked for a lane, and the budgets of the governed layers."""


class PolicyCacheLayer(CacheLayerMixin):
    """One governed layer of the cache: collects the prompt, then hands it to the policy's stores."""

    is_sliding = False
    is_compileable = False

    def __init__(
        self, session: Governor, cache: LayersCache, ordinal: int, number: int, replaced: CacheLayerMixin
    ) -> None:
        super().__init__()
        self.session, self.cache, self.ordinal, self.number = session, cache, ordinal, number
        self.expand = session.survey.layers[number].expand
        self.longest: int | None = getattr(replaced, "sliding_window", None)
        """The window of a model whose longest context it holds: there is no attention beyond it to govern."""
        self.seen = 0
        self.prompt: TokenBuffer | None = None
        self.prompt_queries: list[Tensor] = []
        self.by_lane: list[Layer] = []
        """The layer as policies see it, for the rows of each lane; empty until the policy takes over the prompt."""
        self.attended = 0
        """Tokens that came through the attention function, to notice a model that goes around it."""
        self.new: tuple[Tensor, Tensor] | None = None
        """What a decoding step gave to the cache."""
        self.pending = False
        """Whether its attention is still to come in this forward call."""
        self.in_prompt = True
        """Whether this forward call is part of the prompt."""
        self.before_step = 0
        """Tokens of the context before this forward call."""
        self.checked = False
        """Whether a decoding step's mask was looked at."""
        self.returned: weakref.ref[Tensor] | None = None
        """The keys that the latest update returned."""
        self.waiting: Attends | None = None
        """Set once the prompt's attention is done."""
        self.readers: dict[nn.Module, list[Layer]] = {}
        """The layers of other attention modules that read this layer's tokens."""
        self.prompt_states: dict[tuple[int, ...] | None, dict[str, Any]] = {}
        """What the policy keeps between chunks of the prompt, by the rows of a group."""
        self.reduced: list[Tensor] = []
        """What the policy keeps of the prompt's hidden states, call by call."""
        self.hidden: list[Tensor] = []
        """What the allocator keeps of the prompt's hidden states, call by call."""

        self.given: tuple[Tensor, Tensor] | None = None
        """Keys and values that the model got from the latest `update` and has not attended to yet."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: what is held lies in stores, and `keys` and `values` stay None."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values [B, G, m, d]; return those that the model's own attention would attend to."""
        if not self.cache.open:
            raise KVBenchError(
                "This cache belongs to a policy: pass it to the attached model itself, inside the `with` block of "
                "kvbench.attach that filled it, or start from the prompt."
            )
        self.given = self.take(key_states, value_states)
        return self.given

    def check_given(self, keys: Tensor, values: Tensor) -> None:
        """Raise where the model's attention is given other `keys` and `values` than `update` returned, or none came.

        A policy attends to what is in the cache: a model that repeats, shares or changes it afterwards would silently
        get another attention than its own. Copies are compared number by number; the same tensors cost nothing.
        Where the survey found that keys and values are made of what the cache holds, tokens must be as many, and the
        first and the last be what they are made alone.
        """
        given, self.given = self.given, None
        if self.session.policy.exact and not self.session.probes:
            return
        for name, mine, theirs in zip(("keys", "values"), given or (None, None), (keys, values), strict=True):
            if self.expand is not None and mine is not None and theirs.shape[2] == mine.shape[2]:
                continue
            if theirs is mine or (mine is not None and theirs.shape == mine.shape and torch.equal(theirs, mine)):
                continue
            came = "none came from the cache" if mine is None else f"{list(mine.shape)} came from the cache"
            raise KVBenchError(
                f"{type(self.session.model).__name__} attends in layer {self.number} to other {name} than its cache "
                f"gave ({came}, {list(theirs.shape)} reached the attention), so no policy can govern it: choose "
                "another model, or policy 'full' without probes."
            )
        if self.expand is not None and given is not None and not self.expand.gives(*given, keys, values):
            raise KVBenchError(
                f"{type(self.session.model).__name__} makes other keys or values of what the cache of layer "
                f"{self.number} holds at this length of the context ({self.seen} tokens) than at its start, so no "
                "policy can govern it: choose a shorter context, another model, or policy 'full' without probes."
            )

    def take(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Do `update`'s work, whoever asks."""
        if self.cache.prompt_tokens is None:
            self.cache.prompt_tokens = key_states.shape[2]
        self.before_step, self.seen = self.seen, self.seen + key_states.shape[2]
        if self.longest is not None and self.seen > self.longest:
            raise KVBenchError(
                f"Layer {self.number} of {type(self.session.model).__name__} has a window of {self.longest} tokens and "
                f"the context has {self.seen}: a policy governs it only where the window holds everything."
            )
        self.in_prompt, self.pending = not self.by_lane, True
        taken = self._take_prompt if self.in_prompt else self._take_step
        keys, values = taken(key_states, value_states)
        self.returned = weakref.ref(keys)
        return keys, values

    def _take_step(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.new = keys, values
        if not self.session.policy.exact:
            return keys, values
        store = self.by_lane[0].store
        store.append(keys, values)
        return store.raw()

    def _take_prompt(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.cache.prompt_tokens is not None
        if self.seen > self.cache.prompt_tokens:
            raise KVBenchError(
                f"A forward call took the prompt to {self.seen} tokens, past the {self.cache.prompt_tokens} that "
                "prompt_tokens announced: split the call where the prompt ends."
            )
        if self.prompt is None:
            self.prompt = TokenBuffer(keys, values)
        else:
            self.prompt.append(keys, values)
        return self.prompt.keys, self.prompt.values

    def end_prompt(self, attends: Attends) -> None:
        """Note that the prompt's attention is done; the policy takes over now, or when the allocator has measured."""
        assert self.prompt is not None
        session = self.session
        keys, values = self.prompt.keys, self.prompt.values
        self.waiting = attends
        if not session.policy.exact and not (finite(keys) and finite(values)):
            raise KVBenchError(
                f"Layer {self.number} of {type(session.model).__name__} gave keys or values that are NaN or infinite: "
                "load the model in another dtype (--dtype float32), or check its weights."
            )
        if not session.defers:
            self.finish_prompt()

    def decode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what the cache holds of tokens."""
        return (keys, values) if self.expand is None else self.expand(keys, values)

    @property
    def prompt_keys(self) -> Tensor:
        """The prompt's keys [B, G, n, d], until the policy takes over."""
        assert self.prompt is not None
        return self.decode(*self.prompt.raw)[0]

    def measured(self, lane: Lane) -> Any:
        """What the allocator measures in this layer for a lane."""
        assert self.session.allocator is not None
        return self.session.allocator.measure(self._prompt_layer(lane))

    def _prompt_layer(self, lane: Lane) -> PromptLayer:
        assert self.waiting is not None and self.session.allocator is not None
        keys = lane.take(self.prompt_keys, padded=True)
        queries = torch.cat(self.prompt_queries, dim=2)
        queries = last_queries(lane.take(queries), min(self.session.allocator.query_window, keys.shape[2]))
        hidden = torch.cat(self.hidden, dim=1) if self.hidden else None
        if hidden is not None and lane.rows is not None:
            hidden = hidden[lane.rows, lane.padding :]
        return PromptLayer(self.ordinal, self.number, self.waiting.scaling, queries, keys, hidden)

    def finish_prompt(self) -> None:
        """Split the prompt into its lanes; each gets its budget and is taken over by the policy."""
        assert self.prompt is not None and self.waiting is not None
        session, window = self.session, self.session.query_window(self.number)
        attends, keys, values = self.waiting, self.prompt.keys, self.prompt.values
        queries = torch.cat(self.prompt_queries, dim=2) if len(self.prompt_queries) > 1 else self.prompt_queries[0]
        self.prompt_queries = [queries]
        budgets = []
        start = session.now()
        for place, lane in enumerate(self.cache.lanes):
            request, shares = self.cache.allocate(place, lane.tokens(keys))
            budget = shares[self.ordinal]
            if session.allocator is not None and request is not None:
                budget = allocate_heads(session.allocator, self._prompt_layer(lane), request, budget)
            budgets.append(budget)
        self.cache.index_s += session.now() - start
        reduced = torch.cat(self.reduced, dim=1) if self.reduced else None
        self.prompt, self.prompt_queries, self.waiting, self.hidden, self.reduced = None, [], None, [], []
        for lane, budget in zip(self.cache.lanes, budgets, strict=True):
            held = lane.take(keys, padded=True), lane.take(values, padded=True)
            lane_keys, lane_values = self.decode(*held)
            tokens, groups = lane_keys.shape[2], lane_keys.shape[1]
            lane_queries = last_queries(lane.take(queries), tokens if window is None else min(window, tokens))
            layer = self.new_layer(attends, budget, lane_keys.shape[0], groups, lane_keys.shape[3], tokens)
            layer.store = KVStore(*held) if self.expand is None else LatentStore(*held, self.expand, groups)
            layer.state = self.prompt_states.pop(None if lane.rows is None else tuple(lane.rows.tolist()), {})
            layer.store.room = budget.every
            self.by_lane.append(layer)
            if session.query_window(self.number, policy=False) != 0:
                layer.prompt_queries = lane_queries
            if reduced is not None:
                layer.prompt_hidden = (reduced if lane.rows is None else reduced[lane.rows])[:, lane.padding :]
            asked = session.policy.query_window
            policy_queries = lane_queries if asked is None else last_queries(lane_queries, min(asked, tokens))
            start = session.now()
            session.call("prefill", layer=layer, queries=policy_queries, keys=lane_keys, values=lane_values)
            self.cache.index_s += session.now() - start
            layer.prompt_queries = layer.prompt_hidden = None

    def new_layer(
        self, attends: Attends, budget: LayerBudget, rows: int, kv_heads: int, head_dim: int, tokens: int
    ) -> Layer:
        """The layer of the next lane, for a prompt of `tokens` tokens; its store is yet to be set."""
        session = self.session
        store: Any = None
        return Layer(
            ordinal=self.ordinal, count=len(self.cache.governed), number=self.number, heads=attends.heads,
            kv_heads=kv_heads, head_dim=head_dim, scaling=attends.scaling, rows=rows, store=store, budget=budget,
            static=static_tokens(session.policy, tokens), prompt_tokens=tokens, module=attends.module,
            softcap=attends.softcap, sink_logits=attends.sink_logits,
            rotary=Rotary(
                session.model, session.config, attends.module, self.number, latent=self.expand is not None
            ),
            previous=self.cache.governed[self.ordinal - 1].by_lane[len(self.by_lane)] if self.ordinal else None,
            most_attended=session.policy.most_attended, ungoverned=len(self.cache.dense), apart=session.overlaps,
        )  # fmt: skip

    def readers_of(self, attends: Attends) -> list[Layer]:
        """The layers, one for each lane, of another attention module that reads this layer's tokens.

        They share store and state with this layer's own, whose hooks `prefill` and `insert` speak for all.
        """
        module: Any = attends.module
        if module not in self.readers:
            self.readers[module] = [
                replace(layer, number=module.layer_idx, module=module, heads=attends.heads, scaling=attends.scaling,
                        softcap=attends.softcap, sink_logits=attends.sink_logits)
                for layer in self.by_lane
            ]  # fmt: skip
        return self.readers[module]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover the whole context, evicted tokens included."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of the context so far, evicted ones included: positions count on from here."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def _unsupported(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise KVBenchError(
            "A KV-cache policy cannot follow beam search, assisted decoding or cropping, which rewrite the cache: "
            "generate greedily or by sampling, with num_beams=1."
        )

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = reset = _unsupported

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise KVBenchError(NO_COPY)


class HybridCacheLayer(PolicyCacheLayer, LinearAttentionAndFullAttentionLayer):
    """A governed layer that has the states of linear attention, too, which stay transformers' own."""

    def __init__(
        self, session: Governor, cache: LayersCache, ordinal: int, number: int, replaced: LinearAttentionLayer
    ) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=replaced.number_of_states)
        PolicyCacheLayer.__init__(self, session, cache, ordinal, number, replaced)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Prepare for the first keys and values, or for the first states."""
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)
        else:
            PolicyCacheLayer.lazy_initialization(self, *args)
