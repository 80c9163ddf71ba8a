"""What the traces of runs hold for an analysis: by decoding step, and by layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench import figures
from kvbench.contract.analysis import Analysis, Row, Tables
from kvbench.contract.errors import KVBenchError
from kvbench.report.commands import run_command
from kvbench.runs.results import read
from kvbench.runs.traces import Trace, read_trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tables_of_runs(folders: Sequence[Path], analysis: type[Analysis]) -> tuple[Tables, list[str]]:
    """The traces of runs: `rows` by run and step (means of examples, layers and heads), `heads` by run, layer and head.

    The second result says what is partial. Raises KVBenchError for a run without the traces, with the command that
    records them, and for one without a finished example.
    """
    if not analysis.panels:
        raise KVBenchError(f"Analysis '{analysis.name}' needs vectors, which no run stores: leave --run out.")
    documents = [read(folder) for folder in folders]
    labels = _labels([document["config"] for document in documents])
    tables: Tables = {"rows": [], "heads": []}
    notes = []
    for folder, document, label in zip(folders, documents, labels, strict=True):
        config = document["config"]
        traces = [read_trace(file) for file in sorted((folder / "traces").glob("*.safetensors"))]
        columns = [name for panel in analysis.panels for name in panel.columns]
        found = [name for name in columns if any(name in trace.columns for trace in traces)]
        needed = analysis.panels[0].columns[0]
        if needed not in found:
            what = "no finished example" if not _examples(folder) else f"no trace of {needed}"
            config = {**config, "probe_examples": max(1, config["probe_examples"])}
            raise KVBenchError(
                f"{folder} has {what}: this command records it, under a budget that leaves the policy a choice: "
                f"{run_command(config, folder.parent, probes=(analysis.probe,))}"
            )
        if document["status"] != "complete":
            notes.append(f"{label}: {_examples(folder)} of {config['examples']} examples, {document['status']}")
        about = {"run": label, "policy": config["policy"]}
        tables["rows"] += [{**about, **row} for row in _by_step(traces, found)]
        tables["heads"] += [{**about, **row} for row in _by_head(traces, found)]
    return tables, notes


def _examples(folder: Path) -> int:
    try:
        return (folder / "examples.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _labels(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Names that tell the runs apart: the policy, and what else differs between runs of one policy."""
    flat = [_flat(config) for config in configs]
    labels = []
    for config, mine in zip(configs, flat, strict=True):
        rivals = [other for other in flat if other["policy"] == mine["policy"]]
        differing = [key for key in mine if any(other.get(key) != mine[key] for other in rivals)]
        labels.append(" ".join([config["policy"], *(f"{key.rpartition('.')[2]}={mine[key]}" for key in differing)]))
    if len(set(labels)) < len(labels):
        raise KVBenchError("The same run was given twice: name each folder once.")
    return labels


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            pairs |= _flat(value, f"{prefix}{key}.")
        else:
            pairs[prefix + key] = value
    return pairs


def _by_step(traces: Sequence[Trace], columns: Sequence[str]) -> list[Row]:
    values: dict[int, dict[str, list[Any]]] = {}
    for trace in traces:
        for name in columns:
            for position, part in zip(trace.positions, trace.columns.get(name, ()), strict=False):
                step = values.setdefault(int(position) - trace.prompt_tokens, {})
                step.setdefault(name, []).append(part[np.isfinite(part)])
    return [
        {"step": step, **{name: _mean(parts.get(name)) for name in columns}} for step, parts in sorted(values.items())
    ]


def _by_head(traces: Sequence[Trace], columns: Sequence[str]) -> list[Row]:
    values: dict[tuple[int, int], dict[str, list[Any]]] = {}
    for trace in traces:
        for name in columns:
            column = trace.columns.get(name)
            if column is None:
                continue
            for i, layer in enumerate(trace.layers):
                for head in range(column.shape[2]):
                    part = column[:, i, head]
                    values.setdefault((int(layer), head), {}).setdefault(name, []).append(part[np.isfinite(part)])
    return [
        {"layer": layer, "head": head, **{name: _mean(parts.get(name)) for name in columns}}
        for (layer, head), parts in sorted(values.items())
    ]


def _mean(parts: list[Any] | None) -> float | None:
    flat = np.concatenate(parts).astype(np.float64) if parts else np.empty(0)
    return float(flat.mean()) if flat.size else None


def summarise(tables: Tables) -> list[Row]:
    """Each run's means over all steps, and the first and the last tenth of them."""
    result = []
    for label, rows in _runs(tables["rows"]).items():
        columns = [name for name in rows[0] if name not in ("run", "policy", "step")]
        last = max(row["step"] for row in rows)
        first_rows = [row for row in rows if row["step"] <= max(rows[0]["step"], last / 10)]
        last_rows = [row for row in rows if row["step"] > 0.9 * last]
        for name in columns:
            heads = [row for row in tables["heads"] if row["run"] == label and row.get(name) is not None]
            lowest = min(heads, key=lambda row: row[name]) if heads else None
            result.append({
                "run": label, "measured": name, "steps": last, "mean": _over(rows, name),
                "first_tenth": _over(first_rows, name), "last_tenth": _over(last_rows, name),
                "lowest_head": None if lowest is None else lowest[name],
                "where": "" if lowest is None else f"layer {lowest['layer']}, head {lowest['head']}",
            })  # fmt: skip
    return result


def _runs(rows: Sequence[Row]) -> dict[str, list[Row]]:
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    return runs


def _over(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return float(np.mean(values)) if values else None


def draw(figure: Figure, tables: Tables, analysis: type[Analysis]) -> None:
    """Draw the panels of an analysis by decoding step: a colour for each run, dashes for each column."""
    there = {name for row in tables["rows"] for name, value in row.items() if value is not None}
    panels = [panel for panel in analysis.panels if there & set(panel.columns)]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for place, (label, rows) in enumerate(_runs(tables["rows"]).items()):
            for kind, name in enumerate(panel.columns):
                points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
                if not points:
                    continue
                look = figures.style(place)
                series = figures.style(place if len(panel.columns) == 1 else kind)
                axis.plot(
                    *zip(*points, strict=True), color=look.color, marker=look.marker, linestyle=series.dashes,
                    markersize=3, markevery=max(1, len(points) // 10), linewidth=1.2,
                    label=label if len(panel.columns) == 1 else f"{label}: {name.replace('_', ' ')}",
                )  # fmt: skip
        axis.set_xlabel("decoding step (tokens after the prompt)")
        axis.set_ylabel(panel.label + "\n(mean of layers and heads)")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
