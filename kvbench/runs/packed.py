"""Compact results for a repository: a run's configuration, metrics and scores, without prompts, answers and vectors."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvbench.contract.errors import KVBenchError, unwritable
from kvbench.contract.reading import parse_json, read_bytes, reading
from kvbench.runs.config import SCHEMA
from kvbench.runs.results import find_runs, finished_rows, read

SCORES = "scores.jsonl"
DIGITS = 5
"""Significant digits of what is timed."""
PARTS = 8
"""Parts of a long answer of which the times, and the tokens held, are kept."""
LONG = 64
"""Steps of an answer from which on they are."""


def pack(sources: Sequence[Path], output: Path) -> list[Path]:
    """Write finished runs at or below `sources` compactly below `output`; gives their folders.

    `run.json` stays, so that `leaderboard` and `compare` read it; each example is one short line of `scores.jsonl`.
    Raises KVBenchError for a run that is not finished or cannot be read, before anything is written.
    """
    contents: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for source in sources:
        for folder in find_runs(source):
            found = read(folder)
            if found["status"] != "complete":
                raise KVBenchError(f"{folder} is not finished (status {found['status']}): run its command again first.")
            contents[folder.name] = found, read_scores(folder)
    made = []
    for name, (found, rows) in contents.items():
        folder = output / name
        kept = ("model", "policy", "passed", "remembered")
        proofs = [{key: one[key] for key in kept if key in one} for one in found["conformance"]]
        document = {"schema": SCHEMA, **found, "conformance": proofs, "packed": True}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run.json").write_text(json.dumps(document, allow_nan=False) + "\n", "utf-8")
            lines = "".join(json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n" for row in rows)
            (folder / SCORES).write_text(lines, "utf-8")
        except OSError as error:
            raise KVBenchError(unwritable(folder, error)) from None
        made.append(folder)
    return made


def is_packed(folder: Path) -> bool:
    """Whether a run's folder holds scores alone."""
    return (folder / SCORES).exists() and not (folder / "examples.jsonl").exists()


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """Each example's `id` and `score`, and where known its `ttft_s`, its median `step_s` and its `bytes` in all.

    Of a long answer also `step_s_parts` and `held_parts`, the medians of its eighths.

    Of a whole run's folder or of a packed one. Raises KVBenchError for a file that cannot be read.
    """
    if not is_packed(folder):
        return [_short(row) for row in finished_rows(folder)]
    file = folder / SCORES
    with reading(lambda reason: f"{file} is no file of packed scores ({reason}): pack the run again."):
        rows = [parse_json(line) for line in read_bytes(file).decode("utf-8").splitlines()]
        for row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("id"), str):
                raise ValueError("a line names no example")
            if isinstance(row.get("score"), bool) or not isinstance(row.get("score"), int | float):
                raise ValueError(f"example {row['id']} has no score")
        return rows


def _short(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"id": row["id"], "score": row["score"]}
    if row.get("scores"):
        found["scores"] = {name: _rounded(value) for name, value in row["scores"].items()}
    if isinstance(depth := row.get("info", {}).get("depth"), int | float):
        found["depth"] = depth
    if not row.get("reused_tokens"):
        found["ttft_s"] = _rounded(row["prefill_s"] + row["index_s"])
    steps = row.get("device_step_s") or row["step_s"]
    if steps:
        found["step_s"] = _rounded(statistics.median(steps))
    if len(steps) >= LONG:
        found["step_s_parts"] = _parts(steps)
    if len(held := row.get("held_tokens") or []) >= LONG:
        found["held_parts"] = _parts(held)
    found["bytes"] = round(sum(row["bytes"].get(tier, 0) for tier in ("resident", "offloaded", "index")))
    return found


def _parts(values: Sequence[float]) -> list[float]:
    """The medians of eighths of an answer."""
    edges = [len(values) * part // PARTS for part in range(PARTS + 1)]
    return [_rounded(statistics.median(values[a:b])) for a, b in pairwise(edges)]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
