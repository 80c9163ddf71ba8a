"""Runs a policy inside an unchanged transformers model, through its `Cache` and `AttentionInterface`."""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import pluggy
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvbench.budget import (
    Budget,
    BudgetAllocator,
    BudgetRequest,
    LayerBudget,
    PromptLayer,
    allocate,
    allocate_heads,
)
from kvbench.errors import KVBenchError
from kvbench.hookspecs import PROJECT, PolicyHooks
from kvbench.plugins import registry
from kvbench.policy import DefaultPolicy, KVCachePolicy, Layer, ModelView, Observe, Probe
from kvbench.replay import ReplayCache
from kvbench.residual import watch_residual
from kvbench.rotary import Rotary
from kvbench.storage import KVStore, TokenBuffer

if TYPE_CHECKING:
    from kvbench.prefill import Prefill

_SESSIONS: dict[int, Session] = {}
"""The attached sessions, by the identity of the text configuration that their attention modules share."""

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of an attention function that change the softmax in ways that only the model's own attention knows."""


def attach(
    model: Any,
    *,
    policy: str | KVCachePolicy = "full",
    budget: Budget | int | float | None = None,
    options: Mapping[str, Any] | None = None,
    probes: Sequence[str | Probe] = (),
    prompt_tokens: int | None = None,
    tokenizer: Any = None,
) -> Session:
    """Make `model` use a policy inside a `with` block; leaving the block restores the model.

    `policy` is a plugin's name, with its `options`, or an instance. `budget` is a `Budget`, a number of tokens (int) or
    a ratio of the context (float); policies whose size follows from something else ignore it. The first forward call is
    the whole prompt unless `prompt_tokens` says how many tokens belong to it: then it may come in chunks, and tokens
    beyond it go through the policy one by one, however many a call brings. `tokenizer`, a transformers tokenizer, is
    for policies that put a text of their own before the model (KVzip).
    """
    if options and not isinstance(policy, str):
        raise KVBenchError("Options go with a policy's name; an instance of a policy has its own already.")
    chosen: KVCachePolicy = registry().make("policy", policy, options) if isinstance(policy, str) else policy
    if isinstance(budget, bool) or not isinstance(budget, Budget | int | float | None):
        raise KVBenchError(f"The budget {budget!r} is not a Budget, a number of tokens (int) or a ratio (float).")
    if isinstance(budget, int):
        if budget < 1:
            raise KVBenchError(f"The budget of {budget} tokens is not a positive number of tokens.")
        budget = Budget(tokens=budget)
    elif isinstance(budget, float):
        if not 0 < budget <= 1:
            raise KVBenchError(f"The budget ratio {budget} is not between 0 and 1.")
        budget = Budget(ratio=budget)
    made = [registry().make("probe", probe) if isinstance(probe, str) else probe for probe in probes]
    return Session(model, chosen, budget, made, prompt_tokens, tokenizer)


@dataclass(frozen=True)
class Lane:
    """Rows of a batch that have the same left padding, and so the same length."""

    rows: Tensor | None
    padding: int

    def tokens(self, tensor: Tensor) -> int:
        """Tokens of the lane's rows in a padded tensor [B, G, n, d]."""
        return tensor.shape[2] - self.padding

    def take(self, tensor: Tensor, *, padded: bool = False) -> Tensor:
        """The lane's rows of a tensor [B, ...], without the padding of [B, G, n, d] where `padded`."""
        part = tensor if self.rows is None else tensor[self.rows]
        return part[:, :, self.padding :] if padded and self.padding else part


class PolicyCache(Cache):
    """The cache of one batch: transformers' own layers, but for those of full attention, which a policy governs."""

    def __init__(self, session: Session, padding: Tensor | None) -> None:
        self.session = session
        layers = DynamicCache(config=session.config).layers
        governed = governed_layers(layers)
        if not governed and not session.policy.exact:
            raise KVBenchError(
                f"{type(session.model).__name__} has no full-attention layer for policy '{session.policy.name}' to "
                "govern (its layers are sliding-window or linear): choose another model, or policy 'full'."
            )
        self.governed = [PolicyCacheLayer(session, self, index, number) for index, number in enumerate(governed)]
        for layer in self.governed:
            layers[layer.number] = layer
        super().__init__(layers=layers)
        self.lanes = self._lanes(padding)
        self.budgets: dict[int, tuple[BudgetRequest | None, list[LayerBudget]]] = {}
        self.index_s = 0.0
        self.prompt_ids: list[Tensor | None] = []
        self.complete = False
        """Whether the policy has taken over the whole prompt."""

    def _lanes(self, padding: Tensor | None) -> list[Lane]:
        if self.session.policy.exact or padding is None:
            return [Lane(None, 0)]
        if self.session.defers:  # a budget for each row
            return [Lane(torch.tensor([row]), pad) for row, pad in enumerate(padding.tolist())]
        if not bool(padding.any()):
            return [Lane(None, 0)]
        return [Lane((padding == pad).nonzero().squeeze(-1), pad) for pad in sorted(set(padding.tolist()))]

    def stores(self) -> list[KVStore]:
        """The stores of all governed layers and groups of rows."""
        return [layer.store for cached in self.governed for layer in cached.groups]

    def bytes(self) -> dict[str, int]:
        """Bytes held now: `resident` on the device, `offloaded` on the host, `index` in the policy's structures."""
        stores = self.stores()
        own = sum(_tensor_bytes(layer) for layer in self.layers if not isinstance(layer, PolicyCacheLayer))
        return {
            "resident": own + sum(store.resident_bytes for store in stores),
            "offloaded": sum(store.offloaded_bytes for store in stores),
            "index": sum(store.index_bytes for store in stores),
        }

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


class PolicyCacheLayer(CacheLayerMixin):
    """One governed layer of the cache: collects the prompt, then hands it to the policy's stores."""

    is_sliding = False
    is_compileable = False

    def __init__(self, session: Session, cache: PolicyCache, index: int, number: int) -> None:
        super().__init__()
        self.session, self.cache, self.index, self.number = session, cache, index, number
        self.seen = 0
        self.prompt: TokenBuffer | None = None
        self.prompt_queries: list[Tensor] = []
        self.groups: list[Layer] = []
        self.attended = 0
        """Tokens that came through the attention function, to notice a model that goes around it."""
        self.new: tuple[Tensor, Tensor] | None = None
        self.waiting: tuple[nn.Module, float, int] | None = None
        """Attention module, scaling and query heads, once the prompt's attention is done."""
        self.hidden: list[Tensor] = []
        """What the allocator keeps of the prompt's hidden states, call by call."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare before the first tokens come."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values [B, G, m, d]; return those that the model's own attention would attend to."""
        self.is_initialized = True
        if self.seen == 0:
            announced = self.session.prompt_tokens
            self.cache_prompt_tokens = key_states.shape[2] if announced is None else announced
        self.seen += key_states.shape[2]
        if self.groups:
            self.new = key_states, value_states
            if not self.session.policy.exact:
                return key_states, value_states
            store = self.groups[0].store
            store.append(key_states, value_states)
            keys, values, _ = store.static_parts()[0]
            return keys, values
        if self.seen > self.cache_prompt_tokens:
            raise KVBenchError(
                f"A forward call took the prompt to {self.seen} tokens, past the {self.cache_prompt_tokens} that "
                "prompt_tokens announced: split the call where the prompt ends."
            )
        if self.prompt is None:
            self.prompt = TokenBuffer(key_states, value_states)
        else:
            self.prompt.append(key_states, value_states)
        return self.prompt.keys, self.prompt.values

    def end_prompt(self, module: nn.Module, scaling: float, heads: int) -> None:
        """Note that the prompt's attention is done; the policy takes over now, or when the allocator has measured."""
        assert self.prompt is not None
        session = self.session
        keys, values = self.prompt.keys, self.prompt.values
        self.waiting = module, scaling, heads
        if not session.policy.exact and not bool(torch.isfinite(keys).all() and torch.isfinite(values).all()):
            raise KVBenchError(
                f"Layer {self.number} of {type(session.model).__name__} gave keys or values that are NaN or infinite: "
                "load the model in another dtype (--dtype float32), or check its weights."
            )
        if not session.defers:
            self.finish_prompt()

    @property
    def prompt_keys(self) -> Tensor:
        """The prompt's keys [B, G, n, d], until the policy takes over."""
        assert self.prompt is not None
        return self.prompt.keys

    def measured(self, lane: Lane) -> Any:
        """What the allocator measures in this layer for a lane."""
        assert self.session.allocator is not None
        return self.session.allocator.measure(self._prompt_layer(lane))

    def _prompt_layer(self, lane: Lane) -> PromptLayer:
        assert self.waiting is not None and self.session.allocator is not None
        keys = lane.take(self.prompt_keys, padded=True)
        queries = torch.cat(self.prompt_queries, dim=2)
        queries = _last(lane.take(queries), min(self.session.allocator.query_window, keys.shape[2]))
        hidden = torch.cat(self.hidden, dim=1) if self.hidden else None
        if hidden is not None and lane.rows is not None:
            hidden = hidden[lane.rows, lane.padding :]
        return PromptLayer(self.index, self.number, self.waiting[1], queries, keys, hidden)

    def finish_prompt(self) -> None:
        """Split the prompt into groups of equally long rows; each gets its budget and is taken over by the policy."""
        assert self.prompt is not None and self.waiting is not None
        session, window = self.session, self.session.query_window(self.number)
        module, scaling, heads = self.waiting
        keys, values = self.prompt.keys, self.prompt.values
        queries = torch.cat(self.prompt_queries, dim=2) if len(self.prompt_queries) > 1 else self.prompt_queries[0]
        self.prompt_queries = [queries]
        budgets = []
        start = session.now()
        for place, lane in enumerate(self.cache.lanes):
            request, shares = self.cache.allocate(place, lane.tokens(keys))
            budget = shares[self.index]
            if session.allocator is not None and request is not None:
                budget = allocate_heads(session.allocator, self._prompt_layer(lane), request, budget)
            budgets.append(budget)
        self.cache.index_s += session.now() - start
        self.prompt, self.prompt_queries, self.waiting, self.hidden = None, [], None, []
        for lane, budget in zip(self.cache.lanes, budgets, strict=True):
            lane_keys, lane_values = lane.take(keys, padded=True), lane.take(values, padded=True)
            tokens = lane_keys.shape[2]
            lane_queries = _last(lane.take(queries), tokens if window is None else min(window, tokens))
            layer = Layer(
                index=self.index, count=len(self.cache.governed), number=self.number, heads=heads,
                kv_heads=keys.shape[1], head_dim=keys.shape[3], scaling=scaling, rows=lane_keys.shape[0],
                store=KVStore(lane_keys, lane_values), budget=budget,
                static=session.policy.static_tokens(tokens), prompt_tokens=tokens, module=module,
                rotary=Rotary(session.model, session.config, module, self.number),
                previous=self.cache.governed[self.index - 1].groups[len(self.groups)] if self.index else None,
            )  # fmt: skip
            self.groups.append(layer)
            if session.query_window(self.number, policy=False) != 0:
                layer.prompt_queries = lane_queries
            asked = session.policy.query_window
            policy_queries = lane_queries if asked is None else _last(lane_queries, min(asked, tokens))
            start = session.now()
            session.call("prefill", layer=layer, queries=policy_queries, keys=lane_keys, values=lane_values)
            self.cache.index_s += session.now() - start
            layer.prompt_queries = None
        del keys, values
        session.watch_hidden(module)

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


class Session:
    """A model with a policy attached; see `attach`. `cache` is the latest sequence batch's cache."""

    def __init__(
        self,
        model: Any,
        policy: KVCachePolicy,
        budget: Budget | None,
        probes: Sequence[Probe] = (),
        prompt_tokens: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.model = model
        self.policy, self.budget, self.probes = policy, budget, list(probes)
        self.prompt_tokens = prompt_tokens
        self.tokenizer = tokenizer
        self.cache: PolicyCache | None = None
        if policy.takes_budget and budget is None:
            raise KVBenchError(f"Policy '{policy.name}' needs a budget: give a number of tokens or a ratio.")
        self.allocator: BudgetAllocator | None = (
            registry().make("budget", budget.allocator, budget.options) if policy.takes_budget and budget else None
        )
        if self.allocator is not None:
            check_head_budgets(policy, self.allocator)
        self.defers = self.allocator is not None and self.allocator.measures
        """Whether the policy's `prefill` waits until the prompt has passed through the whole model."""
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(PolicyHooks)
        for plugin in (DefaultPolicy(), policy, *probes):
            manager.register(plugin)
        self.hook: Any = manager.hook
        if not (hasattr(model, "set_attn_implementation") and self.model._can_set_attn_implementation()):
            raise KVBenchError(
                f"{type(model).__name__} does not go through transformers' attention interface, so no policy can "
                "govern it: use an architecture that does (Llama, Qwen, Mistral, Phi3, Gemma, ...)."
            )
        self.config: Any = self.model.config.get_text_config(decoder=True)
        self.implementation: str = self.config._attn_implementation
        self._handles: list[Any] = []
        self._watched: set[int] = set()
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._projecting = False
        self._replay: ReplayCache | None = None
        self._cuda = next(model.parameters()).device.type == "cuda"

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
        if not self.policy.cached:
            self._handles = [self.model.register_forward_pre_hook(self._without_cache, with_kwargs=True)]
            return self
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
        ]
        if self.allocator is not None and self.allocator.reads_hidden:
            numbers = governed_layers(DynamicCache(config=self.config).layers)
            self._handles += watch_residual(self.model, numbers, self._hidden)
        return self

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
        self._watched.clear()
        _SESSIONS.pop(id(self.config), None)
        self.model.set_attn_implementation(self._before)

    def _view(self) -> ModelView:
        heads = self.config.num_attention_heads
        tokenizer = self.tokenizer
        return ModelView(
            name=type(self.model).__name__,
            numbers=tuple(governed_layers(DynamicCache(config=self.config).layers)),
            heads=heads,
            kv_heads=getattr(self.config, "num_key_value_heads", None) or heads,
            config=self.config.to_dict(),
            parameters={name: weight.detach() for name, weight in self.model.named_parameters()},
            tokenize=None if tokenizer is None else lambda text: tokenizer.encode(text, add_special_tokens=False),
        )

    def _without_cache(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise KVBenchError(f"Policy '{self.policy.name}' keeps no cache: call the model with use_cache=False.")
        return args, {**kwargs, "use_cache": False}

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        past = kwargs.get("past_key_values")
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self._replay is not None:
            return args, kwargs
        if isinstance(past, PolicyCache) and past is self.cache:
            if not past.complete:
                past.prompt_ids.append(ids)
            return args, kwargs
        if past is not None and past.get_seq_length() > 0:
            raise KVBenchError("The cache passed to the model was filled without the policy: start from the prompt.")
        if kwargs.get("use_cache") is False:
            raise KVBenchError("A KV-cache policy needs use_cache=True.")
        given = kwargs.get("inputs_embeds") if ids is None else ids
        self.cache = PolicyCache(self, self._padding(kwargs.get("attention_mask"), 0 if given is None else len(given)))
        self.cache.prompt_ids.append(ids)
        return args, {**kwargs, "past_key_values": self.cache, "use_cache": True}

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        cache = self.cache
        if cache is None or self._replay is not None:
            return
        if self.defers:
            cache.finish_prompt()
        if any(layer.seen != layer.attended for layer in cache.governed):
            raise KVBenchError(
                f"{type(model).__name__} does not pass its attention through transformers' attention interface in "
                "every layer, so no policy can govern it: use another architecture."
            )
        self._complete(cache)

    def _padding(self, mask: Tensor | None, rows: int) -> Tensor | None:
        padding = _left_padding(mask)
        return torch.zeros(rows, dtype=torch.int64) if padding is None and self.defers else padding

    def _complete(self, cache: PolicyCache) -> None:
        if not cache.complete and all(layer.groups for layer in cache.governed):
            cache.complete = True
            self._finish_prompt(cache)

    def resume(self, prompt: Prefill, tokens: int | None = None) -> None:
        """Take over a prompt that was computed before, in place of the forward call.

        With `tokens`, only the first so many, which further calls continue up to the session's `prompt_tokens`.
        """
        whole = prompt.ids.shape[1]
        count = whole if tokens is None else tokens
        if tokens is None:
            self.prompt_tokens = whole
        self.cache = cache = PolicyCache(self, self._padding(prompt.mask, len(prompt.ids)))
        cache.prompt_ids.append(prompt.ids[:, :count])
        for number, layer in prompt.others.items():
            cache.layers[number] = copy.deepcopy(layer)
        for cached in cache.governed:
            part, window = prompt.layers[cached.number], self.query_window(cached.number)
            cached.update(part.keys[:, :, :count].clone(), part.values[:, :, :count].clone())
            cached.attended += count
            known = part.queries[:, :, : part.queries.shape[2] - (whole - count)]
            cached.prompt_queries = [known if window is None else _last(known, min(window, known.shape[2]))]
            if cached.seen == cached.cache_prompt_tokens:
                cached.end_prompt(part.module, part.scaling, part.queries.shape[1])
        if self.defers:
            cache.finish_prompt()
        self._complete(cache)

    # -- running ---------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds on a clock that waits for the device's work."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def query_window(self, number: int, *, policy: bool = True) -> int | None:
        """How many of the prompt's last queries the policy and the probes need in layer `number`; None for all."""
        windows = [probe.query_window(number) for probe in self.probes]
        if policy:
            windows.append(self.policy.query_window)
            windows.append(0 if self.allocator is None else self.allocator.query_window)
        return None if None in windows else max((window for window in windows if window is not None), default=0)

    def allocate(
        self, numbers: Sequence[int], tokens: int, measured: Sequence[Any]
    ) -> tuple[BudgetRequest | None, list[LayerBudget]]:
        """Share the budget over the layers `numbers` of the model for a prompt of `tokens` tokens."""
        if self.allocator is None or self.budget is None:
            return None, [LayerBudget(tokens, covers_all=True)] * len(numbers)
        sinks, window = self.policy.static_tokens(tokens)
        request = BudgetRequest(
            layers=len(numbers),
            tokens=self.budget.size(tokens, token_bytes(self.model)),
            context=tokens,
            minimum=min(max(sinks + window, 1), tokens),
            window=window,
            numbers=numbers,
            measured=measured,
        )
        return request, allocate(self.allocator, request)

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call a policy hook; an error in a plugin is reported with the plugin's name."""
        try:
            return getattr(self.hook, hook)(**arguments)
        except (KVBenchError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            plugin = self._culprit(error)
            kind = "Probe" if isinstance(plugin, Probe) else "Policy"
            where = f" at layer {arguments['layer'].number}" if "layer" in arguments else ""
            raise KVBenchError(
                f"{kind} '{plugin.name}' ({type(plugin).__module__}) failed in {hook}{where}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _culprit(self, error: Exception) -> KVCachePolicy | Probe:
        trace = error.__traceback__
        culprit: KVCachePolicy | Probe = self.policy
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            culprit = next((plugin for plugin in (self.policy, *self.probes) if plugin is owner), culprit)
            trace = trace.tb_next
        return culprit

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

    def watch_hidden(self, module: nn.Module) -> None:
        """Note from now on what the attention `module` is called with, where the policy wants to know."""
        if self.policy.uses_hidden and id(module) not in self._watched:
            self._watched.add(id(module))
            self._handles.append(module.register_forward_pre_hook(self._note_call, with_kwargs=True))

    def _note_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._projecting and self._replay is None:
            self._calls[module.layer_idx] = args, kwargs

    def _project(self, module: Any, lane: Lane, step: int, hidden: Tensor) -> Tensor:
        """The queries of `module` at this call for `hidden` [B, 1, D] in place of its own input of the lane's rows."""
        args, kwargs = self._calls[module.layer_idx]
        rows = slice(None) if lane.rows is None else lane.rows
        inputs = _hidden(args, kwargs).clone()
        inputs[rows, step] = hidden[:, 0]
        args = tuple(None if value is self.cache else value for value in args)
        kwargs = {name: None if value is self.cache else value for name, value in kwargs.items()}
        self._projecting = True
        try:
            if args:
                module(inputs, *args[1:], **kwargs)
            else:
                module(**{**kwargs, "hidden_states": inputs})
        except _Projected as found:
            return lane.take(found.queries)[:, :, step : step + 1]
        finally:
            self._projecting = False
        raise AssertionError("an attention module that came through the attention interface left it")

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of one layer: the model's own for the prompt, the policy's afterwards."""
        if self._projecting:
            raise _Projected(query)
        if self._replay is not None:
            self._replay.observed(module.layer_idx, query)
            return self._own_attention(module)(module, query, key, value, mask, **kwargs)
        if self.cache is None:
            raise KVBenchError(f"Call {type(self.model).__name__} itself while a policy is attached, not a part of it.")
        cached = self.cache.layers[module.layer_idx]
        own = self._own_attention(module)
        if not isinstance(cached, PolicyCacheLayer):
            return own(module, query, key, value, mask, **kwargs)
        cached.attended += query.shape[2]
        scaling = kwargs.get("scaling") or query.shape[3] ** -0.5
        if not cached.groups:
            if cached.waiting is not None:
                raise KVBenchError(f"{type(self.model).__name__} calls layer {cached.number} twice in a forward pass.")
            output, weights = own(module, query, key, value, mask, **kwargs)
            window = self.query_window(cached.number)
            if window is None:
                cached.prompt_queries.append(query)
            else:
                last = torch.cat([*cached.prompt_queries, query], dim=2)
                cached.prompt_queries = [last[:, :, max(last.shape[2] - window, 0) :].clone()]
            if cached.seen == cached.cache_prompt_tokens:
                cached.end_prompt(module, scaling, query.shape[1])
            return output, weights
        if self.policy.exact:
            return self._exact_step(cached, query, lambda: own(module, query, key, value, mask, **kwargs)[0]), None
        for name in _UNSUPPORTED:
            if kwargs.get(name) is not None:
                raise KVBenchError(
                    f"{type(self.model).__name__} uses '{name}' in its attention, which policies do not support yet: "
                    "choose another model, or policy 'full'."
                )
        return self._policy_steps(module, cached, query), None

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
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], values.shape[3])
        for lane, layer in zip(self.cache.lanes, cached.groups, strict=True):  # type: ignore[union-attr]
            lane_queries, lane_keys, lane_values = lane.take(query), lane.take(keys), lane.take(values)
            for step in range(query.shape[2]):
                now = slice(step, step + 1)
                new_keys, new_values, queries = lane_keys[:, :, now], lane_values[:, :, now], lane_queries[:, :, now]
                if hidden is not None:
                    layer.hidden = lane.take(hidden)[:, now]
                    layer.project = functools.partial(self._project, module, lane, step)
                layer.store.append(new_keys, new_values)
                self.call("insert", layer=layer, keys=new_keys, values=new_values)
                selection = self.call("select", layer=layer, queries=queries, budget=layer.budget)
                result = self.call("attend", layer=layer, queries=queries, selection=selection).output
                part = result.squeeze(2).to(output.dtype)
                if lane.rows is None:
                    output[:, step] = part
                else:
                    output[lane.rows, step] = part
                layer.project = None
        self._calls.pop(module.layer_idx, None)
        return output

    def _own_attention(self, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.implementation, eager
        )
        return function


def governed_layers(layers: Sequence[CacheLayerMixin]) -> list[int]:
    """The places of the layers that a policy governs: those of full attention, not sliding-window or linear ones."""
    return [number for number, layer in enumerate(layers) if type(layer) is DynamicLayer]


def token_bytes(model: Any) -> int:
    """Bytes of one token's keys and values, in the model's dtype, over the layers that a policy governs.

    layers × 2 × key/value heads × head dimension × bytes of a number, from the model's configuration.
    """
    config = model.config.get_text_config(decoder=True)
    layers = len(governed_layers(DynamicCache(config=config).layers))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(max(layers, 1) * 2 * heads * dim * model.dtype.itemsize)


def check_head_budgets(policy: KVCachePolicy | type[KVCachePolicy], allocator: BudgetAllocator) -> None:
    """Refuse an allocator that gives heads different budgets to a policy that cannot honour them."""
    if allocator.head_wise and not policy.head_budgets:
        raise KVBenchError(
            f"Budget '{allocator.name}' gives each head its own number of tokens, which policy '{policy.name}' cannot "
            "honour: choose a budget that only shares over layers (uniform, pyramid, squeeze), or another policy."
        )


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


def _left_padding(mask: Tensor | None) -> Tensor | None:
    """Padding tokens at the start of each row [B], from a mask [B, n] of ones and zeros."""
    if mask is None or mask.dim() != 2:
        return None
    padding = (mask == 0).sum(-1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    if not bool(((columns >= padding[:, None]) == (mask != 0)).all()):
        raise KVBenchError("The attention mask pads elsewhere than on the left: set tokenizer.padding_side='left'.")
    return padding.cpu()


def _last(queries: Tensor, count: int) -> Tensor:
    return queries[:, :, queries.shape[2] - count :]


def _tensor_bytes(layer: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in (layer.keys, layer.values) if isinstance(tensor, Tensor))
