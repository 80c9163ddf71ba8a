"""How many examples run at once, and how much of a prompt, by the memory that is free; less where it was too much."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch

from kvbench.contract.task import Example, TokenExample
from kvbench.engine.survey import token_bytes
from kvbench.models import LoadedModel
from kvbench.runs.config import RunConfig
from kvbench.runs.memory import gpus_of
from kvbench.tasks.prompts import prompt_length

AnyExample = Example | TokenExample

ROOM = 0.8
"""The share of the free memory that examples are sized to; the rest is for what a policy needs beside."""
HOLDINGS = 3
"""A row's keys and values are held up to so many times: the shared prompt's, the policy's, and one being moved."""
CHUNK_ROOM = 0.25
"""The share of the free memory that one chunk of a prompt may take while it passes through a layer."""
SMALLEST_CHUNK = 256
MOST_ROWS = 64


def free_memory(loaded: LoadedModel) -> int:
    """Bytes that are free now where the model computes: on the fullest of its GPUs, or of the machine's memory."""
    if gpus := gpus_of(loaded):
        return min(_free_of(gpu) for gpu in gpus)
    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    text = limit.read_text().strip() if limit.exists() else "max"
    return free if text == "max" else min(free, int(text) - int(used.read_text()))


def _free_of(gpu: torch.device) -> int:
    held = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)  # PyTorch's own, and unused
    return int(torch.cuda.mem_get_info(gpu)[0]) + held


def chunk_bytes(model: Any, tokens: int, context: int) -> int:
    """Bytes that so many tokens of a prompt take while they pass through one layer, beside the cache."""
    text = model.config.get_text_config(decoder=True)
    hidden = int(getattr(text, "hidden_size", 0) or 1)
    inner = int(getattr(text, "intermediate_size", 0) or 4 * hidden)
    # Hidden states, queries, keys, values and their copies; gate, up and product; a row of the mask for each token.
    return tokens * int(next(model.parameters()).element_size()) * (10 * hidden + 3 * inner + context)


class Sizing:
    """The batches and chunks of runs that go over the same examples; learns from memory that ran out."""

    def __init__(self, config: RunConfig, loaded: LoadedModel) -> None:
        self._config, self._loaded = config, loaded
        self.most = MOST_ROWS if config.batch_size == "auto" else config.batch_size
        """Examples at once, at most."""
        self._longest_chunk: int | None = None
        self.shortages = 0
        """How often memory ran out, and less was tried."""

    def batches(self, examples: Iterator[AnyExample]) -> Iterator[list[AnyExample]]:
        """The examples to generate together: probed ones alone, the others by length."""
        config = self._config
        for example in islice(examples, config.probe_examples if config.in_batches else config.examples):
            yield [example]
        rest = sorted(examples, key=lambda example: length_of(self._loaded, example))
        first = 0
        while first < len(rest):
            size = self.rows(length_of(self._loaded, rest[-1]))
            yield rest[first : first + size]
            first += size

    def chunk(self, rows: int, longest: int) -> int | None:
        """Tokens of prompts of up to `longest` tokens to compute at a time; None for all of them."""
        if self._config.prefill_chunk != "auto":
            return self._config.prefill_chunk
        room = CHUNK_ROOM * free_memory(self._loaded)
        size = longest
        if rows * chunk_bytes(self._loaded.model, longest, longest) > room:
            size = SMALLEST_CHUNK
            while size < longest and rows * chunk_bytes(self._loaded.model, 2 * size, longest) <= room:
                size *= 2
        if self._longest_chunk is not None:
            size = min(size, self._longest_chunk)
        return None if size >= longest else size

    def less(self, batch: list[AnyExample], chunk: int | None) -> list[list[AnyExample]] | None:
        """What to try after memory ran out: the batch in two halves, or again in smaller chunks; None for nothing."""
        if len(batch) > 1:
            half = (len(batch) + 1) // 2
            self.most, found = half, [batch[:half], batch[half:]]
        else:
            size = chunk or length_of(self._loaded, batch[0])
            if self._config.prefill_chunk != "auto" or size <= SMALLEST_CHUNK:
                return None
            self._longest_chunk, found = max(size // 2, SMALLEST_CHUNK), [batch]
        self.shortages += 1
        return found

    def parts(self, batch: list[AnyExample]) -> list[list[AnyExample]]:
        """A batch in parts of no more examples than run at once."""
        return [batch[first : first + self.most] for first in range(0, len(batch), self.most)]

    def rows(self, longest: int) -> int:
        """How many prompts of `longest` tokens to generate after at once."""
        if self._config.batch_size != "auto":
            size = self._config.batch_size
        else:
            row = HOLDINGS * longest * token_bytes(self._loaded.model)
            row += chunk_bytes(self._loaded.model, min(longest, SMALLEST_CHUNK), longest)
            size = max(1, min(int(ROOM * free_memory(self._loaded) // max(row, 1)), MOST_ROWS))
        return min(size, self.most)


def length_of(loaded: LoadedModel, example: AnyExample) -> int:
    """Tokens of an example's prompt."""
    return example.prompt_tokens if isinstance(example, TokenExample) else prompt_length(loaded.tokenizer, example)
