"""One policy's choice in another's storage: `quest+kivi` selects as quest does, from tokens that kivi holds."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, Field, create_model, model_validator
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import JOIN, Extension, Options
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy


class Composed(KVCachePolicy):
    """What compositions add to the policy that selects, which is their other base class."""

    parts: ClassVar[tuple[type[KVCachePolicy], type[KVCachePolicy]]]
    """The policy that selects, and the one that holds."""

    def __init__(self, options: BaseModel | None = None) -> None:
        self._given: Any = self.Options() if options is None else options
        chooses, holds = self.parts
        super().__init__(getattr(self._given, chooses.name))
        self.holder = holds(getattr(self._given, holds.name))

    @property
    def given(self) -> BaseModel:
        """The options of both."""
        found: BaseModel = self._given
        return found

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Let what is set aside from now on be held in the other policy's format."""
        layer.store.storage = self.holder.storage(layer)
        chosen: Any = super()
        if hasattr(chosen, "prefill"):
            chosen.prefill(layer, queries, keys, values)

    def load_state(self, layer: Layer, state: dict[str, Any]) -> None:
        """Let what is set aside from now on be held as before."""
        layer.store.storage = self.holder.storage(layer)
        super().load_state(layer, state)

    def fixed_step(self, parts: Any, clock: Any) -> None:
        """None: the selecting policy's own steps hold plain tokens."""
        return


def compose(chooses: type[KVCachePolicy], holds: type[KVCachePolicy]) -> type[KVCachePolicy]:
    """The policy that selects as one does and holds tokens as the other; KVBenchError where they don't fit."""
    name = f"{chooses.name}{JOIN}{holds.name}"
    if holds.storage is KVCachePolicy.storage:
        raise KVBenchError(
            f"Policy '{name}': '{holds.name}' has no storage for other policies' tokens: choose one that has (kivi)."
        )
    if not hasattr(chooses, "select") or chooses is holds:
        raise KVBenchError(
            f"Policy '{name}': '{chooses.name}' selects nothing from tokens that '{holds.name}' could hold: choose a "
            "policy that selects (quest, retrieval, ...)."
        )
    fields: dict[str, Any] = {
        part.name: (part.Options, Field(default_factory=part.Options, description=part.summary))
        for part in (chooses, holds)
    }
    before = model_validator(mode="before")(lambda values: spread(values, (chooses, holds)))
    validators: dict[str, Any] = {"spread": before}
    made = create_model("Options", __base__=Options, __validators__=validators, **fields)
    content = {
        "name": name, "Options": made, "parts": (chooses, holds), "__doc__": f"{chooses.summary} {holds.summary}",
        "summary": f"Selects as {chooses.name}; what it sets aside is held as {holds.name} holds it.",
        "reference": "; ".join(filter(None, (chooses.reference, holds.reference))),
        "never_exact": chooses.never_exact or holds.never_exact, "__module__": chooses.__module__,
    }  # fmt: skip
    return types.new_class(name, (Composed, chooses), exec_body=lambda space: space.update(content))


def spread(values: Any, parts: tuple[type[Extension], ...]) -> Any:
    """Give each part its options: those named part.option, and those that only one part has."""
    if not isinstance(values, Mapping):
        return values
    found: dict[str, Any] = {}
    for key, value in values.items():
        part, dot, option = key.partition(".")
        owners = [one.name for one in parts if key in one.Options.model_fields]
        if key in {one.name for one in parts}:
            found[key] = {**found.get(key, {}), **value} if isinstance(value, Mapping) else value
        elif dot or len(owners) == 1:
            owner, option = (part, option) if dot else (owners[0], key)
            found.setdefault(owner, {})[option] = value
        elif owners:
            choice = " or ".join(f"{owner}.{key}" for owner in owners)
            raise KVBenchError(f"Option {key}={value} is one of both {' and '.join(owners)}: say {choice}.")
        else:
            found[key] = value
    return found
