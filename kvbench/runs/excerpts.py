"""What a reader of an example sees of its prompt: its ends, the text around the answers, and the question."""

from __future__ import annotations

from typing import Any

from kvbench.contract.task import Example, TokenExample

ENDS = 240
"""Characters kept of the context's beginning and end."""
AROUND = 160
"""Characters kept on either side of a reference in the context."""
MOST_REFERENCES = 6
MOST_QUESTION = 4000
GAP = " […] "


def excerpt(example: Example | TokenExample, tokenizer: Any) -> str:
    """The prompt of an example, shortened; of given tokens the last hundred before those that are scored."""
    if isinstance(example, TokenExample):
        tail = list(example.input_ids[max(0, example.prompt_tokens - 100) : example.prompt_tokens])
        return GAP.lstrip() + str(tokenizer.decode(tail, skip_special_tokens=True))
    parts = [f"({len(example.solved)} solved examples)"] if example.solved else []
    question = example.question
    if len(question) > MOST_QUESTION:
        question = question[: MOST_QUESTION // 2] + GAP + question[-MOST_QUESTION // 2 :]
    parts += [_shortened(example.context, example.references), question.strip("\n"), example.answer_prefix.strip("\n")]
    return "\n".join(part for part in parts if part)


def _shortened(text: str, references: tuple[str, ...]) -> str:
    """The text's ends and what stands around the first place of each reference."""
    kept = [(0, ENDS), (len(text) - ENDS, len(text))]
    for reference in references[:MOST_REFERENCES]:
        place = text.find(reference) if reference else -1
        if place >= 0:
            kept.append((place - AROUND, place + min(len(reference), AROUND) + AROUND))
    joined: list[tuple[int, int]] = []
    for first, last in sorted((max(0, a), min(len(text), b)) for a, b in kept):
        if joined and first <= joined[-1][1] + len(GAP):
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return GAP.join(text[first:last] for first, last in joined)
