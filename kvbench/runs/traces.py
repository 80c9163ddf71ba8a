"""Per-step traces of probes, stored beside a run's examples: one safetensors file for each probed example.

A file holds a column per measured quantity, float32 [steps, layers, heads] (NaN where nothing was measured), and the
axes `position` int32 [steps], the tokens of the context at the step, and `layer` int32 [layers], its place in the
model. safetensors is columnar (each column is read alone, memory-mapped), holds no code, and is a dependency already.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvbench.contract.errors import KVBenchError, unwritable
from kvbench.contract.probe import StepTrace
from kvbench.contract.reading import check_regular, parse_json, reading

SCHEMA = "1"


@dataclass(frozen=True)
class Trace:
    """One example's trace: `columns` [steps, layers, heads], `positions` [steps], `layers` [layers]."""

    example: str
    prompt_tokens: int
    positions: NDArray[np.int32]
    layers: NDArray[np.int32]
    columns: dict[str, NDArray[np.float32]]


def write_trace(target: Path, trace: StepTrace, *, example: str, prompt_tokens: int) -> None:
    """Write a trace whole or not at all."""
    positions = sorted({position for column in trace.values() for position, _ in column})
    layers = sorted({layer for column in trace.values() for _, layer in column})
    heads = max(len(values) for column in trace.values() for values in column.values())
    at, row = {p: i for i, p in enumerate(positions)}, {n: i for i, n in enumerate(layers)}
    tensors: dict[str, NDArray[np.int32] | NDArray[np.float32]] = {
        "position": np.asarray(positions, np.int32),
        "layer": np.asarray(layers, np.int32),
    }
    for quantity, column in trace.items():
        dense = np.full((len(positions), len(layers), heads), np.nan, np.float32)
        for (position, layer), values in column.items():
            dense[at[position], row[layer], : len(values)] = values
        tensors[f"column.{quantity}"] = dense
    try:
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_name(f".{target.name}")  # the run's lock keeps other writers away
        about = {"schema": SCHEMA, "example": example, "prompt_tokens": prompt_tokens}
        save_file(tensors, temporary, {"trace": json.dumps(about)})  # safetensors writes several members in any order
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise KVBenchError(unwritable(target, error if isinstance(error, OSError) else str(error))) from None


def read_trace(file: Path) -> Trace:
    """Read a trace; raises KVBenchError for a file that is missing, cut or of another schema version."""
    with reading(lambda reason: f"{file} is no readable trace ({reason}): run the same command again to record it."):
        check_regular(file)
        with safe_open(str(file), framework="numpy") as content:
            metadata = content.metadata() or {}
            metadata = parse_json(metadata["trace"]) if "trace" in metadata else metadata
            if metadata.get("schema") != SCHEMA:
                raise KVBenchError(
                    f"{file} has schema version {metadata.get('schema')!r}; this kvbench reads version {SCHEMA}."
                )
            columns = {
                name.removeprefix("column."): content.get_tensor(name)
                for name in sorted(content.keys())
                if name.startswith("column.")
            }
            trace = Trace(
                metadata["example"], int(metadata["prompt_tokens"]), content.get_tensor("position"),
                content.get_tensor("layer"), columns,
            )  # fmt: skip
        _check(trace)
        return trace


def _check(trace: Trace) -> None:
    """Raise ValueError where a trace's parts are not of their types or do not fit together."""
    if not isinstance(trace.example, str) or trace.prompt_tokens < 0:
        raise ValueError("example or prompt_tokens is no name and number of tokens")
    for name, axis in (("position", trace.positions), ("layer", trace.layers)):
        if axis.ndim != 1 or axis.dtype != np.int32 or (axis.size and axis.min() < 0):
            raise ValueError(f"{name} is no list of numbers")
    for name, column in trace.columns.items():
        if column.dtype != np.float32 or column.ndim != 3:
            raise ValueError(f"column {name} is no float32 [steps, layers, heads]")
        if column.shape[:2] != (len(trace.positions), len(trace.layers)):
            raise ValueError(f"column {name} has another number of steps or layers than its axes")
