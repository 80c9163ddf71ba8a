"""One policy's choice in another's storage: `quest+kivi` selects as quest does from tokens that kivi holds, and
`snapkv+kivi` holds in kivi's codes what snapkv keeps."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field, create_model, model_validator
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import JOIN, Extension, Options
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy, Replay

if TYPE_CHECKING:
    from kvbench.contract.step import Clock, FixedStep, Part


class Composed(KVCachePolicy):
    """What compositions add to the policy that selects or evicts, which is their other base class."""

    parts: ClassVar[tuple[type[KVCachePolicy], type[KVCachePolicy]]]
    """The policy that selects or evicts, and the one that holds."""

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
        """Let the other policy hold, in its format, what is set aside from now on, or else what is kept."""
        storage = self.holder.storage(layer)
        layer.store.storage = storage
        chosen: Any = super()
        if hasattr(chosen, "prefill"):
            chosen.prefill(layer, queries, keys, values)
        if not hasattr(self, "select") and not hasattr(self, "after_prompt"):
            layer.store.hold_static(storage)

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | str | None:
        """A step over the other policy's storage, where both have their half of one."""
        return self.held_step(parts, clock, self.holder)


class ComposedAfterPrompt(Composed):
    """The same for a policy that evicts after the whole prompt."""

    def after_prompt(self, layers: list[Layer], ids: Tensor, replay: Replay) -> None:
        """Let the policy evict, and the other one hold what it keeps."""
        chosen: Any = super()
        chosen.after_prompt(layers, ids, replay)
        if not hasattr(self, "select"):
            for layer in layers:
                layer.store.hold_static(layer.store.storage)


def compose(chooses: type[KVCachePolicy], holds: type[KVCachePolicy]) -> type[KVCachePolicy]:
    """The policy that chooses tokens as one does and holds them as the other; KVBenchError where they don't fit."""
    name = f"{chooses.name}{JOIN}{holds.name}"
    if holds.storage is KVCachePolicy.storage:
        raise KVBenchError(
            f"Policy '{name}': '{holds.name}' has no storage for other policies' tokens: choose one that has (kivi)."
        )
    if chooses.exact or not chooses.cached or chooses is holds or chooses.storage is not KVCachePolicy.storage:
        raise KVBenchError(
            f"Policy '{name}': '{chooses.name}' neither selects nor evicts tokens that '{holds.name}' could hold: "
            "choose a policy that does (quest, retrieval, snapkv, h2o, ...), or the second one alone."
        )
    selects = hasattr(chooses, "select")
    fields: dict[str, Any] = {
        part.name: (part.Options, Field(default_factory=part.Options, description=part.summary))
        for part in (chooses, holds)
    }
    before = model_validator(mode="before")(lambda values: spread(values, (chooses, holds)))
    validators: dict[str, Any] = {"spread": before}
    made = create_model("Options", __base__=Options, __validators__=validators, **fields)
    content = {
        "name": name, "Options": made, "parts": (chooses, holds), "__doc__": f"{chooses.summary} {holds.summary}",
        "summary": (
            f"Selects as {chooses.name}; what it sets aside is held as {holds.name} holds it."
            if selects
            else f"Evicts as {chooses.name}; what it keeps is held as {holds.name} holds it."
        ),
        "reference": "; ".join(filter(None, (chooses.reference, holds.reference))),
        "query_aware": chooses.query_aware or holds.query_aware,
        "never_exact": chooses.never_exact or holds.never_exact, "__module__": chooses.__module__,
    }  # fmt: skip
    base = ComposedAfterPrompt if hasattr(chooses, "after_prompt") else Composed
    return types.new_class(name, (base, chooses), exec_body=lambda space: space.update(content))


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
