"""Runs a policy inside an unchanged transformers model, through its `Cache` and `AttentionInterface`."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvbench import chat
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy, ModelView, Observe
from kvbench.contract.probe import Probe
from kvbench.engine.cache import Attended, Lane, PolicyCache, PolicyCacheLayer, last_queries
from kvbench.engine.calls import check_continued, check_replaceable, left_padding, named, plain_mask, prompt_end
from kvbench.engine.fixed import FixedCache, FixedDecoder, fixed_decoder
from kvbench.engine.governor import Governor
from kvbench.engine.prompt import Prefill
from kvbench.engine.prompt_attention import prompt_attention
from kvbench.engine.replay import ReplayCache
from kvbench.engine.residual import watch_residual

if TYPE_CHECKING:
    from kvbench.engine.conformance.report import Report

_SESSIONS: dict[int, Session] = {}
"""The attached sessions, by the identity of the text configuration that their attention modules share."""

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of an attention function that change the softmax in ways that only the model's own attention knows."""


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
        self.implementation: str = self.config._attn_implementation
        self._handles: list[Any] = []
        self._watched: set[int] = set()
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._projecting = False
        self._replay: ReplayCache | None = None
        self._fixed: FixedDecoder | None = None
        self._replaced: WeakKeyDictionary[Any, PolicyCache] = WeakKeyDictionary()
        """The caches that came with a prompt, and those that took their place."""

    # -- attaching -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        if id(self.config) in _SESSIONS:
            raise KVBenchError("The model has a policy attached already: leave that `with` block first.")
        self.policy.begin(self._view())
        self._before = {
            "": self.model.config._attn_implementation,
            **{
                key: getattr(self.model.config, key)._attn_implementation
                for key in self.model.config.sub_configs
                if getattr(self.model.config, key) is not None
            },
        }
        _SESSIONS[id(self.config)] = self
        try:
            self._attach()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _attach(self) -> None:
        if not self.policy.cached:
            self._handles = [self.model.register_forward_pre_hook(self._without_cache, with_kwargs=True)]
            return
        name = f"kvbench_{self.implementation}"
        AttentionInterface.register(name, _attention)
        if self.implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[self.implementation])
        self.model.set_attn_implementation(
            {key: name if self._is_text(key) else value for key, value in self._before.items()}
        )
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward),
            self.model.register_forward_hook(self._ended, always_call=True),
        ]
        if self.allocator is not None and self.allocator.reads_hidden:
            self._handles += watch_residual(self.model, self.numbers, self._hidden)

    def _hidden(self, number: int, before: Tensor, after: Tensor) -> None:
        """Keep what the allocator needs of a layer's hidden states [B, m, D] while the prompt passes."""
        assert self.cache is not None and self.allocator is not None
        cached = self.cache.layers[number]
        if isinstance(cached, PolicyCacheLayer) and not cached.groups:
            cached.hidden.append(self.allocator.reduce_hidden(before, after))

    def _is_text(self, key: str) -> bool:
        config = self.model.config if key == "" else getattr(self.model.config, key)
        return config is self.config

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._watched.clear()
        self._end_fixed()
        self._calls.clear()
        _SESSIONS.pop(id(self.config), None)
        self.model.set_attn_implementation(self._before)

    def _view(self) -> ModelView:
        heads = self.config.num_attention_heads
        tokenizer = self.tokenizer
        opening, closing = chat.around_a_message(tokenizer)
        return ModelView(
            name=type(self.model).__name__,
            numbers=tuple(self.numbers),
            heads=heads,
            kv_heads=getattr(self.config, "num_key_value_heads", None) or heads,
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
            for cached in cache.governed:
                self._watch_hidden(cached.groups[0].module)
            for found in filter(None, cache.dense.values()):
                self._watch_hidden(found.module)
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
            cache.dense[number] = Attended(part.module, part.scaling, part.queries.shape[1])
        for cached in cache.governed:
            part, window = prompt.layers[cached.number], self.query_window(cached.number)
            cached.take(part.keys[:, :, :count].clone(), part.values[:, :, :count].clone())
            cached.attended += count
            known = part.queries[:, :, : part.queries.shape[2] - (whole - count)]
            cached.prompt_queries = [known if window is None else last_queries(known, min(window, known.shape[2]))]
            if cached.seen == self.cache.prompt_tokens:
                cached.end_prompt(part.module, part.scaling, part.queries.shape[1])
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

    def _watch_hidden(self, module: nn.Module) -> None:
        """Note from now on what the attention `module` is called with, where the policy wants to know."""
        if self.policy.uses_hidden and id(module) not in self._watched:
            self._watched.add(id(module))
            self._handles.append(module.register_forward_pre_hook(self._note_call, with_kwargs=True))

    def _note_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._projecting and self._replay is None:
            self._calls[module.layer_idx] = args, kwargs

    def _project(self, module: Any, lane: Lane, now: slice, hidden: Tensor) -> Tensor:
        """The queries of `module` at this call for `hidden` [B, m, D] in place of its own input of the lane's rows."""
        args, kwargs = self._calls[module.layer_idx]
        rows = slice(None) if lane.rows is None else lane.rows
        inputs = _hidden(args, kwargs).clone()
        inputs[rows, now] = hidden.to(inputs.device)
        args = tuple(None if value is self.cache else value for value in args)
        kwargs = {name: None if value is self.cache else value for name, value in kwargs.items()}
        self._projecting = True
        try:
            if args:
                module(inputs, *args[1:], **kwargs)
            else:
                module(**{**kwargs, "hidden_states": inputs})
        except _Projected as found:
            return lane.take(found.queries)[:, :, now]
        finally:
            self._projecting = False
        raise AssertionError("an attention module that came through the attention interface left it")

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
        if self._projecting:
            raise _Projected(query)
        if self._replay is not None:
            self._replay.observed(module.layer_idx, query)
            return self._own_attention(module)(module, query, key, value, mask, **kwargs)
        if self.cache is None or not self.cache.open:
            raise KVBenchError(
                f"Call {type(self.model).__name__} itself while a policy is attached to it, not a part of it, nor a "
                "model that shares its configuration."
            )
        cached = self.cache.layers[module.layer_idx]
        own = self._own_attention(module)
        scaling = kwargs.get("scaling") or query.shape[3] ** -0.5
        if not isinstance(cached, PolicyCacheLayer):
            if module.layer_idx in self.cache.dense:
                self.cache.dense[module.layer_idx] = Attended(module, scaling, query.shape[1])
            return own(module, query, key, value, mask, **kwargs)
        cached.attended += query.shape[2]
        cached.check_given(key, value)
        if not cached.groups:
            if cached.waiting is not None:
                raise KVBenchError(f"{type(self.model).__name__} calls layer {cached.number} twice in a forward pass.")
            if self.own_prompt:
                self._check_known(kwargs)
                exact = lambda: own(module, query, key, value, mask, **kwargs)[0]  # noqa: E731
                output, weights = prompt_attention(cached, module, query, scaling, exact), None
            else:
                output, weights = own(module, query, key, value, mask, **kwargs)
            window = self.query_window(cached.number)
            if window is None:
                cached.prompt_queries.append(query)
            else:
                last = torch.cat([*cached.prompt_queries, query], dim=2)
                cached.prompt_queries = [last[:, :, max(last.shape[2] - window, 0) :].clone()]
            if cached.seen == self.cache.prompt_tokens:
                cached.end_prompt(module, scaling, query.shape[1])
            return output, weights
        if self.policy.exact:
            return self._exact_step(cached, query, lambda: own(module, query, key, value, mask, **kwargs)[0]), None
        self._check_known(kwargs)
        return self._policy_steps(module, cached, query), None

    def _check_known(self, kwargs: dict[str, Any]) -> None:
        for name in _UNSUPPORTED:
            if kwargs.get(name) is not None:
                raise KVBenchError(
                    f"{type(self.model).__name__} uses '{name}' in its attention, which policies do not support yet: "
                    "choose another model, or policy 'full'."
                )

    def _exact_step(self, cached: PolicyCacheLayer, query: Tensor, own: Callable[[], Tensor]) -> Tensor:
        layer = cached.groups[0]
        assert cached.new is not None
        keys, values = cached.new
        layer.exact_attention = lambda: own().transpose(1, 2)
        self.call("insert", layer=layer, keys=keys, values=values)
        selection = self.call("select", layer=layer, queries=query, budget=layer.budget)
        output: Tensor = self.call("attend", layer=layer, queries=query, selection=selection).output
        return output.transpose(1, 2)

    def _policy_steps(self, module: Any, cached: PolicyCacheLayer, query: Tensor) -> Tensor:
        assert cached.new is not None
        keys, values = cached.new
        hidden = _hidden(*self._calls[module.layer_idx]) if self.policy.uses_hidden else None
        dense = self._dense_before(cached) if self.policy.uses_hidden else None
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], values.shape[3])
        count = query.shape[2]
        blocks = [slice(0, count)] if self.blocks else [slice(step, step + 1) for step in range(count)]
        for lane, layer in zip(self.cache.lanes, cached.groups, strict=True):  # type: ignore[union-attr]
            lane_queries, lane_keys, lane_values = lane.take(query), lane.take(keys), lane.take(values)
            for now in blocks:
                new_keys, new_values, queries = lane_keys[:, :, now], lane_values[:, :, now], lane_queries[:, :, now]
                if hidden is not None:
                    layer.hidden = lane.take(hidden)[:, now]
                    before = layer.previous
                    if dense is not None:
                        layer.hidden_before = lane.take(dense)[:, now]
                    elif before is not None:
                        layer.hidden_before = before.hidden
                    layer.project = functools.partial(self._project, module, lane, now)
                layer.store.append(new_keys, new_values)
                self.call("insert", layer=layer, keys=new_keys, values=new_values)
                selection = self.call("select", layer=layer, queries=queries, budget=layer.budget)
                result = self.call("attend", layer=layer, queries=queries, selection=selection).output
                part = result.transpose(1, 2).to(output.dtype)
                if lane.rows is None:
                    output[:, now] = part
                else:
                    output[lane.rows, now] = part
                layer.project = None
        self._calls.pop(module.layer_idx, None)
        return output

    def _dense_before(self, cached: PolicyCacheLayer) -> Tensor | None:
        """The input [B, m, D] of the full-attention layer before a governed one, where the policy leaves it exact."""
        assert self.cache is not None
        lowest = self.numbers[cached.index - 1] if cached.index else -1
        between = [number for number in self.cache.dense if lowest < number < cached.number]
        return _hidden(*self._calls[max(between)]) if between else None

    def _own_attention(self, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.implementation, eager
        )
        return function


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    session = _SESSIONS.get(id(getattr(module, "config", None)))
    if session is None:
        raise KVBenchError(
            f"{type(module).__name__} has its own configuration object, so its attention cannot be matched to the "
            "attached model: use an architecture whose layers share the model's configuration."
        )
    return session.attention(module, query, key, value, attention_mask, **kwargs)


class _Projected(Exception):  # noqa: N818  no error: it leaves an attention module once its queries are known
    def __init__(self, queries: Tensor) -> None:
        super().__init__()
        self.queries = queries


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input [B, m, D] that an attention module was called with."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden
