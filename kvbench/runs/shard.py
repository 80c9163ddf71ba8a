"""A sweep's part for one of several processes or machines that share it without talking to each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import plain

Run = TypeVar("Run")


@dataclass(frozen=True)
class Shard:
    """Part `number` of `of`, counted from 1."""

    number: int
    of: int

    def of_runs(self, runs: Sequence[Run]) -> list[Run]:
        """The runs of this part: neighbours in the sweep, which share prompts; parts differ by one run at most.

        Raises KVBenchError where there are fewer runs than parts.
        """
        if self.of > max(len(runs), 1):
            raise KVBenchError(
                f"--shard {self.number}/{self.of}: the sweep has {len(runs)} runs; give as many parts at most."
            )
        begin, end = ((part * len(runs)) // self.of for part in (self.number - 1, self.number))
        return list(runs[begin:end])


def shard_named(text: str | None) -> Shard:
    """The part that `text`, such as `3/16`, names; None: the only one. Raises KVBenchError for anything else."""
    if text is None:
        return Shard(1, 1)
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise KVBenchError(
            f"--shard {plain(text)} is no part of a sweep: give its number and how many there are, such as 3/16."
        )
    return Shard(int(found[1]), int(found[2]))
