"""Policies by layer: `snapkv@0-3~quest` is snapkv in the first four full-attention layers and quest in the others."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field, create_model, model_validator
from torch import Tensor

from kvbench.contract.attend import attend
from kvbench.contract.attention import Attention
from kvbench.contract.budget import LayerBudget
from kvbench.contract.composition import spread
from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import BETWEEN_LAYERS, Options
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy, ModelView, Place
from kvbench.contract.selection import Selection

if TYPE_CHECKING:
    from kvbench.contract.step import Clock, Part

_RULE = re.compile(r"(?P<name>[^@]+)(@(?P<first>\d+)(-(?P<last>\d+))?)?")


class Layered(KVCachePolicy):
    """What such policies are made of: each hook goes to the policy that the layer has."""

    parts: ClassVar[tuple[type[KVCachePolicy], ...]]
    ranges: ClassVar[tuple[range | None, ...]]
    """The places of each part's layers among the model's full-attention layers; None for all that are left."""

    def __init__(self, options: BaseModel | None = None) -> None:
        self._given: Any = self.Options() if options is None else options
        super().__init__(self._given)
        self._policies = [part(getattr(self._given, part.name)) for part in self.parts]
        self._by_number: dict[int, KVCachePolicy] = {}
        windows = [policy.query_window for policy in self._policies if not policy.exact]
        self.query_window = None if None in windows else max(window for window in windows if window is not None)

    def governs(self, place: Place) -> bool:
        """As the layer's policy says; a layer of a policy that keeps everything stays exact."""
        chosen = (
            policy for policy, mine in zip(self._policies, self.ranges, strict=True)
            if mine is None or place.ordinal in mine
        )  # fmt: skip
        policy = self._by_number[place.number] = next(chosen)
        return not policy.exact and policy.governs(place)

    def for_layer(self, layer: Layer) -> KVCachePolicy:
        """The policy of a layer."""
        if layer.number not in self._by_number:
            raise KVBenchError(
                f"Layer {layer.number} reads another layer's tokens, so policies by layer do not fit this model: "
                "choose one policy for all layers."
            )
        return self._by_number[layer.number]

    def begin(self, model: ModelView) -> None:
        """Let every policy see the model."""
        for policy in self._policies:
            policy.begin(model)

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The largest of all."""
        each = [policy.static_tokens(context) for policy in self._policies if not policy.exact]
        return max(sinks for sinks, _ in each), max(window for _, window in each)

    def most_attended(self, layer: Layer) -> int | None:
        """What the layer's policy says."""
        return self.for_layer(layer).most_attended(layer)

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Let the layer's policy take over the prompt, with as many of its queries as that asks for."""
        policy: Any = self.for_layer(layer)
        layer.static = policy.static_tokens(layer.tokens)
        if hasattr(policy, "prefill"):
            window = queries.shape[2] if policy.query_window is None else min(policy.query_window, queries.shape[2])
            policy.prefill(layer, queries[:, :, queries.shape[2] - window :], keys, values)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Let the layer's policy take note of new tokens."""
        self._call(layer, "insert", lambda: None, keys, values)

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """What the layer's policy selects."""
        found: Selection = self._call(layer, "select", Selection, queries, budget)
        return found

    def attend(self, layer: Layer, queries: Tensor, selection: Selection) -> Attention:
        """The attention of the layer's policy."""
        found: Attention = self._call(layer, "attend", lambda: attend(layer, queries, selection), queries, selection)
        return found

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> str:
        """None yet, since some layers could have a step and others none."""
        return "layers have policies of their own"

    def _call(self, layer: Layer, hook: str, otherwise: Callable[[], Any], *arguments: Any) -> Any:
        policy = self.for_layer(layer)
        return getattr(policy, hook)(layer, *arguments) if hasattr(policy, hook) else otherwise()


def by_layer(name: str, find: Callable[[str], type[KVCachePolicy]]) -> type[KVCachePolicy]:
    """The policy of a name such as snapkv@0-3~quest, whose parts `find` knows; KVBenchError where they don't fit."""
    parts, ranges = [], []
    for text in name.split(BETWEEN_LAYERS):
        rule = _RULE.fullmatch(text)
        if rule is None:
            raise KVBenchError(f"Policy '{name}': '{text}' is no policy and its layers, such as snapkv@0-3 or quest@2.")
        parts.append(find(rule["name"]))
        last = None if rule["first"] is None else int(rule["last"] or rule["first"]) + 1
        ranges.append(None if last is None else range(int(rule["first"]), last))
        if last is not None and not ranges[-1]:
            raise KVBenchError(f"Policy '{name}': the layers of '{text}' end before they begin.")
    if ranges[-1] is not None or None in ranges[:-1]:
        raise KVBenchError(
            f"Policy '{name}' must say which layers each policy has, but for the last one, which has the others: "
            "such as snapkv@0-3~quest."
        )
    names = [part.name for part in parts]
    governing = [part for part in parts if not part.exact]
    for part in parts:
        if part.exact and governing and part.cached:
            continue
        if not part.cached or not part.takes_budget or part.reads_hidden or any(
            hasattr(part, hook) for hook in ("after_prompt", "attend_prompt")
        ):  # fmt: skip
            raise KVBenchError(
                f"Policy '{name}': '{part.name}' takes no budget or looks at all layers at once (or at the prompt's "
                "hidden states), so it cannot be one of several: choose "
                "policies that take a budget in each layer, and full for layers that stay exact."
            )
    if len(set(names)) < len(names) or not governing:
        raise KVBenchError(f"Policy '{name}' names a policy twice, or none that evicts or selects.")
    fields: dict[str, Any] = {
        part.name: (part.Options, Field(default_factory=part.Options, description=part.summary)) for part in parts
    }
    before = model_validator(mode="before")(lambda values: spread(values, tuple(parts)))
    validators: dict[str, Any] = {"spread": before}
    made = create_model("Options", __base__=Options, __validators__=validators, **fields)
    content = {
        "name": name, "Options": made, "parts": tuple(parts), "ranges": tuple(ranges),
        "summary": f"By layer: {', '.join(name.split(BETWEEN_LAYERS))}.", "__doc__": "By layer.",
        "reference": "; ".join(filter(None, (part.reference for part in parts))),
        "batched": all(part.batched for part in governing), "blocks": all(part.blocks for part in governing),
        "head_budgets": all(part.head_budgets for part in governing), "__module__": parts[0].__module__,
        **{flag: any(getattr(part, flag) for part in governing)
           for flag in ("uses_hidden", "grows", "across_layers")},
        **{line: next((getattr(part, line) for part in governing if getattr(part, line)), "")
           for line in ("never_exact", "query_aware")},
    }  # fmt: skip
    return types.new_class(name, (Layered,), exec_body=lambda space: space.update(content))
