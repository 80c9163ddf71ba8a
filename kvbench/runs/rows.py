"""The examples of a run as lines of two files: what a row holds, how it is checked, written and read."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import parse_json, plain, read_bytes, reading, reason
from kvbench.runs.stored import StoredExample


class Line(NamedTuple):
    """A complete line of a file."""

    row: dict[str, Any]
    size: int
    """In bytes."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the finished examples of a run's folder, timings included; what a killed writer left unfinished is skipped.

    Raises KVBenchError for a file that is corrupt before its end.
    """
    timings, examples = finished_lines(path)
    times = [line.row for line in timings] or [{} for _ in examples]
    # An example that ran again, since its first row was no result, has a later line.
    return list({line.row["id"]: {**line.row, **time} for line, time in zip(examples, times, strict=True)}.values())


def fault(row: dict[str, Any]) -> str | None:
    """Say which of an example's values is no result, and why; None for a row that `summarise` can take."""
    for key, shape in _SHAPES.items():
        if key not in row and key in _OPTIONAL:
            continue
        wrong = _misshapen(row.get(key), shape)
        if wrong is not None:
            return f"{key}{wrong}"
    if set(row["bytes"]) < {"resident", "offloaded", "index"}:
        return "bytes lacks a tier"
    try:
        StoredExample.model_validate(row)
    except ValidationError as error:
        return reason(error)
    return None


_SHAPES: dict[str, str] = {
    "score": "number", "scores": "numbers", "step_s": "list", "probed_step_s": "list", "prefill_s": "number",
    "index_s": "number", "bytes": "numbers", "peak_memory_bytes": "number?", "prompt_tokens": "number",
    "generated_tokens": "number", "budget_tokens": "number?", "token_bytes": "number", "reused_tokens": "number",
    "probes": "numbers?", "info": "object", "trace": "text", "mode": "text", "mode_reason": "text", "prompt": "text",
    "device_step_s": "list", "capture_s": "number", "floor_s": "number", "read_bytes": "numbers",
    "step_parts_s": "numbers", "answer_bytes": "numbers", "held_tokens": "list",
    "hot_hit_rate": "number", "batch": "number", "prefill_chunk": "number", "out_of_memory": "number",
    "device_bytes": "numbers", "device_peak_bytes": "numbers",
}  # fmt: skip
"""What the values of an example's row are; a question mark allows None, for an object inside it."""
_OPTIONAL = {
    "scores", "probed_step_s", "budget_tokens", "token_bytes", "reused_tokens", "probes", "info", "trace", "mode",
    "mode_reason", "device_step_s", "capture_s", "floor_s", "read_bytes", "step_parts_s", "answer_bytes", "held_tokens",
    "hot_hit_rate", "batch", "prefill_chunk", "out_of_memory", "device_bytes", "device_peak_bytes", "prompt",
}  # fmt: skip


def _misshapen(value: Any, shape: str) -> str | None:
    kind, maybe = shape.removesuffix("?"), shape.endswith("?")
    if kind == "numbers":
        if value is None and maybe:
            return None
        if not isinstance(value, dict):
            return f" is {shown(value)}, not an object"
        wrong = [key for key, one in value.items() if not (is_number(one) or (maybe and one is None))]
        return f".{wrong[0]} is {shown(value[wrong[0]])}, not a finite number" if wrong else None
    if kind == "list":
        fine = isinstance(value, list) and all(map(is_number, value))
        return None if fine else f" is {shown(value)}, not a list of finite numbers"
    if kind in ("object", "text"):
        return None if isinstance(value, dict if kind == "object" else str) else f" is {shown(value)}"
    return None if is_number(value) or (maybe and value is None) else f" is {shown(value)}, not a finite number"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that JSON can hold."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float holds
        return False


def shown(value: Any) -> str:
    """A value, shortened, and its type."""
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def split(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part an example's row into what its configuration determines, and what was timed.

    Timed are the peak memory, the tokens whose prefill was another example's, how the steps ran, in which batch and
    chunks, and all names that end in `_s`, those of probes too.
    """
    timed = {key: row[key] for key in row if _is_timed(key)}
    lasting = {key: row[key] for key in row if key not in timed}
    probes = row.get("probes") or {}
    if any(map(_is_timed, probes)):
        timed["probes"] = probes
        lasting["probes"] = {key: probes[key] for key in probes if not _is_timed(key)}
    return lasting, timed


def _is_timed(name: str) -> bool:
    also = (
        "peak_memory_bytes", "reused_tokens", "mode", "mode_reason", "read_bytes", "hot_hit_rate", "batch",
        "prefill_chunk", "out_of_memory", "device_bytes", "device_peak_bytes",
    )  # fmt: skip
    return name.endswith("_s") or name in also


def finished_lines(path: Path) -> tuple[list[Line], list[Line]]:
    """The complete lines of `timings.jsonl` and `examples.jsonl`, as many of the one as of the other."""
    examples = _lines(path / "examples.jsonl", {"id", "score"})  # first, since a writer adds to it last
    file = path / "timings.jsonl"
    if not file.exists() and (not examples or any(map(_is_timed, examples[0].row))):
        _refuse_repeated(path / "examples.jsonl", examples, [])
        return [], examples  # nothing yet, or version 1
    timings = _lines(file, {"id"})
    _refuse_repeated(path / "examples.jsonl", examples, timings)
    for number, example in enumerate(examples, start=1):
        if number > len(timings) or timings[number - 1].row["id"] != example.row["id"]:
            raise KVBenchError(
                f"{file} has no line {number} for example {plain(example.row['id'])}: move the folder away to run "
                "again from the start."
            )
    return timings[: len(examples)], examples


def _refuse_repeated(file: Path, examples: list[Line], timings: list[Line]) -> None:
    """Raise for an example that is there twice, unless its earlier row was no result."""
    seen: dict[Any, int] = {}
    for place, example in enumerate(examples):
        name = example.row["id"]
        if name in seen:
            before = examples[seen[name]].row
            timed = timings[seen[name]].row if seen[name] < len(timings) else {}
            if fault({**before, **timed}) is None:
                raise KVBenchError(
                    f"{file} line {place + 1} repeats example {plain(name)}: move the folder away to run again."
                )
        seen[name] = place


def _lines(file: Path, required: set[str]) -> list[Line]:
    with reading(lambda reason: f"{file} cannot be read ({reason}): move the folder away to run again."):
        parts = read_bytes(file).split(b"\n") if file.exists() or file.is_symlink() else [b""]
    found = []
    for number, part in enumerate(parts[:-1], start=1):  # the last is empty, or was never finished
        try:
            row = parse_json(part)
            if not isinstance(row, dict) or not required <= row.keys() or not isinstance(row["id"], str):
                raise ValueError("not an example")
        except ValueError as error:
            if number == len(parts) - 1 and not parts[-1]:
                break  # a power cut can leave the last line without its content
            raise KVBenchError(
                f"{file} line {number} is corrupt ({reason(error)}): move the folder away to run again from the start."
            ) from None
        found.append(Line(row, len(part) + 1))
    return found


def line(row: dict[str, Any]) -> bytes:
    """A row as a line; raises KVBenchError that names what JSON cannot hold."""
    for key, value in row.items():
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise KVBenchError(
                f"Example {row['id']} cannot be written: its {key} is nothing that JSON can hold ({error})."
            ) from None
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def append(file: Path, line: bytes) -> None:
    """Append a line and force it to the disk; a line that did not fit is taken back."""
    rest = memoryview(line)
    with file.open("ab", buffering=0) as target:
        size = target.tell()
        try:
            while rest:
                rest = rest[target.write(rest) :]
            os.fsync(target.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(file, size)
            raise
