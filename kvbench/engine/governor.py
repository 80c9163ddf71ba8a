"""A policy with its budget and probes, as the engine asks them: hooks, shares of the budget, windows of queries."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pluggy
import torch
from torch import Tensor

from kvbench.contract.attend import attend, attend_static
from kvbench.contract.attention import Attention
from kvbench.contract.budget import Budget, BudgetAllocator, BudgetRequest, LayerBudget, allocate
from kvbench.contract.errors import KVBenchError
from kvbench.contract.hooks import PolicyHooks
from kvbench.contract.layer import Layer
from kvbench.contract.markers import PROJECT, hookimpl
from kvbench.contract.policy import POLICY_HOOKS, KVCachePolicy, Place
from kvbench.contract.probe import Probe
from kvbench.contract.selection import Selection
from kvbench.engine.survey import Survey, survey, text_config, token_bytes
from kvbench.engine.validation import (
    Answers,
    check_begun,
    check_hooks,
    check_instance,
    check_wrapped,
    static_tokens,
)
from kvbench.plugins import registry

MOST_TOGETHER = 64
"""Tokens that a policy without `blocks` is called for at once, at most."""


class DefaultPolicy:
    """Answers the hooks that the chosen policy leaves out."""

    @hookimpl(trylast=True)
    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Select nothing beside the static set."""
        return Selection()

    @hookimpl(trylast=True)
    def attend(self, layer: Layer, queries: Tensor, selection: Selection) -> Attention:
        """Merge the partial attentions over the static set and the selection."""
        return attend(layer, queries, selection)


class CollectedSelection:
    """Answers `select` with what was begun before."""

    @hookimpl
    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection | None:
        """Wait for the selection under way; None where none is."""
        return None if layer.begun is None else layer.begun.result()


class Governor:
    """What the engine knows of a model and the policy that governs its cache; raises KVBenchError where they don't fit.

    `prompt_tokens` is where the prompt ends, None for the end of the first forward call.
    """

    def __init__(
        self, model: Any, policy: KVCachePolicy, budget: Budget | None, probes: Sequence[Probe],
        prompt_tokens: int | None, dense_layers: int = 0,
    ) -> None:  # fmt: skip
        check_instance(policy, KVCachePolicy)
        check_hooks(type(policy))
        if policy.exact and hasattr(policy, "attend_prompt"):
            raise KVBenchError(
                f"Policy '{policy.name}' defines attend_prompt and is exact, which means the model's own attention "
                "throughout: leave `exact` out, since a policy that evicts nothing keeps everything."
            )
        for probe in probes:
            check_instance(probe, Probe)
            check_hooks(type(probe))
        self.model = model
        self.policy, self.budget, self.probes = policy, budget, list(probes)
        self.prompt_tokens, self.dense_layers = prompt_tokens, dense_layers
        if policy.takes_budget and budget is None:
            raise KVBenchError(f"Policy '{policy.name}' needs a budget: give a number of tokens or a ratio.")
        self.allocator: BudgetAllocator | None = (
            registry().make("budget", budget.allocator, budget.options) if policy.takes_budget and budget else None
        )
        if self.allocator is not None:
            check_head_budgets(policy, self.allocator)
        self.every = 0 if self.allocator is None or budget is None else budget.compress_every or 0
        if self.every:
            check_compression(policy, self.every)
        self.defers = self.allocator is not None and self.allocator.measures
        """Whether the policy's `prefill` waits until the prompt has passed through the whole model."""
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(PolicyHooks)
        self.overlaps = type(policy).begin_select is not KVCachePolicy.begin_select
        """Whether the policy may begin its selections before they are collected."""
        collected = (CollectedSelection(),) if self.overlaps else ()
        for plugin in (DefaultPolicy(), policy, *collected, Answers(policy), *probes):
            manager.register(plugin)
        self._manager = manager
        self.hook: Any = manager.hook
        self.config: Any = text_config(model)
        self.survey: Survey = survey(model) if policy.cached else Survey({})
        self.survey.require(policy)
        self.numbers = chosen_layers(model, policy, dense_layers) if policy.cached else []
        """The places in the model of the layers that the policy governs."""
        self.dense = [number for number in self.survey.layers if number not in self.numbers]
        """Those of the full-attention layers that it leaves exact."""
        self._devices = _working_devices(model)

    def now(self) -> float:
        """Seconds on a clock that waits for the work of the model's devices, not for copies beside it."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        return time.perf_counter()

    @property
    def blocks(self) -> bool:
        """Whether several new tokens are one call of each hook."""
        takes = self.policy.blocks or not any(hasattr(self.policy, hook) for hook in ("insert", "select", "attend"))
        return takes and not self.every and all(probe.blocks for probe in self.probes)

    def at_once(self, layer: Layer, most: int) -> int:
        """How many of the next `most` tokens are one call of each hook in a layer."""
        if self.blocks:
            return most
        if self.every or self.policy.uses_hidden or not all(probe.blocks for probe in self.probes):
            return 1
        most = min(most, MOST_TOGETHER)
        with self.named_errors("at_once", layer):
            return max(1, min(self.policy.at_once(layer, most), most))

    @property
    def own_prompt(self) -> bool:
        """Whether the prompt's attention is in the hands of the policy, or of a probe."""
        return bool(self.hook.attend_prompt.get_hookimpls())

    @property
    def query_aware(self) -> str:
        """What policy or allocator chose by the prompt's last queries, in one line; empty where nothing."""
        found = self.policy.query_aware
        if not found and self.allocator is not None and self.allocator.query_window:
            return f"budget '{self.allocator.name}' is shared by what the prompt's last queries attend to"
        return found

    def drop(self, probe: Probe) -> None:
        """Take a probe off, so that what follows is undisturbed."""
        self.probes.remove(probe)
        self._manager.unregister(probe)

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
        sinks, window = static_tokens(self.policy, tokens)
        try:
            size = self.budget.size(tokens, token_bytes(self.model, numbers))
        except KVBenchError as error:
            if tokens > 1:
                raise
            raise KVBenchError(
                f"{str(error).rstrip('.')} (a prompt of one token is what `guidance_scale` gives its unguided pass: "
                "there, give a ratio, or `negative_prompt_ids` of more tokens than the budget)."
            ) from None
        request = BudgetRequest(
            layers=len(numbers),
            tokens=size,
            # where answers are compressed too, a layer may come to hold more than the prompt
            context=max(tokens, 2 * size) if self.every else tokens,
            every=self.every,
            minimum=max(sinks + window, 1) if self.every else min(max(sinks + window, 1), tokens),
            window=window,
            numbers=numbers,
            measured=measured,
        )
        try:
            return request, allocate(self.allocator, request)
        except (KVBenchError, MemoryError):
            raise
        except Exception as error:
            raise KVBenchError(
                f"Budget '{self.allocator.name}' ({type(self.allocator).__module__}) failed in allocate: "
                f"{type(error).__name__}: {error}"
            ) from error

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call a policy hook; an error in a plugin is reported with the plugin's name."""
        with self.named_errors(hook, arguments.get("layer")):
            answer = getattr(self.hook, hook)(**arguments)
        if self.probes and "layer" in arguments:
            check_wrapped(hook, answer, arguments["layer"], self.probes)
        return answer

    def select(self, layer: Layer, queries: Tensor) -> Selection:
        """The policy's selection; where it has begun it, the static set is attended to in the meantime."""
        layer.begun = layer.static_attention = None
        if self.overlaps and not self.probes and queries.shape[2] == 1:
            with self.named_errors("begin_select", layer):
                layer.begun = self.policy.begin_select(layer, queries, layer.budget)
            if layer.begun is not None:
                check_begun(self.policy, layer)
                if not hasattr(self.policy, "attend"):
                    layer.static_attention = attend_static(layer, queries)
        found: Selection = self.call("select", layer=layer, queries=queries, budget=layer.budget)
        layer.begun = None
        return found

    @contextmanager
    def named_errors(self, hook: str, layer: Layer | None) -> Iterator[None]:
        """Report an error of the block with the plugin that it comes from."""
        try:
            yield
        except (KVBenchError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            plugin = self._culprit(error)
            kind = "Probe" if isinstance(plugin, Probe) else "Policy"
            where = "" if layer is None else f" at layer {layer.number}"
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
        for probe in self.probes:  # of a hook that yields again only pluggy tells, by the place of its code
            for hook in POLICY_HOOKS:
                code = getattr(getattr(probe, hook, None), "__code__", None)
                if code is not None and f"{code.co_filename}:{code.co_firstlineno} " in str(error):
                    return probe
        return culprit


def _working_devices(model: Any) -> set[torch.device]:
    """The CUDA devices that the model works on: those of its weights; all where some lie nowhere between calls."""
    places = {weight.device for weight in model.parameters()}
    if any(place.type == "meta" for place in places):
        return {torch.device("cuda", number) for number in range(torch.cuda.device_count())}
    return {place for place in places if place.type == "cuda"}


def chosen_layers(model: Any, policy: KVCachePolicy, dense_layers: int = 0) -> list[int]:
    """The places of the layers that this policy governs, without the first `dense_layers` full-attention ones."""
    full = list(survey(model).layers)
    if dense_layers < 0 or (dense_layers and dense_layers >= len(full)):
        raise KVBenchError(
            f"dense_layers is {dense_layers}: {type(model).__name__} has {len(full)} full-attention layers, so give 0 "
            f"to {max(len(full) - 1, 0)}."
        )
    places = [Place(ordinal, len(full), number) for ordinal, number in enumerate(full)]
    chosen = [place.number for place in places[dense_layers:] if policy.governs(place)]
    if full and not chosen:
        raise KVBenchError(
            f"Policy '{policy.name}' governs none of the {len(full) - dense_layers} layers that it was offered, of "
            f"{len(full)} full-attention layers of {type(model).__name__}: choose another policy or fewer dense layers."
        )
    return chosen


def check_head_budgets(policy: KVCachePolicy | type[KVCachePolicy], allocator: BudgetAllocator) -> None:
    """Refuse an allocator that gives heads different budgets to a policy that cannot honour them."""
    if allocator.head_wise and not policy.head_budgets:
        raise KVBenchError(
            f"Budget '{allocator.name}' gives each head its own number of tokens, which policy '{policy.name}' cannot "
            "honour: choose a budget that only shares over layers (uniform, pyramid, squeeze), or another policy."
        )


def check_compression(policy: KVCachePolicy, every: int) -> None:
    """Refuse an interval that is smaller than a policy's window, and a policy that cannot score what it holds again."""
    if type(policy).score_held is KVCachePolicy.score_held:
        raise KVBenchError(
            f"Policy '{policy.name}' does not compress while decoding (it has no score_held): choose one that does "
            "(snapkv, h2o, tova, knorm, keydiff, expected_attention, streaming_llm, r_kv, triattention, ...), or leave "
            "--compress-every out."
        )
    window = max(policy.static_tokens(2**20)[1], policy.query_window or 0)
    if every < window:
        raise KVBenchError(
            f"--compress-every {every} is smaller than the window of {window} tokens of policy '{policy.name}': ask "
            f"for at least {window}, or for a smaller window."
        )
