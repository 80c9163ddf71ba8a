"""What a task is: seeded examples of an asked length and a score, for generated text or for given tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field

from kvbench.contract.extension import Extension, Options

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One question about one context.

    The user's turn is `context` followed by `question`; `answer_prefix` begins the assistant's turn; the model then
    writes at most `max_new_tokens` tokens. `info` says where the example comes from (text and its hash, depth in
    percent, ...). Without `chat` the text is given as it is, without the tokenizer's chat template, as some benchmarks
    have it for completions and few-shot examples. `solved` are questions with their answers before it, each a turn of
    the user and one of the assistant; they count as context. An assistant's turn that begins inside a thinking block
    gets no answer prefix, unless `thinking_prefix`.
    """

    id: str
    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    max_new_tokens: int
    info: dict[str, str | int | float] = field(default_factory=dict)
    chat: bool = True
    solved: tuple[tuple[str, str], ...] = ()
    thinking_prefix: bool = False


@dataclass(frozen=True)
class Prompt:
    """Token ids of a whole prompt: the first `context_tokens` are the context, the rest the question and after.

    `prefix_left_out` says that the example has an answer prefix which was not given, since the turn begins with a
    thinking block.
    """

    input_ids: list[int]
    context_tokens: int
    prefix_left_out: bool = False


class TaskOptions(Options):
    """What every task with an answer prefix lets users choose."""

    thinking_prefix: bool = Field(
        default=False,
        description="Give the answer prefix inside a thinking block, too, where the chat template opens one.",
    )


class Task(Extension, ABC):
    """A source of examples with a score; third parties subclass it and register the class with `kvbench_tasks`."""

    Options: ClassVar[type[BaseModel]] = TaskOptions
    metrics: ClassVar[dict[str, str]] = {}
    """Names, and labels for tables, of what `measures` gives beside the score."""

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options = self.Options() if options is None else options

    @property
    def thinking_prefix(self) -> bool:
        """The option of that name, for the examples that the task makes."""
        return bool(getattr(self.options, "thinking_prefix", False))

    @abstractmethod
    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[Example]:
        """Yield `count` examples whose prompt and answer together take at most `context_length` tokens.

        The same arguments give the same examples in every process, and a larger `count` only adds examples.
        Raises KVBenchError where the task cannot be built at this length.
        """

    @abstractmethod
    def score(self, prediction: str, example: Example) -> float:
        """Score the generated text (without prompt and answer prefix) between 0 and 1."""

    def measures(self, prediction: str, example: Example) -> dict[str, float]:
        """What else the generated text shows, by names of `metrics`; a name whose value there is none of is left out.

        Like the score it may depend on the text, the references and `info` alone, so that it can be had again.
        """
        return {}

    def data(self) -> dict[str, str]:
        """Name and hash the texts that the examples are made from: they belong to a run's configuration."""
        return {}


@dataclass(frozen=True)
class TokenExample:
    """A sequence of token ids: the first `prompt_tokens` are the prompt, each further one passes through the policy."""

    id: str
    input_ids: tuple[int, ...]
    prompt_tokens: int
    info: dict[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class LogitScores:
    """What one example measured: a value for each of the task's metrics, and where there are some, their positions."""

    values: dict[str, float]
    positions: dict[str, list[float]] = field(default_factory=dict)


class ForcedTask(Extension, ABC):
    """A task whose tokens are given (teacher forcing), scored by the logits that a policy and exact attention give.

    After the prompt, every given token goes through the policy as if it had been generated. m positions are scored:
    each given token after the prompt predicts its successor. (What the prompt's last token predicts is left out: the
    prompt's attention is exact with every policy.) Third parties register such a class with `kvbench_tasks`.
    """

    metrics: ClassVar[dict[str, str]]
    """The metrics' names and, for tables, their labels."""
    main: ClassVar[str]
    """The metric, between 0 and 1 and the higher the better, that stands where other tasks have their accuracy."""

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options: Any = self.Options() if options is None else options

    @abstractmethod
    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[TokenExample]:
        """Yield `count` examples of at most `context_length` tokens; see `kvbench.contract.task.Task.examples`."""

    @abstractmethod
    def score(self, logits: Tensor, exact: Tensor, targets: Tensor) -> LogitScores:
        """Score a policy's `logits` [m, V] against `exact` attention's [m, V] and the given next tokens [m]."""

    def data(self) -> dict[str, str]:
        """Name and hash the texts that the examples are made from: they belong to a run's configuration."""
        return {}
