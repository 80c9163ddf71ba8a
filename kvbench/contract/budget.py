"""Budgets: how many tokens may be attended at a step, and how that total is shared over layers and heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import Extension


@dataclass(frozen=True)
class LayerBudget:
    """What one layer may attend to at a step: `tokens` per head, the static set included.

    A budget that covers the whole prompt (`covers_all`) covers what is generated after it as well. `heads`, int64
    [B, G], is given where key/value heads have different budgets; each row's mean is `tokens`. Only policies that
    declare `head_budgets` meet it; `top` and `Layer.keep_top` honour it.
    """

    tokens: int
    covers_all: bool = False
    heads: Tensor | None = field(default=None, compare=False)
    every: int = 0
    """Generated tokens after which what is held is cut down to the budget again, and again (`Budget.compress_every`);
    between, it grows. 0 leaves it to the policy. Such a budget may be larger than the prompt, and covers nothing."""

    @cached_property
    def least(self) -> int:
        """The smallest head's tokens."""
        return self.tokens if self.heads is None else int(self.heads.min())

    @cached_property
    def most(self) -> int:
        """The largest head's tokens."""
        return self.tokens if self.heads is None else int(self.heads.max())

    def beside(self, static: int, available: int) -> int:
        """Tokens left for a selection from `available` tokens beside a static set of `static` tokens.

        The largest head's where heads have different budgets.
        """
        return available if self.covers_all else min(max(self.most - static, 0), available)

    def counts(self, static: int, available: int, heads: int) -> Tensor | None:
        """Tokens left for each of `heads` H or G heads, int64 [B, H or G]; None where all get `beside`'s number."""
        if self.heads is None or self.covers_all:
            return None
        left = (self.heads - static).clamp(0, available)
        return left if heads == left.shape[1] else left.repeat_interleave(heads // left.shape[1], dim=1)

    def cut(self, ranked: Tensor, static: int, *, unit: int = 1) -> Tensor:
        """Replace by −1 what exceeds each head's budget in `ranked` ids [B, H or G, k], best first.

        Every id stands for `unit` tokens (a page, a block), and `static` tokens are attended beside them.
        """
        counts = self.counts(static, ranked.shape[2] * unit, ranked.shape[1])
        if counts is None:
            return ranked
        rank = torch.arange(ranked.shape[2], device=ranked.device)
        return ranked.masked_fill(rank >= (counts.to(ranked.device) // unit)[..., None], -1)

    def top(self, scores: Tensor, static: int, *, unit: int = 1) -> Tensor:
        """Indices of the best `scores` [B, H or G, n] that the budget leaves beside `static` tokens, best first.

        int64 [B, H or G, k], −1 beyond a head's own budget; every score is for `unit` tokens (a page, a block).
        """
        wanted = self.beside(static, scores.shape[2] * unit) // unit
        return self.cut(scores.topk(wanted, dim=-1).indices, static, unit=unit)


class Budget(BaseModel):
    """A size and an allocator.

    The size is the number of tokens attended at a step, static set included, averaged over layers and heads: given
    as `tokens`, as a `ratio` of the context, or as `bytes` (a number, or text such as 64MiB): the keys and values, in
    the model's dtype, of the tokens attended at a step over all governed layers, for one sequence, rounded down to
    whole tokens. `allocator` names the budget plugin that shares it over layers and heads.

    With `compress_every`, an evicting policy keeps everything that is generated for so many tokens and then scores
    prompt and answer together and keeps the budget's best, again and again; `tokens` may then exceed the prompt.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int | None = Field(default=None, ge=1)
    ratio: float | None = Field(default=None, gt=0, le=1)
    bytes: ByteSize | None = Field(default=None, ge=1)
    allocator: str = "uniform"
    options: dict[str, Any] = Field(default_factory=dict)
    compress_every: int | None = Field(default=None, ge=1, le=2**31 - 1)

    @model_serializer(mode="wrap")
    def _without_what_came_later(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what earlier versions did not have, so that their runs keep their names."""
        found: dict[str, Any] = serialise(self)
        if self.compress_every is None:
            found.pop("compress_every", None)
        return found

    @model_validator(mode="after")
    def _one_size(self) -> Budget:
        if sum(size is not None for size in (self.tokens, self.ratio, self.bytes)) != 1:
            raise ValueError("a budget needs exactly one size: tokens, ratio or bytes")
        return self

    def size(self, context: int, token_bytes: int) -> int:
        """Tokens per layer and head, on average, for a context of `context` tokens; raises where it does not fit.

        `token_bytes`: keys and values of one token over all governed layers (`kvbench.engine.survey.token_bytes`).
        """
        if self.ratio is not None:
            return max(1, round(self.ratio * context))
        asked, tokens = f"{self.tokens} tokens", self.tokens
        if tokens is None:
            assert self.bytes is not None
            tokens = int(self.bytes) // token_bytes
            asked = f"{int(self.bytes)} bytes ({tokens} tokens of {token_bytes} bytes)"
        if tokens > context and self.compress_every is None:
            raise KVBenchError(
                f"The budget of {asked} is larger than the context of {context} tokens: "
                f"ask for at most {context} tokens, or for a ratio up to 1."
            )
        if tokens < 1:
            raise KVBenchError(
                f"The budget of {asked} does not hold a token: ask for at least {token_bytes} bytes for each."
            )
        return tokens


@dataclass(frozen=True)
class BudgetRequest:
    """What an allocator shares out: `layers` × `tokens`, each layer getting from `minimum` to `context` tokens.

    `minimum` is the policy's static set, of which `window` tokens are the most recent ones and the rest the first.
    `numbers` are the layers' places in the model. `measured` has what the allocator's `measure` returned for each.
    """

    layers: int
    tokens: int
    context: int
    minimum: int
    window: int
    numbers: Sequence[int] = ()
    measured: Sequence[Any] = ()
    every: int = 0
    """As in `LayerBudget`: where it is not 0, `context` is what a layer may hold at most, also beyond the prompt."""

    @property
    def total(self) -> int:
        """Sum over the layers."""
        return self.layers * self.tokens

    @property
    def beside(self) -> int:
        """Tokens per layer that are free to share out: those beside the static set."""
        return self.tokens - self.minimum


@dataclass(frozen=True)
class PromptLayer:
    """A layer's prompt as allocators see it: B rows of n tokens, the layer's attention over them done.

    `ordinal` counts the governed layers from 0, `number` is the layer's place in the model. `queries` [B, H, m, d] are
    the last m (`BudgetAllocator.query_window`), `keys` [B, G, n, d]; both after rotary embedding. `hidden` [B, n, ...]
    has what `BudgetAllocator.reduce_hidden` returned for each token.
    """

    ordinal: int
    number: int
    scaling: float
    queries: Tensor
    keys: Tensor
    hidden: Tensor | None = None


class BudgetAllocator(Extension, ABC):
    """Shares a budget over the layers, and where it wants over each layer's key/value heads.

    Only `allocate` must be defined. An allocator that looks at the prompt defines one of three more hooks:
    `share_heads` is called as soon as a layer's attention over the prompt is done. `measure` (and `reduce_hidden`, for
    hidden states) defers the policy until the whole prompt has passed through the model, since the budget of the
    first layer then depends on the last: until then the keys and values of the prompt are held in full, beside the
    queries that policy, probes and allocator asked for.
    """

    head_wise: bool = False
    """True where `share_heads` is defined: such budgets go with policies that declare `head_budgets`."""
    query_window: int = 0
    """How many of the prompt's last queries `measure` and `share_heads` are given."""

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    @abstractmethod
    def allocate(self, request: BudgetRequest) -> list[int]:
        """Return the tokens of each layer; the session asserts that they sum to `request.total`."""

    def share_heads(self, prompt: PromptLayer, request: BudgetRequest, tokens: int) -> Tensor:
        """Return each key/value head's tokens, int64 [B, G], for a layer whose budget is `tokens`.

        The session asserts that every row has `tokens` as its mean and that each head gets from `request.minimum` to
        `request.context`. Called where `head_wise` is True.
        """
        raise NotImplementedError

    def measure(self, prompt: PromptLayer) -> Any:
        """Return what `allocate` needs to know of a layer's prompt of one row; it finds it in `request.measured`."""
        return None

    def reduce_hidden(self, before: Tensor, after: Tensor) -> Tensor:
        """Return what `measure` needs of the hidden states, a value or a vector for each token: [B, m] or [B, m, k].

        `before` and `after` [B, m, D] are the residual stream before a layer's attention and after adding its output;
        m tokens at a time, so that hidden states are never held for a whole prompt.
        """
        raise NotImplementedError

    @property
    def measures(self) -> bool:
        """Whether `allocate` needs the prompt's pass through the whole model."""
        return type(self).measure is not BudgetAllocator.measure

    @property
    def reads_hidden(self) -> bool:
        """Whether `measure` needs hidden states."""
        return type(self).reduce_hidden is not BudgetAllocator.reduce_hidden


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
    return [
        LayerBudget(share, covers_all=share == request.context and not request.every, every=request.every)
        for share in shares
    ]


def allocate_heads(
    allocator: BudgetAllocator, prompt: PromptLayer, request: BudgetRequest, budget: LayerBudget
) -> LayerBudget:
    """Let an allocator share a layer's budget over its heads, and hold it to its promise."""
    prompt_tokens = prompt.keys.shape[2]
    if not allocator.head_wise or budget.covers_all or budget.tokens >= prompt_tokens:
        return budget
    request = replace(request, context=prompt_tokens)
    heads = allocator.share_heads(prompt, request, budget.tokens)
    rows, groups = prompt.keys.shape[:2]
    fits = heads.shape == (rows, groups) and bool((heads.sum(-1) == groups * budget.tokens).all())
    if not fits or int(heads.min()) < request.minimum or int(heads.max()) > request.context:
        raise KVBenchError(
            f"Budget '{allocator.name}' shared out {heads.tolist()} tokens over the heads of layer {prompt.number}; "
            f"expected {groups} heads of {request.minimum} to {request.context} tokens with a mean of "
            f"{budget.tokens}, for {rows} rows: report this to the plugin's author."
        )
    return replace(budget, heads=heads.to(device=prompt.keys.device, dtype=torch.int64))


def fit(shares: Sequence[float], *, total: int, low: int, high: int) -> list[int]:
    """Round wished-for shares to whole tokens within [low, high] that sum to exactly the total.

    What one share cannot take is spread evenly over the others; allocators call this last.
    """
    # The shift that makes the clipped wishes sum to the total is monotone, so bisection finds it.
    below, above = low - max(shares) - 1.0, high - min(shares) + 1.0
    for _ in range(100):
        shift = (below + above) / 2
        if sum(min(max(share + shift, low), high) for share in shares) < total:
            below = shift
        else:
            above = shift
    exact = [min(max(share + above, low), high) for share in shares]
    whole = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    missing = total - sum(whole)
    for place in by_remainder * 2:
        if missing <= 0:
            break
        if whole[place] < high:
            whole[place] += 1
            missing -= 1
    return whole
