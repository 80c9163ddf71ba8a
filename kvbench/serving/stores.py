"""What a store of a given size still has of earlier prompts when those that were used least recently leave."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from kvbench.serving.requests import BLOCK, Request


class Store(Protocol):
    """A store as the replay asks it; `held` are the bytes in it now."""

    held: int

    def take(self, request: Request) -> int:
        """Tokens that the request's prompt has in the store; then it is kept, too."""


class NoStore:
    """Keeps nothing."""

    held = 0

    def take(self, request: Request) -> int:
        """No tokens."""
        return 0


class BlockStore:
    """Keys and values by blocks of 512 tokens, which prompts share up to where they differ.

    A prompt hits the blocks it begins with. The blocks of one prompt leave from its end, so that what is left of it can
    still be hit. `limit` in bytes, None for a store that never forgets.
    """

    def __init__(self, limit: int | None, block_bytes: int) -> None:
        self._room = None if limit is None else limit // block_bytes
        self._bytes = block_bytes
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self.held = 0

    def take(self, request: Request) -> int:
        """Tokens of the leading blocks that are there; then all the prompt's blocks are the latest used."""
        hits = next((i for i, block in enumerate(request.blocks) if block not in self._blocks), len(request.blocks))
        for block in reversed(request.blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while self._room is not None and len(self._blocks) > self._room:
            self._blocks.popitem(last=False)
        self.held = len(self._blocks) * self._bytes
        return min(hits * BLOCK, request.input_tokens)


class ContextStore:
    """Whole contexts with a policy's state and index, as `kvbench.PrefixStore` keeps them.

    A prompt hits the longest context that it begins with: an index over a longer one, or one that went on otherwise,
    cannot be cut. A context ends with a prompt's last full block and takes `size(tokens)` bytes.
    """

    def __init__(self, limit: int | None, size: Callable[[int], float]) -> None:
        self._limit, self._size = limit, size
        self._contexts: OrderedDict[int, int] = OrderedDict()
        self.held = 0

    def take(self, request: Request) -> int:
        """Tokens of the longest context that is there; it and then the prompt's own are the latest used."""
        names = list(_chain(request.blocks[: request.whole_blocks]))
        hit = next((i for i in range(len(names), 0, -1) if names[i - 1] in self._contexts), 0)
        if hit:
            self._contexts.move_to_end(names[hit - 1])
        if names and hit < len(names):
            size = round(self._size(len(names) * BLOCK))
            if self._limit is None or size <= self._limit:
                self._contexts[names[-1]] = size
                self.held += size
            while self._limit is not None and self.held > self._limit:
                self.held -= self._contexts.popitem(last=False)[1]
        return hit * BLOCK


def _chain(blocks: Iterable[int]) -> Iterator[int]:
    """A name for each beginning of a prompt, whatever the trace's ids say of what came before a block."""
    name = 0
    for block in blocks:
        name = hash((name, block))
        yield name
