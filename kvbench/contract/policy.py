"""The contract of a KV-cache policy: what it is given, what it answers, and the class that authors subclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel
from torch import Tensor

from kvbench.contract.extension import Extension
from kvbench.contract.markers import hookimpl

if TYPE_CHECKING:
    from kvbench.contract.budget import LayerBudget
    from kvbench.contract.held import HeldTokens
    from kvbench.contract.layer import Layer
    from kvbench.contract.selection import Pending
    from kvbench.contract.step import Clock, FixedStep, FixedTokens, Part
    from kvbench.contract.storage import StorageFactory

POLICY_HOOKS = ("attend_prompt", "prefill", "after_prompt", "select", "attend", "insert")


@dataclass(frozen=True)
class ModelView:
    """What a policy may read of the model before it runs: shapes of its layers, its configuration and its weights.

    `numbers` are the places in the model of the layers that the policy governs; `config` the text configuration as
    plain data; `parameters` the weights by name, detached. `tokenize` turns a text into token ids without special
    tokens; None where `attach` was given no tokenizer. `opening` and `closing` are the token ids that its chat template
    puts before a user's message (system prompt and header) and after it, none without a template.
    """

    name: str
    numbers: tuple[int, ...]
    heads: int
    kv_heads: int
    config: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    tokenize: Callable[[str], list[int]] | None = None
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    fingerprint: Callable[[], str] = lambda: ""
    """Tells the model's weights from others', whatever their number type, by a sample of each."""
    require_rotary: Callable[[], None] = lambda: None
    """Raises KVBenchError where keys cannot be had as they were before rotation (`Layer.unrotate`)."""


@dataclass(frozen=True)
class Place:
    """Where a full-attention layer stands: `ordinal` of the model's `count` such layers, and `number` in the model."""

    ordinal: int
    count: int
    number: int


class Observe(Protocol):
    """Is shown what a layer's attention sees of tokens that are replayed."""

    def __call__(self, layer: Layer, queries: Tensor, keys: Tensor) -> None:
        """Queries [B, H, m, d] and keys [B, G, m, d] of the replayed tokens, which follow the tokens in the store."""


class Replay(Protocol):
    """Runs token ids through the model after the stored prompt."""

    def __call__(self, ids: Tensor, observe: Observe) -> None:
        """Run ids [B, m] through the model, show each layer's vectors and forget them."""

    def continuation(self, tokens: int) -> Tensor:
        """What follows the prompt under exact attention: ids [B, m], m at most `tokens`, −1 after a row's end.

        What is known to follow (a question that passes through the policy, given tokens), then greedily. For yardsticks
        that look ahead: each token beyond the known ones takes a replay of those before it.
        """


class Pluggable(Extension):
    """Marks the policy hooks that a subclass defines, so that authors need no decorators."""

    _wrapper: ClassVar[bool]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in POLICY_HOOKS:
            method = cls.__dict__.get(name)
            marks = callable(method) or isinstance(method, classmethod)  # anything else is refused when it is attached
            if marks and not hasattr(method, "kvbench_impl"):
                hookimpl(method, wrapper=cls._wrapper)


class KVCachePolicy(Pluggable):
    """Decides which past tokens a model attends to.

    Subclasses define any of the hooks `attend_prompt`, `prefill`, `after_prompt`, `select`, `attend` and `insert` (see
    `kvbench.contract.hooks.PolicyHooks` for arguments and shapes). The static set that stays attended is whatever they
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
    reads_hidden: ClassVar[bool] = False
    """True for a policy that looks at the inputs of attention layers over the prompt (`reduce_hidden`).

    It reads every prompt itself: none is taken over from another policy's pass.
    """
    grows: ClassVar[bool] = False
    """True for a policy that attends to all generated tokens in any case, so that long answers outgrow its budget."""
    head_budgets: ClassVar[bool] = False
    """True for a policy that honours `LayerBudget.heads`; others are refused with head-wise budgets, never averaged."""
    across_layers: ClassVar[bool] = False
    """True for a policy that shares the model's whole budget over the layers itself: a layer may exceed its own."""
    derived: ClassVar[bool] = False
    """True for a policy made from an index alone; a policy of the same name that a plugin registers replaces it."""
    blocks: ClassVar[bool] = False
    """True for a policy whose `insert`, `select` and `attend` take m tokens at once, as a question or a turn brings.

    Others are called token by token, unless they define none of these hooks.
    """
    query_window: int | None = None
    """How many of the prompt's last queries `prefill` is given; None for all, which costs memory in chunked prefill."""
    running: ClassVar[tuple[str, ...]] = ()
    """Names of tensors [B, G, t] of `layer.state`, in the store's slot order, which follow a compression's choice."""
    query_aware: str = ""
    """What the policy keeps or how it codes it by the prompt's last queries, in one line; empty where by none.

    A context that is saved without its question is then compressed by its own last tokens.
    """
    never_exact: str = ""
    """Why not even a budget that covers everything gives exact attention, in one line; empty where it does."""

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    def governs(self, place: Place) -> bool:
        """Whether the policy governs a layer; the others keep transformers' own cache and exact attention.

        The budget is shared over the governed layers. Users can leave out the first ones of any policy
        (`attach(..., dense_layers=2)`), so this is for choices that belong to the policy itself.
        """
        return True

    def storage(self, layer: Layer) -> StorageFactory:
        """Give what holds tokens in this policy's format, for what other policies select from or keep.

        Only policies that define it can be the second part of a composition (`quest+this`, `snapkv+this`).
        """
        raise NotImplementedError

    @property
    def given(self) -> BaseModel:
        """The options that a user gave."""
        found: BaseModel = self.options
        return found

    def static_tokens(self, context: int) -> tuple[int, int]:
        """Sinks and recent window, in tokens, that the policy always attends to in a context of `context` tokens."""
        return 0, 0

    def begin_select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Pending | None:
        """Begin what `select` would answer, on another thread, and return at once; None leaves it to `select`.

        The engine then attends to the static set and collects the selection with `result()`, for queries [B, H, 1, d].
        While a probe wraps the hooks it calls `select` alone. Until the selection is collected nothing else happens in
        the layer. Policies that define it have the static set attended to apart from the selection in any case, so that
        both orders give the same bits.
        """
        return None

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | str | None:
        """Give one layer's decoding steps in fixed shapes, for a CUDA graph, or why it has none (None: nothing to say).

        It takes over what the policy made of the prompt: `parts`, a lane each, whose stores are not used any more. A
        policy that defines neither `insert`, `select` nor `attend` and sets nothing aside need not define it.
        """
        return None

    def held_step(self, parts: Sequence[Part], clock: Clock, holder: KVCachePolicy) -> FixedStep | str | None:
        """Give what `fixed_step` does for tokens that `holder` holds in its format (`this+holder`).

        By default the holder's own step, where this policy leaves alone what it kept of the prompt.
        """
        if parts[0].layer.budget.every:
            return f"no step of fixed shapes compresses the codes of '{holder.name}'"
        if hasattr(self, "insert") or hasattr(self, "select"):
            does = "selects from" if hasattr(self, "select") else "evicts at every step from"
            return f"no step of fixed shapes {does} the codes of '{holder.name}' as '{self.name}' does"
        return holder.static_step(parts, clock)

    def fixed_tokens(self, parts: Sequence[Part], clock: Clock, unit: int, capacity: int) -> FixedTokens | str:
        """Give all tokens of a layer, `capacity` at most, for selections in fixed steps (`quest+this`), or why not.

        The parts' set-aside tokens are in this policy's format, static ones follow them; `unit` tokens at a time leave
        the window, once a further one has come.
        """
        return f"'{self.name}' has no step of fixed shapes for other policies' tokens"

    def static_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | str | None:
        """Give steps that attend to static sets in this policy's format, and add to them (`other+this`)."""
        return f"'{self.name}' has no step of fixed shapes for other policies' tokens"

    def at_once(self, layer: Layer, most: int) -> int:
        """How many of the `most` tokens that come next, 1 or more, may be one call of each hook (`Selection.ids`).

        So many that all hooks answer what they would answer one by one, but for rounding: `insert` is given them
        together, and each query sees the static set as it was at its own token. For policies without `blocks`; asked
        again after each call, and never where a probe takes tokens one by one.
        """
        return 1

    def most_attended(self, layer: Layer) -> int | None:
        """The most tokens that `layer` may attend to at this step, on average over its heads; None for no limit.

        Its budget, and the generated tokens of a policy that `grows`. Policies that go beyond it say more.
        """
        if layer.budget.covers_all:
            return layer.tokens
        if layer.budget.every:
            return min(layer.budget.tokens + layer.budget.every, layer.tokens)
        return layer.budget.tokens + (layer.tokens - layer.prompt_tokens if self.grows else 0)

    def score_held(self, layer: Layer, held: HeldTokens) -> Tensor:
        """Score what a layer holds, [B, G, t], when it is compressed while decoding; the best are kept.

        ∞ keeps a token as long as the budget allows. The same for steps hook by hook and in fixed shapes: of `layer`
        it may read what does not change from step to step (shapes, scaling, rotation, budget), and of the rows all
        else is in `held`. Only policies that define it go with `Budget.compress_every`; where one evicts at every
        step (`insert`) it leaves that out where `layer.budget.every` says so.
        """
        raise NotImplementedError

    def compression_window(self, every: int) -> int:
        """How many of the latest queries `score_held` is given, `every` at most."""
        return every if self.query_window is None else min(self.query_window, every)

    def save_state(self, layer: Layer) -> dict[str, Any]:
        """What shall be saved of the policy's own for one lane of a layer; `layer.state`.

        Tensors, plain data and whatever `kvbench.Saveable` says; the store has been saved apart. For policies that keep
        something elsewhere, or want to leave out what follows from the rest.
        """
        return layer.state

    def load_state(self, layer: Layer, state: dict[str, Any]) -> None:
        """Take over what `save_state` gave, in a new session; the layer has its store."""
        layer.state.update(state)

    def reduce_hidden(self, number: int, hidden: Tensor) -> Tensor:
        """What to keep of the inputs [B, m, D] of the attention of layer `number`, for each token: [B, m, ...].

        With `reads_hidden`, called for the prompt, whole or part by part, padding included; `prefill` finds all of it,
        without the padding, in `Layer.prompt_hidden`. What a policy keeps here takes memory until then.
        """
        raise NotImplementedError

    def begin(self, model: ModelView) -> None:
        """See the model once, when the session is entered, and raise KVBenchError if it does not fit."""
