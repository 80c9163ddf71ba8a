"""Runs a policy inside an unchanged transformers model, through its `Cache` and `AttentionInterface`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvbench import chat
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy, ModelView, Observe
from kvbench.contract.probe import Probe
from kvbench.engine.cache import PolicyCache, PolicyCacheLayer
from kvbench.engine.calls import check_continued, check_replaceable, left_padding, named, plain_mask, prompt_end
from kvbench.engine.fixed import FixedCache, FixedDecoder, fixed_decoder
from kvbench.engine.governor import Governor
from kvbench.engine.interface import answering, attached, capture, own_attention
from kvbench.engine.lanes import Lane, last_queries
from kvbench.engine.prompt import Attends, Prefill
from kvbench.engine.prompt_attention import prompt_attention
from kvbench.engine.replay import ReplayCache
from kvbench.engine.residual import watch_residual

if TYPE_CHECKING:
    from kvbench.engine.conformance.report import Report


class Session(Governor):
    """A model with a policy attached; see `attach`. `cache` is the latest sequence batch's cache."""

    def __init__(
        self,
        model: Any,
        policy: KVCachePolicy,
        budget: Budget | None,
        probes: Sequence[Probe] = (),
        prompt_tokens: int | None = None,
        tokenizer: Any = None,
        dense_layers: int = 0,
    ) -> None:
        super().__init__(model, policy, budget, probes, prompt_tokens, dense_layers)
        self.tokenizer = tokenizer
        self.conformance: tuple[Report, ...] = ()
        """What was proven of the model and the policy (`attach(..., check=True)`)."""
        self.cache: PolicyCache | None = None
        self.implementation = str(self.config._attn_implementation)
        self._calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._projecting = False
        self._replay: ReplayCache | None = None
        self._fixed: FixedDecoder | None = None
        self._replaced: WeakKeyDictionary[Any, PolicyCache] = WeakKeyDictionary()
        """The caches that came with a prompt, and those that took their place."""

    # -- attaching -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        if attached(self.config):
            raise KVBenchError("The model has a policy attached already: leave that `with` block first.")
        self.policy.begin(self._view())
        with ExitStack() as stack:
            if self.policy.cached:
                stack.enter_context(answering(self.config, self))
            for handle in self._hooks():
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def _hooks(self) -> Iterator[Any]:
        """Hang the session's hooks into the model; gives their handles."""
        if not self.policy.cached:
            yield self.model.register_forward_pre_hook(self._without_cache, with_kwargs=True)
            return
        yield self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        yield self.model.register_forward_hook(self._after_forward)
        yield self.model.register_forward_hook(self._ended, always_call=True)
        if self.allocator is not None and self.allocator.reads_hidden:
            yield from watch_residual(self.model, self.numbers, self._hidden)
        if self.policy.uses_hidden:
            for module in {module for layer in self.survey.layers.values() for module in layer.modules}:
                yield module.register_forward_pre_hook(self._note_call, with_kwargs=True)

    def _hidden(self, number: int, before: Tensor, after: Tensor) -> None:
        """Keep what the allocator needs of a layer's hidden states [B, m, D] while the prompt passes."""
        assert self.cache is not None and self.allocator is not None
        cached = self.cache.layers[number]
        if isinstance(cached, PolicyCacheLayer) and not cached.groups:
            cached.hidden.append(self.allocator.reduce_hidden(before, after))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._end_fixed()
        self._calls.clear()

    def _view(self) -> ModelView:
        tokenizer, layers = self.tokenizer, self.survey.layers
        first = next(iter(layers.values()), None)
        opening, closing = chat.around_a_message(tokenizer)
        return ModelView(
            name=type(self.model).__name__,
            numbers=tuple(self.numbers),
            heads=0 if first is None else first.heads,
            kv_heads=0 if first is None else first.kv_heads,
            config=self.config.to_dict(),
            parameters={name: weight.detach() for name, weight in self.model.named_parameters()},
            tokenize=None if tokenizer is None else lambda text: tokenizer.encode(text, add_special_tokens=False),
            opening=tuple(tokenizer.encode(opening, add_special_tokens=False)) if opening else (),
            closing=tuple(tokenizer.encode(closing, add_special_tokens=False)) if closing else (),
        )

    def _without_cache(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise KVBenchError(f"Policy '{self.policy.name}' keeps no cache: call the model with use_cache=False.")
        return args, {**kwargs, "use_cache": False}

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._replay is not None or isinstance(kwargs.get("past_key_values"), FixedCache):
            return args, kwargs
        self._end_fixed()
        kwargs = named(model, args, kwargs)
        past, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if ids is None else ids
        rows = None if given is None else len(given)
        if past is not None and past in self._replaced:
            past = self._replaced[past]
        if isinstance(past, PolicyCache):
            check_continued(past, self, rows)
            cache = past
        else:
            if kwargs.get("use_cache") is False:
                raise KVBenchError("A KV-cache policy needs use_cache=True.")
            if past is not None:
                check_replaceable(past)
                if past.is_compileable and given is not None:
                    kwargs["attention_mask"] = plain_mask(kwargs.get("attention_mask"), given.shape[1])
            cache = PolicyCache(self, prompt_end(self.prompt_tokens), rows)
            if past is not None:
                self._replaced[past] = cache
                past.layers = cache.layers
        if not cache.complete:
            cache.mask = kwargs.get("attention_mask")
            cache.expect(ids, self._padding(cache.mask, rows or 0))
        self.cache, cache.open = cache, True
        return (), {**kwargs, "past_key_values": cache, "use_cache": True}

    @contextmanager
    def prompt_of(self, tokens: int) -> Iterator[None]:
        """Announce, within the block, that prompts have so many tokens."""
        before, self.prompt_tokens = self.prompt_tokens, tokens
        try:
            yield
        finally:
            self.prompt_tokens = before

    def _ended(self, model: nn.Module, args: Any, output: Any) -> None:
        """Note how a forward call ended; torch calls this after errors, too."""
        cache = self.cache
        if cache is not None and self._replay is None and cache.open:
            cache.open, cache.failed = False, True

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        cache = self.cache
        if cache is None or self._replay is not None or self._fixed is not None:
            return
        if self.defers:
            cache.finish_prompt()
        if any(layer.seen != layer.attended for layer in cache.governed):
            raise KVBenchError(
                f"{type(model).__name__} does not pass its attention through transformers' attention interface in "
                "every layer, so no policy can govern it: use another architecture."
            )
        self._complete(cache)
        cache.open = False

    def _padding(self, mask: Any, rows: int) -> Tensor | None:
        if self.policy.exact:
            return None
        padding = left_padding(mask)
        return torch.zeros(rows, dtype=torch.int64) if padding is None and self.defers else padding

    def _complete(self, cache: PolicyCache) -> None:
        if not cache.complete and all(layer.groups for layer in cache.governed):
            cache.complete = True
            self._finish_prompt(cache)

    def resume(self, prompt: Prefill, tokens: int | None = None) -> None:
        """Take over a prompt that was computed before, in place of the forward call.

        With `tokens`, only the first so many, which further calls continue up to the session's `prompt_tokens`.
        """
        if self.own_prompt:
            raise KVBenchError(
                f"Policy '{self.policy.name}' computes the prompt's attention itself (attend_prompt), so it cannot "
                "take over a prompt that was computed without it: let it read the prompt."
            )
        whole = prompt.ids.shape[1]
        count = whole if tokens is None else tokens
        self._end_fixed()
        self.cache = cache = PolicyCache(self, whole if tokens is None else self.prompt_tokens, len(prompt.ids))
        cache.mask = prompt.mask
        cache.expect(prompt.ids[:, :count], self._padding(prompt.mask, len(prompt.ids)))
        for number, layer in prompt.others.items():
            cache.layers[number] = copy.deepcopy(layer)
        for number in cache.dense:
            part = prompt.layers[number]
            cache.layers[number].update(part.keys[:, :, :count].clone(), part.values[:, :, :count].clone())
            cache.dense[number] = part.attends
        for cached in cache.governed:
            part, window = prompt.layers[cached.number], self.query_window(cached.number)
            cached.take(part.keys[:, :, :count].clone(), part.values[:, :, :count].clone())
            cached.attended, cached.pending = cached.attended + count, False
            known = part.queries[:, :, : part.queries.shape[2] - (whole - count)]
            cached.prompt_queries = [known if window is None else last_queries(known, min(window, known.shape[2]))]
            if cached.seen == self.cache.prompt_tokens:
                cached.end_prompt(part.attends)
        if self.defers:
            cache.finish_prompt()
        self._complete(cache)

    # -- running ---------------------------------------------------------------------------------------------------

    def _finish_prompt(self, cache: PolicyCache) -> None:
        """Let the policy take over the whole prompt of each group of rows."""
        parts, cache.prompt_ids = cache.prompt_ids, []
        if not self.hook.after_prompt.get_hookimpls() or not cache.governed:
            return
        if any(part is None for part in parts):
            raise KVBenchError(
                f"Policy '{self.policy.name}' needs the prompt's token ids, but the model was given embeddings: pass "
                "input_ids."
            )
        ids = torch.cat([part for part in parts if part is not None], dim=1)
        for number, lane in enumerate(cache.lanes):
            layers = [cached.groups[number] for cached in cache.governed]
            own = ids if lane.rows is None else ids[lane.rows.to(ids.device)]

            def replay(more: Tensor, observe: Observe, lane: Lane = lane, layers: list[Layer] = layers) -> None:
                self._replay = ReplayCache(cache, lane, layers, observe)
                try:
                    with torch.no_grad():
                        self.model(input_ids=more, past_key_values=self._replay, use_cache=True, logits_to_keep=1)
                finally:
                    self._replay = None

            start = self.now()
            self.call("after_prompt", layers=layers, ids=own[:, lane.padding :], replay=replay)
            cache.index_s += self.now() - start

    def _note_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        decoding = self.cache is not None and self.cache.complete
        if decoding and not self._projecting and self._replay is None:
            self._calls[module] = args, kwargs

    def _project(self, module: Any, lane: Lane, now: slice, hidden: Tensor) -> Tensor:
        """The queries of `module` at this call for `hidden` [B, m, D] in place of its own input of the lane's rows."""
        args, kwargs = self._calls[module]
        rows = slice(None) if lane.rows is None else lane.rows
        inputs = _hidden(args, kwargs).clone()
        inputs[rows, now] = hidden.to(inputs.device)
        args = tuple(None if value is self.cache else value for value in args)
        kwargs = {name: None if value is self.cache else value for name, value in kwargs.items()}
        self._projecting = True
        try:
            found = (
                capture(module, (inputs, *args[1:]), kwargs)
                if args
                else capture(module, (), {**kwargs, "hidden_states": inputs})
            )
        finally:
            self._projecting = False
        return lane.take(found.query)[:, :, now]

    def _end_fixed(self) -> None:
        if self._fixed is not None:
            self._fixed.close()
            self._fixed = None

    def fixed(self, tokens: Tensor, new_tokens: int, *, graph: bool, compiled: bool = False) -> FixedDecoder | str:
        """Take the rest of the latest prompt's decoding in steps of fixed shapes, `new_tokens` at most, or say why not.

        `tokens` [B] are those that the first step reads.

        With `graph`, a step is captured as a CUDA graph; with `compiled`, the model's own code is compiled first, all
        but the attention. The cache is not continued in any other way afterwards.
        """
        assert self.cache is not None
        found = fixed_decoder(self, self.cache, tokens, new_tokens)
        if isinstance(found, FixedDecoder):
            self._fixed = found
            if compiled:
                found.compile()
            if graph:
                found.capture()
        return found

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
        layers = cached.groups if first else cached.readers_of(attends)
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
        selection = self.call("select", layer=layer, queries=query, budget=layer.budget)
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
        blocks = [slice(0, count)] if self.blocks else [slice(step, step + 1) for step in range(count)]
        for lane, layer in zip(self.cache.lanes, layers, strict=True):
            lane_queries, lane_keys, lane_values = lane.take(query), lane.take(key), lane.take(value)
            held_keys, held_values = (lane.take(part) for part in cached.new)
            for now in blocks:
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
                    layer.store.append(held_keys[:, :, now], held_values[:, :, now])
                    self.call("insert", layer=layer, keys=lane_keys[:, :, now], values=lane_values[:, :, now])
                selection = self.select(layer, queries)
                result = self.call("attend", layer=layer, queries=queries, selection=selection).output
                layer.static_attention = None
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
        lowest = self.numbers[cached.index - 1] if cached.index else -1
        between = [number for number in self.cache.dense if lowest < number < cached.number]
        found = self.cache.dense[max(between)] if between else None
        return None if found is None else _hidden(*self._calls[found.module])


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input [B, m, D] that an attention module was called with."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden
