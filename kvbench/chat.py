"""Chat templates: a conversation as the text that a model reads, and what surrounds a message of the user."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvbench.contract.errors import KVBenchError

_THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<thought>", "</thought>"),
    ("◁think▷", "◁/think▷"),
    ("<|channel>thought", "<channel|>"),
)
"""How families of models mark the beginning and the end of their thinking."""

_PROBE = "kvbench asks"


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Give the text of a conversation up to the header of the assistant's next turn, by the tokenizer's template."""
    text: str = tokenizer.apply_chat_template(
        list(messages),
        tokenize=False,
        add_generation_prompt=True,
        # Template variables of some families: templates that can switch thinking off shall, and those that print
        # today's date would change the prompt every day.
        enable_thinking=False,
        date_string="26 Jul 2024",
    )
    return text


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def ends_in_thinking(text: str) -> bool:
    """Whether a thinking block is open at the end of the text, so that what follows is thought, not answered."""
    return any(text.rfind(begin) > text.rfind(end) for begin, end in _THINKING if begin in text)


def around_a_message(tokenizer: Any) -> tuple[str, str]:
    """Give what the template puts before a user's message (system prompt and header) and after it, "" without one.

    Raises KVBenchError for a template that changes the message.
    """
    if not has_template(tokenizer):
        return "", ""
    before, found, after = render(tokenizer, [{"role": "user", "content": _PROBE}]).rpartition(_PROBE)
    if not found:
        raise KVBenchError(
            "The tokenizer's chat template changes the text of the user's message, so that it cannot be found in the "
            "prompt: use a tokenizer whose template keeps the message as it is."
        )
    return before, after
