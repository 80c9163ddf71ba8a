"""A made trace with the published statistics of Mooncake's conversation trace, the same at every call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbench.serving.requests import BLOCK, Request

REQUESTS, INPUT, OUTPUT, HITS = 12_031, 12_035, 343, 0.374
"""Of the conversation trace: requests, mean tokens read and generated, share of blocks hit in an infinite store."""
HOUR = 3600.0
SHARE, SCALE = 0.4114, 1.1500551223754885
"""Share of later turns, and factor of first prompts' lengths, with which the draws below have these statistics."""
LONGEST = 125_878
"""Most tokens of a prompt, about 128K less an answer."""


@dataclass(frozen=True)
class _Drawn:
    """Random numbers of every request, drawn once: its settings bend them, so that statistics follow smoothly."""

    first: NDArray[np.float64]
    """Tokens of a prompt that begins a conversation, before scaling."""
    more: NDArray[np.float64]
    """Tokens that a user adds in a later turn."""
    answers: NDArray[np.int64]
    turns: NDArray[np.float64]
    """Whether a request is a later turn: below the share of such requests."""
    which: NDArray[np.float64]
    """Of which conversation."""
    at: NDArray[np.float64]


def conversation() -> list[Request]:
    """Requests over an hour: conversations whose next turn brings the earlier prompt, its answer and a new message.

    Arrivals are a Poisson process, lengths lognormal. Real traces are burstier, and their popular prompts hotter: take
    the real file where that matters.
    """
    drawn = _draw()
    lengths, parents = _turns(drawn, SHARE, SCALE)
    return _requests(drawn, lengths, parents)


def _draw() -> _Drawn:
    rng = np.random.default_rng(0)
    answers = np.maximum(rng.lognormal(5.2, 1.1, REQUESTS), 1)
    answers = np.maximum(np.round(answers * OUTPUT / answers.mean()), 1).astype(np.int64)
    answers[np.argmax(answers)] += OUTPUT * REQUESTS - answers.sum()
    return _Drawn(
        rng.lognormal(8.6, 1.1, REQUESTS), rng.lognormal(6.5, 1.2, REQUESTS), answers, rng.random(REQUESTS),
        rng.random(REQUESTS), np.sort(rng.random(REQUESTS)) * HOUR,
    )  # fmt: skip


def _turns(drawn: _Drawn, share: float, scale: float) -> tuple[list[int], list[int]]:
    lengths: list[int] = []
    parents: list[int] = []
    latest: list[int] = []  # the newest request of each conversation
    recent = 400
    first, more = (scale * drawn.first).tolist(), drawn.more.tolist()
    answers, turns, which = drawn.answers.tolist(), drawn.turns.tolist(), drawn.which.tolist()
    for i in range(len(first)):
        length, parent = int(first[i]), -1
        if latest and turns[i] < share:
            place = len(latest) - 1 - int(which[i] ** 2 * min(len(latest), recent))
            parent = latest[place]
            length = lengths[parent] + answers[parent] + int(more[i])
            if length > LONGEST:
                length, parent = int(first[i]), -1
            else:
                latest[place] = i
        if parent < 0:
            latest.append(i)
        lengths.append(min(max(length, 1), LONGEST))
        parents.append(parent)
    return lengths, parents


def _hit_ratio(lengths: list[int], parents: list[int]) -> float:
    hits = sum(lengths[parent] // BLOCK for parent in parents if parent >= 0)
    return hits / sum(-(-length // BLOCK) for length in lengths)


def _requests(drawn: _Drawn, lengths: list[int], parents: list[int]) -> list[Request]:
    found: list[Request] = []
    fresh = 0
    for i, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
        shared = found[parent].blocks[: lengths[parent] // BLOCK] if parent >= 0 else ()
        own = -(-length // BLOCK) - len(shared)
        found.append(
            Request(float(round(drawn.at[i], 3)), length, int(drawn.answers[i]), (*shared, *range(fresh, fresh + own)))
        )
        fresh += own
    return found
