"""Runs a policy inside an unchanged transformers model, through its `Cache` and `AttentionInterface`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
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
from kvbench.engine.attending import Attending
from kvbench.engine.cache import PolicyCache
from kvbench.engine.cached_layer import PolicyCacheLayer
from kvbench.engine.calls import check_continued, check_replaceable, left_padding, named, plain_mask, prompt_end
from kvbench.engine.fixed import FixedCache, FixedDecoder, fixed_decoder
from kvbench.engine.interface import answering, attached
from kvbench.engine.lanes import Lane, last_queries
from kvbench.engine.prompt import Prefill
from kvbench.engine.replay import ReplayCache, Replayer, ends_of
from kvbench.engine.residual import watch_residual
from kvbench.engine.rotary import Rotary
from kvbench.engine.saving.context import Attributes, load_context, save_context
from kvbench.engine.saving.identify import weights_fingerprint
from kvbench.engine.summary import SessionSummary, summarise

if TYPE_CHECKING:
    from kvbench.engine.conformance.report import Report


class Session(Attending):
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
        self.implementation = str(self.config._attn_implementation)
        self._calls = {}
        self.saved: Path | None = None
        """The file whose context is loaded when the session is entered; see `kvbench.resume`."""
        self._attributes: Attributes | None = None
        self._ended_fixed: tuple[int, dict[str, int]] | None = None
        """Steps of fixed shapes that have ended, and the bytes that they held."""
        self._following: Tensor | None = None
        self._logits: Tensor | None = None
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
            self._attributes = Attributes(self.policy)
            if self.saved is not None:
                self.load(self.saved)
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
        if self.policy.uses_hidden or self.policy.reads_hidden:
            for module in {module for layer in self.survey.layers.values() for module in layer.modules}:
                yield module.register_forward_pre_hook(self._note_call, with_kwargs=True)

    def _hidden(self, number: int, before: Tensor, after: Tensor) -> None:
        """Keep what the allocator needs of a layer's hidden states [B, m, D] while the prompt passes."""
        assert self.cache is not None and self.allocator is not None
        cached = self.cache.layers[number]
        if isinstance(cached, PolicyCacheLayer) and not cached.by_lane:
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
            fingerprint=lambda: weights_fingerprint(self.model),
            require_rotary=self._require_rotary,
        )

    def _require_rotary(self) -> None:
        for number in self.numbers:
            layer = self.survey.layers[number]
            Rotary(self.model, self.config, layer.modules[0], number, latent=layer.expand is not None).check()

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
        cache.note(ids)
        if not cache.complete:
            cache.mask = kwargs.get("attention_mask")
            cache.expect(ids, self._padding(cache.mask, rows or 0))
        self.cache, cache.open = cache, True
        return (), {**kwargs, "past_key_values": cache, "use_cache": True}

    @contextmanager
    def followed_by(self, ids: Tensor) -> Iterator[None]:
        """Announce, within the block, the token ids [B, m] that follow the prompt, for yardsticks that look ahead."""
        self._following = ids if ids.shape[1] else None
        try:
            yield
        finally:
            self._following = None

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
        self._logits = getattr(output, "logits", None) if not cache.complete else None
        self._logits = None if self._logits is None else self._logits[:, -1]
        self._complete(cache)
        cache.open = False

    def _padding(self, mask: Any, rows: int) -> Tensor | None:
        if self.policy.exact:
            return None
        padding = left_padding(mask)
        return torch.zeros(rows, dtype=torch.int64) if padding is None and self.defers else padding

    def _complete(self, cache: PolicyCache) -> None:
        if not cache.complete and all(layer.by_lane for layer in cache.governed):
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
        if self.policy.reads_hidden:
            raise KVBenchError(
                f"Policy '{self.policy.name}' looks at the prompt's hidden states, which a prompt that was computed "
                "before does not have: let it read the prompt."
            )
        whole = prompt.ids.shape[1]
        count = whole if tokens is None else tokens
        self._end_fixed()
        self.cache = cache = PolicyCache(self, whole if tokens is None else self.prompt_tokens, len(prompt.ids))
        cache.mask = prompt.mask
        cache.note(prompt.ids[:, :count])
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
        self._logits = prompt.logits if tokens is None else None
        self._complete(cache)

    # -- saving ----------------------------------------------------------------------------------------------------

    @property
    def ids(self) -> Tensor | None:
        """The token ids [B, n] of the context so far, padding included; None where the model was given embeddings."""
        return None if self.cache is None else self.cache.ids

    @property
    def mask(self) -> Tensor | None:
        """The attention mask [B, n] of `ids`: 0 where a row is padded."""
        ids = self.ids
        if self.cache is None or ids is None:
            return None
        prompt = self.cache.mask
        mask = torch.ones_like(ids)
        if isinstance(prompt, Tensor) and prompt.dim() == 2:
            mask[:, : prompt.shape[1]] = prompt.to(mask)
        return mask

    def save(self, path: str | Path) -> None:
        """Save all that model, policy, index and store hold of the context, to go on from it later.

        A safetensors file, whole or not at all; `kvbench.resume` and `load` read it, in any process, and go on bit for
        bit as this session does. Raises KVBenchError before the prompt is complete, for a policy that keeps what
        cannot be saved, and where the file cannot be written.
        """
        save_context(self, self.cache, self._attributes, Path(path))

    def load(self, path: str | Path) -> PolicyCache:
        """Take over a context that `save` wrote, in place of the prompt; returns the cache to go on with.

        Raises KVBenchError for a file of another model, policy, options, budget or code, or a damaged one; the session
        is then as it was.
        """
        if not self.policy.cached:
            raise KVBenchError(f"Policy '{self.policy.name}' keeps no cache, so none can be loaded.")
        cache = load_context(self, Path(path))
        self._end_fixed()
        self._calls.clear()
        self.cache = cache
        return cache

    def summary(self) -> SessionSummary:
        """What the latest context holds and attends to: tokens, bytes, density, and recall where it is probed.

        Inside the block or after it; printed as lines, in a notebook as a table.
        """
        fixed = None
        if self.cache is not None and self.cache.handed_over:
            fixed = self._ended_fixed if self._fixed is None else (self._fixed.taken, self._fixed.bytes())
        return summarise(self.policy.name, self.probes, self.cache, fixed)

    # -- running ---------------------------------------------------------------------------------------------------

    def _finish_prompt(self, cache: PolicyCache) -> None:
        """Let the policy take over the whole prompt of each lane."""
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
            layers = [cached.by_lane[number] for cached in cache.governed]
            own = ids if lane.rows is None else ids[lane.rows.to(ids.device)]

            def run(more: Tensor, observe: Observe, lane: Lane = lane, layers: list[Layer] = layers) -> Tensor:
                self._replay = ReplayCache(cache, lane, layers, observe)
                try:
                    with torch.no_grad():
                        found = self.model(
                            input_ids=more, past_key_values=self._replay, use_cache=True, logits_to_keep=1
                        )
                finally:
                    self._replay = None
                logits: Tensor = found.logits[:, -1].to(ids.device)
                return logits

            rows = slice(None) if lane.rows is None else lane.rows.to(ids.device)
            known, after = (
                None if part is None else part.to(ids.device)[rows] for part in (self._following, self._logits)
            )
            replay = Replayer(run, after, known, ends_of(self.model))
            start = self.now()
            self.call("after_prompt", layers=layers, ids=own[:, lane.padding :], replay=replay)
            cache.index_s += self.now() - start

    def _end_fixed(self) -> None:
        if self._fixed is not None:
            self._ended_fixed = self._fixed.taken, self._fixed.bytes()
            self._fixed.close()
            self._fixed = None

    def fixed(self, tokens: Tensor, new_tokens: int, *, graph: bool, compiled: bool = False) -> FixedDecoder | str:
        """Take the rest of the latest prompt's decoding in steps of fixed shapes, `new_tokens` at most, or say why not.

        `tokens` [B] are those that the first step reads.

        With `graph`, a step is captured as a CUDA graph; with `compiled`, the model's own code is compiled first, all
        but the attention. The cache is not continued in any other way afterwards.
        """
        assert self.cache is not None
        found = fixed_decoder(self, self.cache, tokens, new_tokens, self if self.policy.uses_hidden else None)
        if isinstance(found, FixedDecoder):
            self._fixed, self.cache.handed_over = found, True
            if compiled:
                found.compile()
            if graph:
                found.capture()
        return found
