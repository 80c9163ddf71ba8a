"""Prompts as token ids: through the chat template, and filled to a length."""

from collections.abc import Callable
from typing import Any

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
    text, border, bos = _render(tokenizer, example)
    if not getattr(tokenizer, "is_fast", False):
        raise KVBenchError(
            f"The tokenizer {type(tokenizer).__name__} gives no character offsets, which kvbench needs to tell context "
            "from question: use a model with a fast tokenizer (tokenizer.json)."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    context_tokens = 0
    for _, end in encoded["offset_mapping"]:
        if end > border:
            break
        context_tokens += 1
    return Prompt([*bos, *encoded["input_ids"]], len(bos) + context_tokens)


def prompt_length(tokenizer: Any, example: Example) -> int:
    """Count the tokens of an example's whole prompt, without those of the answer."""
    text, _, bos = _render(tokenizer, example)
    return len(bos) + len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _render(tokenizer: Any, example: Example) -> tuple[str, int, list[int]]:
    """Give the prompt's text, the position where the question begins, and the ids to put before it."""
    content = example.context + example.question
    if not content.strip():
        raise KVBenchError(f"Example {example.id} has neither context nor question: give it some text.")
    if not (example.chat and getattr(tokenizer, "chat_template", None)):
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("", verbose=False)["input_ids"][:1] == [bos]
        text = f"{content} {example.answer_prefix}" if example.answer_prefix else content
        return text, len(example.context), [bos] if adds_bos else []
    header = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
        # Template variables of some families: a thinking block cannot follow the answer prefix, and the templates that
        # print today's date would change the prompt every day.
        enable_thinking=False,
        date_string="26 Jul 2024",
    )
    # Templates may strip the message, but nothing else.
    start = header.rfind(content.strip())
    if start < 0:
        raise KVBenchError(
            "The tokenizer's chat template changes the text of the user's message, so context and question cannot be "
            "told apart: use a tokenizer whose template keeps the message as it is."
        )
    border = start + len(example.context) - (len(content) - len(content.lstrip()))
    return header + example.answer_prefix, border, []


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
