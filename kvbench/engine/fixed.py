"""Decoding in steps of fixed shapes: on a GPU one CUDA graph holds a whole step; on the CPU the code runs as it is.

After the prompt each governed layer's stores are handed to the policy's `fixed_step`. A step then is the model's own
forward with a cache that gives the new keys and values alone, positions on the device, and the choice of the next
token; on a GPU it is captured once and replayed, as one CUDA graph, or, where the host takes part in a layer's step
(`SplitStep`), as graphs of what lies between.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from kvbench.contract.budget import LayerBudget
from kvbench.contract.host import event, wait
from kvbench.contract.layer import Layer
from kvbench.contract.step import Clock, FixedStep, Inputs, Part, SplitStep
from kvbench.contract.storage import KVStore
from kvbench.engine.bandwidth import elapsed_s, timer
from kvbench.engine.cache import PolicyCache
from kvbench.engine.cached_layer import HybridCacheLayer, PolicyCacheLayer
from kvbench.engine.calls import left_padding
from kvbench.engine.governor import Governor
from kvbench.engine.inherited import unfollowed
from kvbench.engine.policy_step import only_some_layers, policy_step
from kvbench.kernels.steps import GrowingStep

Mode = Literal["graph", "partial", "fixed", "eager"]
"""How a step ran: one replayed CUDA graph; graphs around what the host does in each layer; the same code uncaptured; or
hook by hook."""

WARM_UPS = 2
_BY_LENGTH = ("dynamic", "longrope")
"""Rotary kinds that ask the device for the longest position at every step."""


class FixedCache(Cache):
    """A cache that holds nothing: its layers give a step's own keys and values, and the steps hold the rest."""

    def __init__(self, count: int) -> None:
        super().__init__(layers=[_FixedLayer() for _ in range(count)])


class _FixedLayer(CacheLayerMixin):
    is_sliding = False
    is_compileable = True

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class _Segments:
    """The CUDA graphs of a step that the host takes part in; they share memory and are replayed in their order."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._pieces: list[tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph, SplitStep]] = []
        self._last: torch.cuda.CUDAGraph
        self._arrived = event()

    def begin(self) -> None:
        """Capture what follows."""
        self._last = torch.cuda.CUDAGraph()
        self._last.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> torch.cuda.CUDAGraph:
        """End the capture."""
        self._last.capture_end()
        return self._last

    def cut(self, step: SplitStep, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Capture a layer's step in the midst of a forward, in three pieces around the host's work."""
        step.before(queries, keys, values)
        before = self.end()
        self.begin()
        step.beside()
        self._pieces.append((before, self.end(), step))
        self.begin()
        return step.after()

    def replay(self) -> float:
        """Take a step; the seconds that the host waited for the device."""
        waited = 0.0
        searched: SplitStep | None = None
        for before, beside, step in self._pieces:
            before.replay()
            self._arrived.record()
            beside.replay()
            if searched is not None:
                searched.ahead()
            began = time.perf_counter()
            wait(self._arrived)
            waited += time.perf_counter() - began
            step.search()
            searched = step
        self._last.replay()
        if searched is not None:
            searched.ahead()
        return waited


class FixedDecoder:
    """The steps of a batch after its prompt, up to `new_tokens` of them; see `fixed_decoder`.

    `tokens` [B, 1] is what the next step reads and `logits` [B, V] what the last one gave, both always in one place.
    """

    def __init__(
        self, governor: Governor, steps: dict[int, FixedStep], clock: Clock, tokens: Tensor, others: int
    ) -> None:
        self._governor, self._steps, self._clock = governor, steps, clock
        self.cache = FixedCache(others)
        device = clock.positions.device
        # the warm-up before a capture must take the true first step, which is then repeated
        self.tokens = tokens.to(device, torch.int64)[:, None].clone()
        self._position_ids = clock.positions.long()[:, None].clone()
        vocabulary = governor.model.get_output_embeddings().weight.shape[0]
        self.logits = torch.zeros(clock.batch, vocabulary, dtype=governor.model.dtype, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._segments: _Segments | None = None
        self._cutting = False
        self._split = [step for step in steps.values() if isinstance(step, SplitStep)]
        self._apart: dict[str, float] = {}
        self.parts: list[dict[str, float]] = []
        """Parts, in seconds, of each step that the host takes part in: `search`, `insertion`, `attention`, `transfer`,
        and `wait`, the host's for the device."""
        self._taken = 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._between = [step for step in steps.values() if type(step).between is not FixedStep.between]
        self._compiled: Any = None
        self.mode: Mode = "fixed"

    def attention(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One layer's part of the step: output [B, 1, H, d]."""
        step = self._steps[module.layer_idx]  # type: ignore[index]
        if not isinstance(step, SplitStep):
            output = step(query, key, value)
        elif self._cutting:
            assert self._segments is not None
            output = self._segments.cut(step, query, key, value)
        else:
            step.before(query, key, value)
            arrived = event() if query.is_cuda else None
            if arrived is not None:
                arrived.record()
            step.beside()
            wait(arrived)
            step.search()
            output = step.after()
        return output.transpose(1, 2)

    def compile(self) -> None:
        """Compile the model's decoder at its next call, until `close`."""
        self._compiled = self._governor.model.get_decoder()
        self._compiled.compile(dynamic=False)

    def close(self) -> None:
        """Give the graph's memory back and the model its own code."""
        self._graph = self._segments = None
        if self._compiled is not None:
            self._compiled._compiled_call_impl = None

    def capture(self) -> None:
        """Run the first step for its compilations, set everything back, and capture it as CUDA graphs."""
        for step in self._split:
            step.between(1)
        changed = [tensor for step in self._steps.values() for tensor in step.changed()]
        changed += [self._clock.positions, self._position_ids, self.tokens]
        kept = [tensor.clone() for tensor in changed]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._forward()
                for tensor, old in zip(changed, kept, strict=True):
                    tensor.copy_(old)
        torch.cuda.current_stream().wait_stream(stream)
        for step in self._split:
            step.ended()
        del kept
        if self._split:
            self._cut(stream)
            return
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._forward()
        self.mode = "graph"

    def _cut(self, stream: torch.cuda.Stream) -> None:
        """Capture a step in pieces: each layer's attention ends one graph and begins the next."""
        self._apart = _summed([step.apart() for step in self._split])
        for step in self._split:
            step.spent()
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        self._segments, self._cutting = _Segments(), True
        try:
            with torch.cuda.stream(stream):
                self._segments.begin()
                self._forward()
                self._segments.end()
        finally:
            self._cutting = False
        self.mode = "partial"

    def step(self) -> None:
        """Take one step: read `tokens`, write `logits`, and put the likeliest next tokens in `tokens`."""
        assert self._taken < self._clock.new_tokens, "more steps than there is room for"
        self._taken += 1
        start, end = (timer(), timer()) if self.tokens.is_cuda else (None, None)
        if start is not None:
            start.record()
        for step in self._between:
            step.between(self._taken)
        try:
            waited = self._run()
        finally:
            for step in self._split:
                step.ended()
        if self._split:
            self.parts.append(_summed([{"wait": waited}, self._apart, *(step.spent() for step in self._split)]))
        if start is not None and end is not None:
            end.record()
            self._events.append((start, end))

    def _run(self) -> float:
        """Take a step as it was captured; the seconds that the host waited for the device in its midst."""
        if self._segments is not None:
            return self._segments.replay()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._forward()
            for step in self._split:
                step.ahead()
        return 0.0

    def device_s(self) -> list[float]:
        """Each step's seconds by events on the GPU, after waiting for the last; empty on a CPU."""
        if self._events:
            self._events[-1][1].synchronize()
        return [elapsed_s(start, end) for start, end in self._events]

    def _forward(self) -> None:
        out = self._governor.model(
            self.tokens, past_key_values=self.cache, use_cache=True, position_ids=self._position_ids, logits_to_keep=1
        )
        self.logits.copy_(out.logits[:, -1])
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))
        self._clock.positions.add_(1)
        self._position_ids.add_(1)

    @property
    def taken(self) -> int:
        """How many steps were taken."""
        return self._taken

    def bytes(self) -> dict[str, int]:
        """Bytes held now, as `PolicyCache.bytes` states them."""
        held = [step.bytes() for step in self._steps.values()]
        return {tier: sum(each[tier] for each in held) for tier in ("resident", "offloaded", "index")}

    def held_tokens(self) -> float | None:
        """Tokens held per layer and head, on average; None where a step does not count them."""
        found = [step.held_tokens() for step in self._steps.values()]
        known = [tokens for tokens in found if tokens is not None]
        return sum(known) / len(known) if len(known) == len(found) else None

    def reads(self, tokens: int) -> dict[str, int]:
        """Fewest bytes that a step reads at `tokens` tokens of context a row: the weights and what the policy needs."""
        found = [step.reads(tokens) for step in self._steps.values()]
        return {
            "weights": weight_bytes(self._governor.model),
            "device": sum(each["device"] for each in found),
            "host": sum(each["host"] for each in found),
        }

    def hot_hit_rate(self) -> float | None:
        """The share of the tokens chosen from the host that hot sets on the device had; None without such sets."""
        found, asked = (sum(part) for part in zip(*(step.hits() for step in self._steps.values()), strict=True))
        return found / asked if asked else None


def _summed(found: Sequence[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for each in found:
        for name, seconds in each.items():
            total[name] += seconds
    return dict(total)


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a decoding step reads: all but the rows of the input embedding that are looked up."""
    seen: dict[int, int] = {weight.data_ptr(): weight.nbytes for weight in model.parameters()}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding.data_ptr() != head.data_ptr():
        seen.pop(embedding.data_ptr(), None)
    return sum(seen.values())


def fixed_decoder(
    governor: Governor, cache: PolicyCache, tokens: Tensor, new_tokens: int, inputs: Inputs | None = None
) -> FixedDecoder | str:
    """Make the decoder that takes over a batch's cache after its prompt and reads `tokens` [B], or say why not.

    The cache's stores are emptied layer by layer. Nothing has been taken over where a reason is returned.
    """
    reason = _unfit(governor, cache) or unfollowed(type(governor.policy))
    if reason:
        return reason
    device = cache.governed[0].by_lane[0].store.static_ids.device
    positions = torch.zeros(sum(layer.rows for layer in cache.governed[0].by_lane), dtype=torch.int32, device=device)
    for lane, layer in zip(cache.lanes, cache.governed[0].by_lane, strict=True):
        positions[slice(None) if lane.rows is None else lane.rows.to(device)] = layer.tokens
    padding = left_padding(cache.mask) if governor.policy.exact else None
    if padding is not None:  # the one lane of a policy that keeps everything holds the padding, too
        positions -= padding.to(positions)
    clock = Clock(positions, new_tokens, inputs=inputs)
    steps: dict[int, FixedStep] = {}
    for cached in cache.governed:
        parts = [Part(layer, lane.rows) for lane, layer in zip(cache.lanes, cached.by_lane, strict=True)]
        step = policy_step(governor, parts, clock, padding, cached.number)
        if not isinstance(step, FixedStep):
            if steps:
                raise only_some_layers(governor.policy, cached.number)
            return step or f"policy '{governor.policy.name}' has no step of fixed shapes"
        steps[cached.number] = step
    for number in cache.dense:
        steps[number] = GrowingStep([_dense_part(cache, number)], clock, left_padding(cache.mask))
    return FixedDecoder(governor, steps, clock, tokens, len(cache.layers))


def _dense_part(cache: PolicyCache, number: int) -> Part:
    """What a full-attention layer that the policy leaves exact holds of all rows, taken out of its cache."""
    held, called = cache.layers[number], cache.dense[number]
    assert called is not None
    keys, values = held.keys, held.values
    rows, groups, tokens, dim = keys.shape
    layer = Layer(
        ordinal=0, count=1, number=number, heads=called.heads, kv_heads=groups, head_dim=dim, scaling=called.scaling,
        rows=rows, store=KVStore(keys, values), budget=LayerBudget(tokens, covers_all=True), static=(0, 0),
        prompt_tokens=tokens, module=called.module,
    )  # fmt: skip
    held.keys, held.values = keys[:, :, :0].clone(), values[:, :, :0].clone()
    return Part(layer)


def _unfit(governor: Governor, cache: PolicyCache) -> str:
    rope = getattr(governor.config, "rope_parameters", None)
    kinds = [str(rope.get("rope_type", ""))] if isinstance(rope, dict) else []
    if governor.probes:
        return "probes look at every step"
    if not cache.governed or any(
        not isinstance(layer, PolicyCacheLayer) and number not in cache.dense
        for number, layer in enumerate(cache.layers)
    ):
        return "some layers keep a cache of their own"
    if any(kind in _BY_LENGTH for kind in kinds):
        return f"the rotary embedding '{kinds[0]}' changes with the length"
    if governor.survey.shares or any(
        layer.expand is not None or layer.by_lane[0].module.layer_idx != layer.number
        or isinstance(layer, HybridCacheLayer) for layer in cache.governed
    ):  # fmt: skip
        return "the model's layers hold more or less than the keys and values of their own attention"
    if len({layer.by_lane[0].store.static_ids.device for layer in cache.governed}) > 1:
        return "the model lies on several devices"
    layers = [layer.by_lane[0] for layer in cache.governed]
    if any(layer.softcap is not None or layer.sink_logits is not None for layer in layers):
        return "the model's attention has terms of its own"
    return ""
