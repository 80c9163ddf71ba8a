"""Holds plugins to the contract: what they define when they are attached, and what their hooks answer at a step.

Types and shapes of answers are looked at in every step, which asks the device for nothing. Values (ids in range, none
twice, a finite output) are looked at in the first step of each layer, and in all of them where the environment variable
KVBENCH_CHECK is 1.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvbench.contract.attended import attended
from kvbench.contract.attention import Attention
from kvbench.contract.budget import LayerBudget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.hooks import PolicyHooks
from kvbench.contract.layer import Layer
from kvbench.contract.markers import hookimpl
from kvbench.contract.policy import POLICY_HOOKS, KVCachePolicy, Pluggable
from kvbench.contract.probe import Probe
from kvbench.contract.selection import Selection

Wrapper = Generator[None, Any, Any]
ANSWERS: dict[str, type[Any]] = {"select": Selection, "attend": Attention}
"""The hooks that answer, and with what."""


def named(plugin: Pluggable | type[Pluggable]) -> str:
    """A policy or probe with its module, at the start of a sentence."""
    cls = plugin if isinstance(plugin, type) else type(plugin)
    return f"{'Probe' if issubclass(cls, Probe) else 'Policy'} '{cls.name}' ({cls.__module__})"


def check_instance(plugin: Any, base: type[Pluggable]) -> None:
    """Raise KVBenchError for what is no instance of a policy or of a probe: a class, or something else."""
    if isinstance(plugin, base):
        return
    kind = "probe" if base is Probe else "policy"
    if isinstance(plugin, type) and issubclass(plugin, base):
        raise KVBenchError(
            f"The {kind} is the class {plugin.__name__}; expected an instance, {plugin.__name__}(), or the name of an "
            f"installed {kind}."
        )
    raise KVBenchError(
        f"The {kind} {plugin!r} is a {type(plugin).__name__}; expected an instance of kvbench.{base.__name__}, or the "
        f"name of an installed {kind}."
    )


def check_hooks(cls: type[Pluggable]) -> None:
    """Raise KVBenchError where a policy or probe defines a hook that cannot be called as the contract says."""
    wraps = issubclass(cls, Probe)
    for name in POLICY_HOOKS:
        hook = getattr(cls, name, None)
        if hook is None:
            continue
        known = list(inspect.signature(getattr(PolicyHooks, name)).parameters)[1:]
        if not callable(hook):
            raise KVBenchError(f"{named(cls)} defines {name} as {hook!r}; expected a method of {', '.join(known)}.")
        parameters = list(inspect.signature(hook).parameters.values())
        if not isinstance(inspect.getattr_static(cls, name), staticmethod | classmethod):
            parameters = parameters[1:]
        fixed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        wrong = [p.name for p in fixed if p.name not in known or p.kind is p.KEYWORD_ONLY]
        if wrong:
            raise KVBenchError(
                f"{named(cls)} defines {name}({', '.join(p.name for p in parameters)}); expected these names, or "
                f"fewer: {name}({', '.join(known)})."
            )
        if wraps != inspect.isgeneratorfunction(hook):
            expected = "a generator that yields once, where the wrapped hook runs" if wraps else "a plain method"
            has = "without a yield" if wraps else "as a generator"
            raise KVBenchError(f"{named(cls)} defines {name} {has}; expected {expected}.")
    begins = getattr(cls, "begin_select", KVCachePolicy.begin_select)
    if begins is not KVCachePolicy.begin_select and not hasattr(cls, "select"):
        raise KVBenchError(
            f"{named(cls)} defines begin_select without select; expected both, since probes and blocks of queries have "
            "select alone."
        )


def static_tokens(policy: KVCachePolicy, tokens: int) -> tuple[int, int]:
    """The sinks and the window that a policy keeps of a prompt of `tokens` tokens; KVBenchError for anything else."""
    found: Any = policy.static_tokens(tokens)
    match found:
        case (int(sinks), int(window)) if sinks >= 0 and window >= 0:
            return sinks, window
    raise KVBenchError(
        f"{named(policy)} gave {found!r} from static_tokens; expected two numbers of tokens, sinks and window, each "
        "0 or more."
    )


class Answers:
    """Looks at what a policy answers, inside all probes but those that time it."""

    def __init__(self, policy: KVCachePolicy) -> None:
        self._policy = policy
        self._always = os.environ.get("KVBENCH_CHECK") == "1"

    def _values(self, layer: Layer, queries: Tensor) -> bool:
        return self._always or layer.tokens == layer.prompt_tokens + queries.shape[2]

    @hookimpl(wrapper=True, trylast=True)
    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Wrapper:
        """Hold the selection to the contract."""
        selection = yield
        try:
            if not isinstance(selection, Selection):
                raise KVBenchError(f"select gave {told(selection)}; expected a kvbench.Selection")
            if selection.ids is not None:
                _check_shape(layer, selection.ids, queries.shape[2])
            if self._values(layer, queries):
                for one in of_each_query(selection):
                    attended(layer, one)
        except KVBenchError as fault:
            raise self._named(layer, str(fault)) from None
        return selection

    @hookimpl(wrapper=True, trylast=True)
    def attend(self, layer: Layer, queries: Tensor, selection: Selection) -> Wrapper:
        """Hold the attention to the contract."""
        result = yield
        if not isinstance(result, Attention):
            raise self._named(layer, f"attend gave {told(result)}; expected a kvbench.Attention")
        output, shape = result.output, list(queries.shape[:3])
        if not isinstance(output, Tensor) or output.dim() != 4 or list(output.shape[:3]) != shape:
            raise self._named(layer, f"attend gave {told(output)} as output; expected a tensor {[*shape, 'd']}")
        if self._values(layer, queries) and not bool(torch.isfinite(output).all()):
            raise self._named(layer, "attend gave an output that is NaN or infinite; expected finite numbers")
        return result

    def _named(self, layer: Layer, fault: str) -> KVBenchError:
        return KVBenchError(f"{named(self._policy)} at layer {layer.number}: {fault.rstrip('.')}.")


def check_begun(policy: KVCachePolicy, layer: Layer) -> None:
    """Raise KVBenchError where `begin_select` gave something that no selection can be collected from."""
    if not callable(getattr(layer.begun, "result", None)):
        raise KVBenchError(
            f"{named(policy)} at layer {layer.number}: begin_select gave {told(layer.begun)}; expected something with "
            "a method `result`, such as a concurrent.futures.Future, or None."
        )


def check_wrapped(hook: str, answer: Any, layer: Layer, probes: list[Probe]) -> None:
    """Raise KVBenchError where a probe changed an answer into something else, which the policy's own was not."""
    if hook in ANSWERS and not isinstance(answer, ANSWERS[hook]):
        names = " or ".join(named(probe) for probe in probes if hasattr(probe, hook))
        raise KVBenchError(
            f"{names} returned {told(answer)} from {hook} at layer {layer.number}; expected what its yield gave, a "
            f"kvbench.{ANSWERS[hook].__name__}."
        )


def told(value: Any) -> str:
    """A wrong answer, by its type, and a tensor by its shape."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return "None" if value is None else f"a {type(value).__name__}"


def of_each_query(selection: Selection) -> list[Selection]:
    """A block's selection as one for each query, where they differ."""
    ids = selection.ids
    if ids is None or ids.dim() != 4:
        return [selection]
    return [replace(selection, ids=ids[:, :, query]) for query in range(ids.shape[2])]


def _check_shape(layer: Layer, ids: Any, block: int) -> None:
    if isinstance(ids, Tensor) and ids.dim() == 4 and block > 1:
        if ids.shape[1:3] != (layer.heads, block):
            raise KVBenchError(
                f"select gave ids {list(ids.shape)} for {block} queries; expected {layer.rows} rows, {layer.heads} "
                f"heads and {block} queries, or one set for all queries of a head"
            )
        ids = ids[:, :, 0]
    if not isinstance(ids, Tensor) or ids.dim() != 3 or ids.dtype != torch.int64:
        raise KVBenchError(f"select gave {told(ids)} as ids; expected a tensor [rows, heads, k] of int64")
    if ids.shape[0] != layer.rows or ids.shape[1] not in (layer.heads, layer.kv_heads):
        raise KVBenchError(
            f"select gave ids {list(ids.shape)}; expected {layer.rows} rows, and {layer.heads} query or "
            f"{layer.kv_heads} key/value heads"
        )
