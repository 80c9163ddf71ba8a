"""Prompts as token ids: through the chat template, and filled to a length."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvbench import chat
from kvbench.contract.errors import KVBenchError
from kvbench.contract.task import Example, Prompt

FULLEST, FULL_ENOUGH = 0.99, 0.90
"""Shares of the context length: `fill` stops at the first, and refuses less than the second."""


def encode(tokenizer: Any, example: Example) -> Prompt:
    """Encode an example as the model reads it.

    The tokenizer's chat template is applied once, around context and question, and brings its own special tokens.
    Without a template the text is plain, after one BOS token where the tokenizer uses BOS. A token that spans the
    border between context and question counts as question.
    Raises KVBenchError for a tokenizer without character offsets or a chat template that changes the text.
    """
    rendered = _render(tokenizer, example)
    if not getattr(tokenizer, "is_fast", False):
        raise KVBenchError(
            f"The tokenizer {type(tokenizer).__name__} gives no character offsets, which kvbench needs to tell context "
            "from question: use a model with a fast tokenizer (tokenizer.json)."
        )
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    context_tokens = 0
    for _, end in encoded["offset_mapping"]:
        if end > rendered.border:
            break
        context_tokens += 1
    ids = [*rendered.bos, *encoded["input_ids"]]
    return Prompt(ids, len(rendered.bos) + context_tokens, rendered.prefix_left_out)


def prompt_length(tokenizer: Any, example: Example) -> int:
    """Count the tokens of an example's whole prompt, without those of the answer."""
    rendered = _render(tokenizer, example)
    return len(rendered.bos) + len(tokenizer(rendered.text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class _Rendered:
    text: str
    border: int
    """Where the question begins in the text."""
    bos: tuple[int, ...] = ()
    """Ids to put before the text's."""
    prefix_left_out: bool = False


def _render(tokenizer: Any, example: Example) -> _Rendered:
    content, prefix = example.context + example.question, example.answer_prefix
    if not content.strip():
        raise KVBenchError(f"Example {example.id} has neither context nor question: give it some text.")
    if not (example.chat and chat.has_template(tokenizer)):
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("", verbose=False)["input_ids"][:1] == [bos]
        before = "".join(f"{_joined(question, answer)}\n" for question, answer in example.solved)
        return _Rendered(
            before + _joined(content, prefix), len(before) + len(example.context), (bos,) if adds_bos else ()
        )
    turns = [
        {"role": role, "content": text}
        for pair in example.solved
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    header = chat.render(tokenizer, [*turns, {"role": "user", "content": content}])
    # Templates may strip the message, but nothing else.
    start = header.rfind(content.strip())
    if start < 0:
        raise KVBenchError(
            "The tokenizer's chat template changes the text of the user's message, so context and question cannot be "
            "told apart: use a tokenizer whose template keeps the message as it is."
        )
    border = start + len(example.context) - (len(content) - len(content.lstrip()))
    thinks = chat.ends_in_thinking(header[start + len(content.strip()) :])
    left_out = bool(prefix) and thinks and not example.thinking_prefix
    return _Rendered(header + ("" if left_out else prefix), border, prefix_left_out=left_out)


def _joined(text: str, answer: str) -> str:
    """A question and the beginning of its answer as plain text, with white space between them."""
    return f"{text} {answer}" if answer and not answer[0].isspace() else text + answer


def fill(
    tokenizer: Any,
    build: Callable[[int], Example],
    *,
    context_length: int,
    smallest: int = 1,
    largest: int | None = None,
) -> Example:
    """Build the example whose prompt and answer fill 90 to 100 % of `context_length` tokens.

    `build(n)` makes the example with n units of haystack (lines, words, pairs), `smallest` <= n <= `largest`; its
    length must grow with n, nearly in proportion.
    Raises KVBenchError where even the smallest is too long, or the largest too short.
    """

    def size_of(example: Example) -> int:
        return prompt_length(tokenizer, example) + example.max_new_tokens

    low, high = smallest, None if largest is None else largest + 1
    best = build(low)
    size = size_of(best)
    if size > context_length:
        raise KVBenchError(
            f"A context of {context_length} tokens is too small for {best.id.split('/')[0]}: its shortest prompt and "
            f"its answer ({best.max_new_tokens} tokens) take {size}; ask for a context length of at least {size}."
        )
    n, tries = low + 16, 0
    while size < FULLEST * context_length and (high is None or high - low > 1):
        n = max(n, low + 1) if high is None else min(max(n, low + 1), high - 1)
        example = build(n)
        new_size = size_of(example)
        tokens_per_unit = max((new_size - size) / (n - low), 0.01)
        if new_size <= context_length:
            low, best, size = n, example, new_size
        else:
            high = n
        tries += 1
        if tries < 8 or high is None:
            n = low + int(((1 + FULLEST) / 2 * context_length - size) / tokens_per_unit)
            n = min(n, 64 * (low + 16))  # should the first units be much shorter than the others
        else:
            n = (low + high) // 2
    if size < FULL_ENOUGH * context_length:
        raise KVBenchError(
            f"{best.id.split('/')[0]} cannot fill {context_length} tokens: its longest prompt that fits takes {size} "
            "with its answer, and at least 90 % are required; ask for another context length."
        )
    return best
