"""Budgets: how many tokens may be attended at a step, and how that total is shared over the layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvbench.errors import KVBenchError
from kvbench.extension import Extension


@dataclass(frozen=True)
class LayerBudget:
    """What one layer may attend to at a step: `tokens` per head, the static set included.

    A budget that covers the whole prompt (`covers_all`) covers what is generated after it as well.
    """

    tokens: int
    covers_all: bool = False

    def beside(self, static: int, available: int) -> int:
        """Tokens left for a selection from `available` tokens beside a static set of `static` tokens."""
        return available if self.covers_all else min(max(self.tokens - static, 0), available)


class Budget(BaseModel):
    """A size and an allocator.

    The size is the number of tokens attended at a step, static set included, averaged over layers and heads: given
    as `tokens`, or as a `ratio` of the context. `allocator` names the budget plugin that shares it over the layers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int | None = Field(default=None, ge=1)
    ratio: float | None = Field(default=None, gt=0, le=1)
    allocator: str = "uniform"
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_size(self) -> Budget:
        if (self.tokens is None) == (self.ratio is None):
            raise ValueError("a budget needs exactly one size: tokens or ratio")
        return self

    def size(self, context: int) -> int:
        """Tokens per layer and head, on average, for a context of `context` tokens; raises where it does not fit."""
        if self.tokens is None:
            assert self.ratio is not None
            return max(1, round(self.ratio * context))
        if self.tokens > context:
            raise KVBenchError(
                f"The budget of {self.tokens} tokens is larger than the context of {context} tokens: "
                f"ask for at most {context} tokens, or for a ratio up to 1."
            )
        return self.tokens


@dataclass(frozen=True)
class BudgetRequest:
    """What an allocator shares out: `layers` × `tokens`, each layer getting from `minimum` to `context` tokens."""

    layers: int
    tokens: int
    context: int
    minimum: int
    window: int

    @property
    def total(self) -> int:
        """Sum over the layers."""
        return self.layers * self.tokens


class BudgetAllocator(Extension, ABC):
    """Shares a budget over the layers."""

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    @abstractmethod
    def allocate(self, request: BudgetRequest) -> list[int]:
        """Return the tokens of each layer; the session asserts that they sum to `request.total`."""


def allocate(allocator: BudgetAllocator, request: BudgetRequest) -> list[LayerBudget]:
    """Run an allocator and hold it to its promise."""
    if request.tokens < request.minimum:
        raise KVBenchError(
            f"The budget of {request.tokens} tokens per layer is smaller than the policy's static set of "
            f"{request.minimum} tokens: raise --tokens or --ratio, or lower the sinks and window options."
        )
    shares = allocator.allocate(request)
    if len(shares) != request.layers or sum(shares) != request.total:
        raise KVBenchError(
            f"Budget '{allocator.name}' shared out {sum(shares)} tokens over {len(shares)} layers; expected "
            f"{request.total} over {request.layers}: report this to the plugin's author."
        )
    if min(shares) < request.minimum or max(shares) > request.context:
        raise KVBenchError(
            f"Budget '{allocator.name}' gave a layer {min(shares)} to {max(shares)} tokens; expected "
            f"{request.minimum} (its static set) to {request.context} (the context): report it to the plugin's author."
        )
    return [LayerBudget(share, covers_all=share == request.context) for share in shares]


def fit(shares: list[float], request: BudgetRequest) -> list[int]:
    """Round wished-for shares to whole tokens within [minimum, context] that sum to exactly the total.

    What one layer cannot take is spread evenly over the others; allocators call this last.
    """
    low, high = request.minimum, request.context
    # The shift that makes the clipped wishes sum to the total is monotone, so bisection finds it.
    below, above = low - max(shares) - 1.0, high - min(shares) + 1.0
    for _ in range(100):
        shift = (below + above) / 2
        if sum(min(max(share + shift, low), high) for share in shares) < request.total:
            below = shift
        else:
            above = shift
    exact = [min(max(share + above, low), high) for share in shares]
    whole = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    missing = request.total - sum(whole)
    for layer in by_remainder * 2:
        if missing <= 0:
            break
        if whole[layer] < high:
            whole[layer] += 1
            missing -= 1
    return whole
