"""What a model's attention function is answered with: its own attention for the prompt, the policy's afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.engine.cache import PolicyCache
from kvbench.engine.cached_layer import PolicyCacheLayer
from kvbench.engine.compression import compress, note
from kvbench.engine.fixed import FixedDecoder
from kvbench.engine.governor import Governor
from kvbench.engine.interface import capture, capturing, own_attention
from kvbench.engine.lanes import Lane
from kvbench.engine.prompt import Attends
from kvbench.engine.prompt_attention import prompt_attention
from kvbench.engine.replay import ReplayCache


class Attending(Governor):
    """A governor that answers the attention calls of its model, whose tokens lie in `cache`."""

    cache: PolicyCache | None = None
    """The latest sequence batch's cache."""
    implementation: str
    """The model's own attention implementation."""
    _replay: ReplayCache | None = None
    _fixed: FixedDecoder | None = None
    _calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]
    """How each attention module was called in this step, for policies that look at hidden states."""

    def _note_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        decoding = self.cache is not None and self.cache.complete
        if (decoding or self.policy.reads_hidden) and not capturing() and self._replay is None:
            self._calls[module] = args, kwargs

    def _project(self, module: Any, lane: Lane, now: slice, hidden: Tensor) -> Tensor:
        """The queries of `module` at this call for `hidden` [B, m, D] in place of its own input of the lane's rows."""
        args, kwargs = self._calls[module]
        rows = slice(None) if lane.rows is None else lane.rows
        inputs = _hidden(args, kwargs).clone()
        inputs[rows, now] = hidden.to(inputs.device)
        args = tuple(None if value is self.cache else value for value in args)
        kwargs = {name: None if value is self.cache else value for name, value in kwargs.items()}
        found = (
            capture(module, (inputs, *args[1:]), kwargs)
            if args
            else capture(module, (), {**kwargs, "hidden_states": inputs})
        )
        return lane.take(found.query)[:, :, now]

    def at(self, number: int) -> Tensor:
        """The input [B, 1, D] of layer `number` at this step."""
        return _hidden(*self._calls[self.survey.layers[number].modules[0]])

    def before(self, number: int) -> Tensor | None:
        """The input [B, 1, D] of the full-attention layer before layer `number` at this step; None for the first."""
        earlier = [other for other in self.survey.layers if other < number]
        return _hidden(*self._calls[self.survey.layers[max(earlier)].modules[0]]) if earlier else None

    def queries_for(self, number: int, hidden: Tensor) -> Tensor:
        """The queries [B, H, 1, d] that layer `number` would have at this step for `hidden` [B, 1, D] of all rows."""
        module = self.survey.layers[number].modules[0]
        args, kwargs = self._calls[module]
        self._projecting = True
        try:
            found = (
                capture(module, (hidden, *args[1:]), kwargs)
                if args
                else capture(module, (), {**kwargs, "hidden_states": hidden})
            )
        finally:
            self._projecting = False
        return found.query

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of one layer: the model's own for the prompt, the policy's afterwards."""
        if self._fixed is not None:
            return self._fixed.attention(module, query, key, value), None
        own = functools.partial(own_attention(module, self.implementation), module, query, key, value, mask, **kwargs)
        if self._replay is not None:
            self._replay.observed(query, key)
            return own()
        if self.cache is None or not self.cache.open:
            raise KVBenchError(
                f"Call {type(self.model).__name__} itself while a policy is attached to it, not a part of it, nor a "
                "model that shares its configuration."
            )
        cached = self.cache.source(key)
        if cached is None:
            number = getattr(module, "layer_idx", None)
            if number in self.cache.dense:
                self.cache.dense[number] = Attends.of(module, query, kwargs)
            return own()
        first, cached.pending = cached.pending, False
        if first:
            cached.check_given(key, value)
        attends = Attends.of(module, query, kwargs)
        if cached.in_prompt:
            output = (self._own_prompt(cached, attends, query, own), None) if self.own_prompt and first else own()
            if first:
                self._prompt_attended(cached, attends, query)
            return output
        cached.attended += query.shape[2] if first else 0
        layers = cached.by_lane if first else cached.readers_of(attends)
        if self.policy.exact:
            return self._exact_step(layers[0], query, key, value, first, lambda: own()[0]), None
        self._check_mask(mask, cached)
        return self._policy_steps(cached, layers, query, key, value, first), None

    def _own_prompt(
        self, cached: PolicyCacheLayer, attends: Attends, query: Tensor, own: Callable[[], tuple[Tensor, Any]]
    ) -> Tensor:
        """The prompt's attention by the policy, output [B, m, H, d]."""
        if attends.softcap is not None or attends.sink_logits is not None:
            raise KVBenchError(
                f"{type(self.model).__name__} caps its scores or has attention sinks, which policy "
                f"'{self.policy.name}' cannot follow in the prompt's attention: choose another model or policy."
            )
        return prompt_attention(cached, attends.module, query, attends.scaling, lambda: own()[0])

    def _prompt_attended(self, cached: PolicyCacheLayer, attends: Attends, query: Tensor) -> None:
        """Keep of the prompt's queries what the policy needs; the prompt may end here."""
        cached.attended += query.shape[2]
        if self.policy.reads_hidden:
            inputs = _hidden(*self._calls.pop(attends.module))
            with self.named_errors("reduce_hidden", None):
                cached.reduced.append(self.policy.reduce_hidden(cached.number, inputs))
        window = self.query_window(cached.number)
        if window is None:
            cached.prompt_queries.append(query)
        else:
            last = torch.cat([*cached.prompt_queries, query], dim=2)
            cached.prompt_queries = [last[:, :, max(last.shape[2] - window, 0) :].clone()]
        if cached.seen == cached.cache.prompt_tokens:
            cached.end_prompt(attends)

    def _exact_step(
        self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, first: bool, own: Callable[[], Tensor]
    ) -> Tensor:
        layer.exact_attention = lambda: own().transpose(1, 2)
        if first:
            start = key.shape[2] - query.shape[2]
            self.call("insert", layer=layer, keys=key[:, :, start:], values=value[:, :, start:])
        selection = layer.selection = self.call("select", layer=layer, queries=query, budget=layer.budget)
        output: Tensor = self.call("attend", layer=layer, queries=query, selection=selection).output
        return output.transpose(1, 2)

    def _policy_steps(
        self, cached: PolicyCacheLayer, layers: list[Layer], query: Tensor, key: Tensor, value: Tensor, first: bool
    ) -> Tensor:
        """The policy's attention, token by token; only the `first` layer that reads new tokens inserts them."""
        assert self.cache is not None and cached.new is not None
        if query.shape[2] > 1 and not first:
            raise KVBenchError(
                f"Layers of {type(self.model).__name__} share their keys and values, so the tokens after the prompt "
                f"must come one at a time, not {query.shape[2]} in a call."
            )
        module: Any = layers[0].module
        hidden = _hidden(*self._calls[module]) if self.policy.uses_hidden else None
        dense = self._dense_before(cached) if self.policy.uses_hidden else None
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        count = query.shape[2]
        for lane, layer in zip(self.cache.lanes, layers, strict=True):
            lane_queries, lane_keys, lane_values = lane.take(query), lane.take(key), lane.take(value)
            held_keys, held_values = (lane.take(part) for part in cached.new)
            done = 0
            while done < count:
                now = slice(done, done + (self.at_once(layer, count - done) if first else 1))
                done = now.stop
                queries = lane_queries[:, :, now]
                if hidden is not None:
                    layer.hidden = lane.take(hidden)[:, now]
                    before = layer.previous
                    if dense is not None:
                        layer.hidden_before = lane.take(dense)[:, now]
                    elif before is not None:
                        layer.hidden_before = before.hidden
                    layer.project = functools.partial(self._project, module, lane, now)
                if first:
                    if self.every:
                        compress(self.policy, layer)
                    layer.store.append(held_keys[:, :, now], held_values[:, :, now])
                    self.call("insert", layer=layer, keys=lane_keys[:, :, now], values=lane_values[:, :, now])
                selection = layer.selection = self.select(layer, queries)
                result = self.call("attend", layer=layer, queries=queries, selection=selection).output
                layer.static_attention = None
                if self.every and first:
                    note(self.policy, layer, queries)
                part = result.transpose(1, 2).to(output.dtype)
                if lane.rows is None:
                    output[:, now] = part
                else:
                    output[lane.rows, now] = part
                layer.project = None
        self._calls.pop(module, None)
        return output

    def _check_mask(self, mask: Tensor | None, cached: PolicyCacheLayer) -> None:
        """Refuse a model whose mask hides more than padding and the future, at the first step of each layer."""
        if mask is None or cached.checked:
            return
        cached.checked = True
        hidden = ~mask if mask.dtype == torch.bool else mask != 0
        assert self.cache is not None
        padding = torch.zeros(hidden.shape[0], dtype=torch.int64)
        for lane in self.cache.lanes:
            padding[slice(None) if lane.rows is None else lane.rows] = lane.padding
        columns = torch.arange(hidden.shape[-1], device=hidden.device)
        seen = (columns >= padding.to(hidden.device)[:, None]) & (columns < cached.before_step + 1)
        if bool((hidden[:, :, 0] & seen[:, None]).any()):
            raise KVBenchError(
                f"The mask of layer {cached.number} of {type(self.model).__name__} hides or weighs tokens itself, so a "
                "policy cannot govern it: choose policy 'full'."
            )

    def _dense_before(self, cached: PolicyCacheLayer) -> Tensor | None:
        """The input [B, m, D] of the full-attention layer before a governed one, where the policy leaves it exact."""
        assert self.cache is not None
        lowest = self.numbers[cached.ordinal - 1] if cached.ordinal else -1
        between = [number for number in self.cache.dense if lowest < number < cached.number]
        found = self.cache.dense[max(between)] if between else None
        return None if found is None else _hidden(*self._calls[found.module])


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input [B, m, D] that an attention module was called with."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden
