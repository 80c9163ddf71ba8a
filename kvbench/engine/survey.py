"""What a model does between its cache and its attention function, seen on three tokens before a policy governs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
)

from kvbench.contract.errors import KVBenchError
from kvbench.contract.policy import KVCachePolicy
from kvbench.engine.expansion import Expansion
from kvbench.engine.interface import answering, attached, own_attention

_KNOWN = ("scaling", "dropout", "softcap", "s_aux", "position_ids", "cache_position")
"""Tensors and numbers among an attention function's arguments that kvbench honours, or that change nothing."""


class UnseenError(KVBenchError):
    """A model without weights did not run: some need numbers to choose their way, such as their experts."""


@dataclass(frozen=True)
class SurveyedLayer:
    """One layer of the cache that a policy can govern.

    `modules` are the attention modules that read it: its own, then those that share its keys and values. `token_bytes`
    is what it holds of one token; `expand` makes keys and values of that, where attention does not see it as it is.
    """

    modules: tuple[nn.Module, ...]
    token_bytes: int
    heads: int
    kv_heads: int
    expand: Expansion | None


@dataclass(frozen=True)
class Survey:
    """What a policy can govern of a model: layers by their place in the cache, or the reason why none."""

    layers: dict[int, SurveyedLayer]
    refusal: str | None = None

    def require(self, policy: KVCachePolicy) -> None:
        """Raise KVBenchError where the model cannot be governed by a policy."""
        if self.refusal is not None and not policy.exact:
            raise KVBenchError(
                f"{self.refusal}, so policy '{policy.name}' cannot govern it: choose policy 'full', or an "
                "architecture of docs/models.md that policies govern (Llama, Qwen, Gemma, DeepSeek-V3, ...)."
            )

    @property
    def token_bytes(self) -> int:
        """Bytes that the governed layers hold of one token."""
        return sum(layer.token_bytes for layer in self.layers.values())

    @property
    def shares(self) -> bool:
        """Whether layers read other layers' keys and values."""
        return any(len(layer.modules) > 1 for layer in self.layers.values())


_SURVEYS: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Survey]] = WeakKeyDictionary()


def survey(model: Any) -> Survey:
    """Run `model` over three tokens and find what a policy can govern; once for a model, its device and its dtype.

    A model without weights, on PyTorch's meta device, shows its shapes; what its numbers would show counts as fine.
    Raises KVBenchError for a model that cannot run with a cache that is given to it.
    """
    config = text_config(model)
    if not (hasattr(model, "set_attn_implementation") and model._can_set_attn_implementation()):
        raise KVBenchError(
            f"{type(model).__name__} does not go through transformers' attention interface, so no policy can govern "
            "it: use an architecture that does (Llama, Qwen, Mistral, Phi3, Gemma, ...)."
        )
    weight = next(model.parameters())
    key = (
        weight.device,
        weight.dtype,
        str(config._attn_implementation),
        config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None,
    )
    known = _SURVEYS.get(model)
    if known is None or known[0] != key:
        if attached(config):
            raise KVBenchError("The model has a policy attached already: leave that `with` block first.")
        known = _SURVEYS[model] = key, _Surveyor(model, config).run()
    return known[1]


def text_config(model: Any) -> Any:
    """The configuration of the model's decoder, which its attention modules share."""
    if model.config.is_encoder_decoder:
        raise KVBenchError(
            f"{type(model).__name__} is an encoder-decoder model, and kvbench governs decoder-only models: choose one "
            "that reads its prompt into its own key-value cache."
        )
    return model.config.get_text_config(decoder=True)


def token_bytes(model: Any, numbers: Sequence[int] | None = None) -> int:
    """Bytes of what the layers `numbers` hold of one token, in the model's dtype; of all that can be governed."""
    found = survey(model)
    return found.token_bytes if numbers is None else sum(found.layers[number].token_bytes for number in numbers)


def governable(layers: list[Any], config: Any) -> list[int]:
    """The places of the cache layers of full attention: not those with a sliding window, an index or a state."""
    return [number for number, layer in enumerate(layers) if _is_full(layer, config)]


def _is_full(layer: CacheLayerMixin, config: Any) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:  # a window that holds the longest context is none
        longest = getattr(config, "max_position_embeddings", None)
        return longest is not None and layer.sliding_window >= longest
    return type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)


@dataclass
class _Call:
    """A call of the attention function, for the cache layer whose keys it was given."""

    module: nn.Module
    key: Tensor
    value: Tensor
    heads: int
    seen: bool
    """Whether every token is attended to as it is: the mask hides and adds nothing."""
    extra: list[str]
    """Arguments that only the model's own attention knows."""
    arguments: tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Given:
    """What a cache layer returned, and the attention calls that used it."""

    keys: Tensor
    values: Tensor
    calls: list[_Call] = field(default_factory=list)


class _NotedCache(Cache):
    """transformers' own cache that notes what its layers return."""

    def __init__(self, config: Any) -> None:
        super().__init__(layers=DynamicCache(config=config).layers)
        self.given: dict[int, _Given] = {}
        self.latest: int | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass on to the layer."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.given[layer_idx], self.latest = _Given(keys, values), layer_idx
        return keys, values

    def used(self, key: Tensor) -> _Given | None:
        """The layer whose keys an attention call was given."""
        same = [given for given in self.given.values() if given.keys is key]
        if same:
            return same[0]
        latest = self.given.get(-1 if self.latest is None else self.latest)
        return latest if latest is not None and not latest.calls else None


class _Surveyor:
    """Answers the attention calls of a model under survey with the model's own attention, and notes them."""

    def __init__(self, model: Any, config: Any) -> None:
        self._model, self._config = model, config
        self._own = str(config._attn_implementation)
        self._cache: _NotedCache | None = None
        self._arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def run(self) -> Survey:
        """Survey the model."""
        name = type(self._model).__name__
        try:
            cache = self._cache = _NotedCache(self._config)
        except Exception as error:
            raise KVBenchError(
                f"{name} keeps no key-value cache that transformers can make: {_short(error)}"
            ) from error
        handles = [
            module.register_forward_pre_hook(self._note, with_kwargs=True)
            for module in self._model.modules()
            if hasattr(module, "layer_idx")
        ]
        with answering(self._config, self), torch.no_grad():
            try:
                before = self._forward(0, 2)
                prompt, cache.given = cache.given, {}
                self._forward(2, 3)
                self._cache = _NotedCache(self._config)
                again, self._cache = self._forward(0, 2), cache
            except KVBenchError:
                raise
            except Exception as error:
                failure = UnseenError if self._model.device.type == "meta" else KVBenchError
                raise failure(f"{name} does not run with a cache that is given to it: {_short(error)}") from error
            finally:
                for handle in handles:
                    handle.remove()
            if not before.is_meta and not torch.allclose(before, again, rtol=0, atol=0, equal_nan=True):
                raise KVBenchError(
                    f"{name} keeps what it knows of a context in itself, not in the cache that it is given, so kvbench "
                    "cannot follow it: choose another architecture."
                )
            numbers = [number for number in governable(cache.layers, self._config) if number in prompt]
            if not numbers:
                return Survey({}, f"{name} has no full-attention layer to govern (its layers are {_kinds(cache)})")
            try:
                return Survey({number: self._layer(number, prompt, cache.given) for number in numbers})
            except _Ungovernable as reason:
                return Survey({}, f"{name} {reason}")

    def _forward(self, start: int, stop: int) -> Tensor:
        """The logits [1, m, V] of the tokens `start` to `stop` − 1."""
        special = {str(getattr(self._config, f"{kind}_token_id", None)) for kind in ("pad", "bos", "eos")}
        ids = [token for token in range(16) if str(token) not in special][:3]
        place = self._model.device
        given = torch.tensor([ids], device="cpu" if place.type == "meta" else place)  # accelerate moves them
        logits: Tensor = self._model(given[:, start:stop], past_key_values=self._cache, use_cache=True).logits
        return logits

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments[id(module)] = args, kwargs

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention."""
        assert self._cache is not None
        given = self._cache.used(key)
        if given is not None:
            extra = [name for name, value in kwargs.items() if isinstance(value, Tensor | float) and name not in _KNOWN]
            seen = mask is None or query.shape[2] > 1 or mask.is_meta or bool(_visible(mask).all())
            arguments = self._arguments.get(id(module), ((), {}))
            given.calls.append(_Call(module, key, value, query.shape[1], seen, extra, arguments))
        return own_attention(module, self._own)(module, query, key, value, mask, **kwargs)

    def _layer(self, number: int, prompt: dict[int, _Given], step: dict[int, _Given]) -> SurveyedLayer:
        if number not in step or not prompt[number].calls or not step[number].calls:
            raise _Ungovernable("does not pass its attention through transformers' attention interface in every layer")
        given, calls = prompt[number], prompt[number].calls
        modules = tuple(call.module for call in calls)
        first = calls[0]
        if len({id(module) for module in modules}) < len(modules):
            raise _Ungovernable(f"calls its attention function more than once with the keys of layer {number}")
        for call in (*calls, *step[number].calls):
            for name in call.extra:
                raise _Ungovernable(f"changes its softmax by '{name}', which only its own attention knows")
            if not call.seen:
                raise _Ungovernable(
                    "changes the scores of its attention by its mask, which only its own attention knows"
                )
        if first.key.shape[2] != given.keys.shape[2] or first.heads % first.key.shape[1]:
            raise _Ungovernable(f"attends to other tokens than the cache of layer {number} holds")
        if any(call.key is given.keys and call.value is not given.values for call in calls[1:]):
            raise _Ungovernable(f"attends to keys of the cache of layer {number} with other values than its own")
        expand = None
        if first.key is not given.keys or first.value is not given.values:
            expand = Expansion(first.module, *first.arguments, self._cache, first.key.device)
            if len(calls) > 1 or not _by_token(expand, given, first):
                raise _Ungovernable(
                    f"makes keys and values of what the cache of layer {number} holds of a token and of more than that"
                )
        size = sum(part.shape[1] * part.shape[3] * part.element_size() for part in (given.keys, given.values))
        return SurveyedLayer(modules, size, first.heads, first.key.shape[1], expand)


def _visible(mask: Tensor) -> Tensor:
    """Which tokens an attention mask leaves as they are."""
    return mask if mask.dtype == torch.bool else mask == 0


def _by_token(expand: Expansion, given: _Given, call: _Call) -> bool:
    """Whether keys and values follow from what the cache holds of their own token alone."""
    parts = [expand(given.keys[:, :, place : place + 1], given.values[:, :, place : place + 1]) for place in (0, 1)]
    made = [torch.cat(part, dim=2) for part in zip(*parts, strict=True)]
    near = 1e-2 if given.keys.element_size() < 4 else 1e-3  # what rounding may do
    return all(
        one.shape == other.shape
        and (one.is_meta or torch.allclose(one.float(), other.float(), rtol=near, atol=near * float(other.abs().max())))
        for one, other in zip(made, (call.key, call.value), strict=True)
    )


def _kinds(cache: Cache) -> str:
    """The kinds of a cache's layers as configurations call them."""
    names = {kind: name for name, kind in reversed(DYNAMIC_LAYER_TYPE_MAPPING.items()) if name != "conv"}
    return ", ".join(sorted({names.get(type(layer), type(layer).__name__) for layer in cache.layers}))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class _Ungovernable(Exception):  # noqa: N818  the rest of a sentence about a model
    pass
