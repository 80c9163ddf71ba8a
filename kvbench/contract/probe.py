"""The contract of a probe: it measures a run by wrapping the policy's hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel

from kvbench.contract.policy import Pluggable

StepTrace = dict[str, dict[tuple[int, int], Sequence[float]]]
"""For each quantity, by tokens of the context and the layer's place in the model: a value for each query head."""


class Probe(Pluggable):
    """Measures a run by wrapping the policy's hooks.

    Subclasses define any of the policy's hooks as generators that yield once, at the point where the wrapped hook runs
    (`selection = yield` in `select`), and return what the hook shall return (pluggy's `wrapper=True`).
    """

    _wrapper = True
    blocks: ClassVar[bool] = False
    """True for a probe whose hooks take m tokens at once; beside others, a policy is called token by token."""
    alone: ClassVar[bool] = False
    """True for a probe that measures time: it gets a generation of its own, which no other probe slows down."""

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    def query_window(self, number: int) -> int | None:
        """How many of the prompt's last queries it needs in layer `number` of the model; None for all of them.

        They come as `layer.prompt_queries` during `prefill`, whatever the policy itself is given.
        """
        return 0

    def result(self) -> dict[str, Any]:
        """What was measured since the probe was made, as plain numbers that JSON can hold."""
        raise NotImplementedError

    def trace(self) -> StepTrace:
        """What was measured step by step for a batch of one, to be stored beside the examples; nothing by default."""
        return {}
