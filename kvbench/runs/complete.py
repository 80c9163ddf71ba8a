"""The complete runs in folders, and a sentence for each run that is left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.contract.errors import KVBenchError
from kvbench.runs.packed import read_scores
from kvbench.runs.results import find_runs, read


@dataclass(frozen=True)
class CompleteRun:
    """A run that is complete: its folder, what `run.json` holds, and its examples."""

    folder: Path
    document: dict[str, Any]
    rows: list[dict[str, Any]]


def complete_runs(
    roots: Sequence[Path],
    left_out: list[str],
    *,
    read_rows: Callable[[Path], list[dict[str, Any]]] = read_scores,
    skip_unfinished: bool = True,
) -> Iterator[CompleteRun]:
    """The runs at or below `roots` that are complete, sorted by folder, each once.

    `left_out` gets a sentence for each that cannot be read, and with `skip_unfinished` for each that is not complete;
    without it such a run raises KVBenchError, as does a folder that holds none. `read_rows` reads the examples.
    """
    for folder in sorted({os.path.realpath(path): path for root in roots for path in find_runs(root)}.values()):
        try:
            document, rows = read(folder), read_rows(folder)
        except KVBenchError as error:
            left_out.append(f"Left out: {error}")
            continue
        if document["status"] == "complete":
            yield CompleteRun(folder, document, rows)
            continue
        text = (
            f"{folder} is not finished (status {document['status']}, {len(rows)} of {document['config']['examples']} "
            "examples)"
        )
        if not skip_unfinished:
            raise KVBenchError(
                f"{text}: run the same command again to complete it, or leave it out (--skip-unfinished)."
            )
        left_out.append(f"{text} and was left out. The same command continues it.")
