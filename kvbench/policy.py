"""The contract of a KV-cache policy: what it is given, what it answers, and the class that authors subclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from kvbench.budget import LayerBudget
from kvbench.extension import Extension
from kvbench.hookspecs import hookimpl
from kvbench.storage import KVStore

if TYPE_CHECKING:
    from kvbench.attention import Attention
    from kvbench.rotary import Rotary

POLICY_HOOKS = ("prefill", "after_prompt", "select", "attend", "insert")

StepTrace = dict[str, dict[tuple[int, int], Sequence[float]]]
"""For each quantity, by tokens of the context and the layer's place in the model: a value for each query head."""


@dataclass(frozen=True)
class ModelView:
    """What a policy may read of the model before it runs: shapes of its layers, its configuration and its weights.

    `numbers` are the places in the model of the layers that the policy governs; `config` the text configuration as
    plain data; `parameters` the weights by name, detached. `tokenize` turns a text into token ids without special
    tokens; None where `attach` was given no tokenizer.
    """

    name: str
    numbers: tuple[int, ...]
    heads: int
    kv_heads: int
    config: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    tokenize: Callable[[str], list[int]] | None = None


class Observe(Protocol):
    """Is shown what a layer's attention sees of tokens that are replayed."""

    def __call__(self, layer: Layer, queries: Tensor, keys: Tensor) -> None:
        """Queries [B, H, m, d] and keys [B, G, m, d] of the replayed tokens, which follow the tokens in the store."""


Replay = Callable[[Tensor, Observe], None]
"""Runs token ids [B, m] through the model after the stored prompt, shows each layer's vectors and forgets them."""


@dataclass
class Layer:
    """One attention layer, for one group of equally long rows, as policies and probes see it.

    `index` counts from 0 to `count` − 1 over the layers that the policy governs (sliding-window layers keep their own
    cache and are left out); `number` is the layer's place in the model. `state` belongs to the policy: whatever
    it keeps between steps lives here, never on the policy itself, since several groups of rows may be under way.
    """

    index: int
    count: int
    number: int
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    rows: int
    store: KVStore
    budget: LayerBudget
    static: tuple[int, int]
    """Sinks and recent window, in tokens, that the policy always attends to (`KVCachePolicy.static_tokens`)."""
    prompt_tokens: int
    module: nn.Module
    state: dict[str, Any] = field(default_factory=dict)
    prompt_queries: Tensor | None = None
    """During `prefill` only: the queries [B, H, m, d] that probes asked for (`Probe.query_window`)."""
    exact_attention: Callable[[], Tensor] | None = None
    """Set for policies that keep everything: the model's own attention of this step, output [B, H, m, d]."""
    rotary: Rotary | None = None
    previous: Layer | None = None
    """The governed layer before this one, for the same rows."""
    hidden: Tensor | None = None
    """With `KVCachePolicy.uses_hidden`: the input [B, 1, D] of this layer's attention at this decoding step."""
    project: Callable[[Tensor], Tensor] | None = None
    """With `KVCachePolicy.uses_hidden`: see `queries_for`."""
    policy: KVCachePolicy | None = None
    """The policy that governs the layer, for probes that ask what it declares."""

    @property
    def tokens(self) -> int:
        """Tokens of the context so far, evicted ones included."""
        return self.store.tokens

    def queries_for(self, hidden: Tensor) -> Tensor:
        """The queries [B, H, 1, d], after rotation, that this layer would have for another `hidden` [B, 1, D].

        During a decoding step of a policy with `uses_hidden`; `layer.previous.hidden` gives InfiniGen's prediction.
        """
        assert self.project is not None, "queries_for needs `uses_hidden = True` and a decoding step"
        return self.project(hidden)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Apply the model's rotary embedding to `x` [..., n, d] at `positions` [n]; a row's first token is at 0."""
        assert self.rotary is not None
        return self.rotary.rotate(x, positions)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undo the model's rotary embedding: the queries or keys `x` [..., n, d] before their rotation."""
        assert self.rotary is not None
        return self.rotary.unrotate(x, positions)

    def keep_top(self, scores: Tensor, first: int = 0) -> None:
        """Evict all of the tokens from `first` on but those of the best `scores` [B, G, m], as the budget allows.

        The other tokens, before `first` and after the m scored ones, stay. Heads keep different numbers where the
        budget says so (`LayerBudget.heads`). Nothing is evicted where the budget covers the whole prompt.
        """
        if self.budget.covers_all:
            return
        batch, groups, scored = scores.shape
        top = self.budget.top(scores, self.tokens - scored)
        kept = torch.ones(batch, groups, self.tokens + 1, dtype=torch.bool, device=scores.device)
        kept[:, :, first : first + scored] = False
        kept.scatter_(2, torch.where(top < 0, self.tokens, top + first), True)
        self.store.keep(kept[:, :, : self.tokens])


@dataclass
class Selection:
    """The set-aside tokens that each head attends to beside the static set.

    `ids` [B, H, k] or [B, G, k] (one set for the group's query heads), int64 token ids, −1 for none where `padded`; no
    ids select nothing, unless `everything` selects all that is set aside, for the key/value heads in `heads`, bool
    [B or 1, G], where given. `queries` [B, H, 1, d] meet the set-aside tokens in place of the step's own (another
    position encoding). `log_weights` [B, H, k] are added to the scaled scores (importance sampling). `summary`: logits,
    float32 [B, H, s], and values [B, H or G, s, d] of rows that stand for many tokens (estimation zones).
    `evaluations`: distance evaluations per query head that finding the tokens took, for the scanned fraction.
    """

    ids: Tensor | None = None
    padded: bool = False
    everything: bool = False
    heads: Tensor | None = None
    queries: Tensor | None = None
    log_weights: Tensor | None = None
    summary: tuple[Tensor, Tensor] | None = None
    evaluations: Tensor | float | None = None


class _Pluggable(Extension):
    """Marks the policy hooks that a subclass defines, so that authors need no decorators."""

    _wrapper: ClassVar[bool]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in POLICY_HOOKS:
            method = cls.__dict__.get(name)
            if method is not None and not hasattr(method, "kvbench_impl"):
                hookimpl(method, wrapper=cls._wrapper)


class KVCachePolicy(_Pluggable):
    """Decides which past tokens a model attends to.

    Subclasses define any of the hooks `prefill`, `after_prompt`, `select`, `attend` and `insert` (see
    `kvbench.hookspecs.PolicyHooks` for arguments and shapes). The static set that stays attended is whatever they
    neither evict nor set aside.
    """

    _wrapper = False
    exact: ClassVar[bool] = False
    """True for a policy that keeps everything and attends to it through the model's own attention."""
    takes_budget: ClassVar[bool] = True
    """False for a policy whose size does not follow from a number of tokens: its layers' budgets cover everything."""
    cached: ClassVar[bool] = True
    """False for the baseline without a cache: the model computes the whole context anew for every token."""
    batched: ClassVar[bool] = True
    """False for a policy that draws random numbers for all rows at once: its examples run one by one."""
    uses_hidden: ClassVar[bool] = False
    """True for a policy that looks at the inputs of attention layers while decoding (`Layer.hidden`, `queries_for`)."""
    grows: ClassVar[bool] = False
    """True for a policy that attends to all generated tokens in any case, so that long answers outgrow its budget."""
    adaptive: ClassVar[bool] = False
    """True for a policy whose number of tokens depends on the data, with the budget as its upper bound."""
    head_budgets: ClassVar[bool] = False
    """True for a policy that honours `LayerBudget.heads`; others are refused with head-wise budgets, never averaged."""
    across_layers: ClassVar[bool] = False
    """True for a policy that shares the model's whole budget over the layers itself: a layer may exceed its own."""
    query_window: int | None = None
    """How many of the prompt's last queries `prefill` is given; None for all, which costs memory in chunked prefill."""

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    def static_tokens(self, context: int) -> tuple[int, int]:
        """Sinks and recent window, in tokens, that the policy always attends to in a context of `context` tokens."""
        return 0, 0

    def most_attended(self, layer: Layer) -> int | None:
        """The most tokens that `layer` may attend to at this step, on average over its heads; None for no limit.

        Its budget, and the generated tokens of a policy that `grows`. Policies with dense layers say more.
        """
        if layer.budget.covers_all:
            return layer.tokens
        return layer.budget.tokens + (layer.tokens - layer.prompt_tokens if self.grows else 0)

    def begin(self, model: ModelView) -> None:
        """See the model once, when the session is entered, and raise KVBenchError if it does not fit."""


class Probe(_Pluggable):
    """Measures a run by wrapping the policy's hooks.

    Subclasses define any of the policy's hooks as generators that yield once, at the point where the wrapped hook runs
    (`selection = yield` in `select`), and return what the hook shall return (pluggy's `wrapper=True`).
    """

    _wrapper = True
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


class DefaultPolicy:
    """Answers the hooks that the chosen policy leaves out."""

    @hookimpl(trylast=True)
    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Select nothing beside the static set."""
        return Selection()

    @hookimpl(trylast=True)
    def attend(self, layer: Layer, queries: Tensor, selection: Selection) -> Attention:
        """Merge the partial attentions over the static set and the selection."""
        from kvbench.attention import attend  # noqa: PLC0415

        return attend(layer, queries, selection)
