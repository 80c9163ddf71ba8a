"""The analyses of `kvbench analyze`: on a capture or a finished run, a table, its CSV and its figure."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvbench import figures
from kvbench.analysis import measures
from kvbench.analysis.probes import SINKS
from kvbench.capture import Capture
from kvbench.errors import KVBenchError
from kvbench.results import read
from kvbench.traces import read_trace

SCHEMA = 1
Row = dict[str, Any]


def _ids(wanted: Sequence[int] | None, there: Sequence[int], what: str) -> list[int]:
    for number in wanted or ():
        if number not in there:
            raise KVBenchError(f"There is no {what} {number}: choose from {', '.join(map(str, there))}.")
    return list(wanted or there)


def _arrays(capture: Capture, layer: int) -> dict[str, measures.Float]:
    found = capture.layer(layer)
    return {
        f"{part}_{name}": getattr(getattr(found, part), name).double().numpy()
        for part in ("prompt", "decode") for name in ("queries", "keys")
    }  # fmt: skip


def _heads(capture: Capture, heads: Sequence[int] | None) -> list[int]:
    return _ids(heads, range(capture.manifest.heads), "head")


def _steps(capture: Capture, steps: int) -> measures.Int:
    """Up to `steps` decoding steps, evenly spread."""
    count = capture.manifest.config.decode_tokens
    return np.unique(np.linspace(0, count - 1, min(steps, count)).round().astype(np.int64))


def _weights(capture: Capture, arrays: dict[str, measures.Float], head: int, steps: measures.Int) -> measures.Float:
    """Weights [steps, n] of decoding queries over the prompt and what was decoded by then, themselves included."""
    group = head // (capture.manifest.heads // capture.manifest.kv_heads)
    keys = np.concatenate([arrays["prompt_keys"][group], arrays["decode_keys"][group]])
    visible = capture.manifest.prompt_tokens + steps + 1
    return measures.attention_weights(arrays["decode_queries"][head][steps], keys, visible=visible)


def ood(capture: Capture, *, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None,
        seed: int = 0, shrinkage: float = 0.0) -> list[Row]:  # fmt: skip
    """Median Mahalanobis distances per layer and head; a head without a covariance has its reason in `missing`."""
    rows = []
    for layer in _ids(layers, capture.layers, "layer"):
        arrays = _arrays(capture, layer)
        for head in _heads(capture, heads):
            group = head // (capture.manifest.heads // capture.manifest.kv_heads)
            row: Row = {"layer": layer, "head": head, "dimension": capture.manifest.head_dim, "shrinkage": shrinkage}
            try:
                found = measures.ood_distances(
                    arrays["prompt_keys"][group], arrays["prompt_queries"][head], arrays["decode_queries"][head],
                    seed=seed, shrinkage=shrinkage,
                )  # fmt: skip
            except KVBenchError as error:
                rows.append({**row, "missing": str(error)})
                continue
            for name in ("keys", "queries", "decode_to_keys", "prompt_queries", "decode_queries"):
                row[f"{name}_median"] = float(np.median(getattr(found, name)))
            row["queries_over_keys"] = row["queries_median"] / row["keys_median"]
            row["decode_over_keys"] = row["decode_to_keys_median"] / row["keys_median"]
            row["decode_over_prompt_queries"] = row["decode_queries_median"] / row["prompt_queries_median"]
            rows.append({**row, "key_samples": found.key_samples, "query_samples": found.query_samples, "missing": ""})
    if all(row["missing"] for row in rows):
        raise KVBenchError(f"No head has a covariance: {rows[0]['missing']}")
    return rows


def recovery(capture: Capture, *, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None,
             ks: Sequence[int] = (10, 30, 100, 300, 1000), steps: int = 32) -> list[Row]:  # fmt: skip
    """Mass recovered per layer, head and k: the exact top-k, the first step's set, and that with generated tokens."""
    rows = []
    chosen, prompt = _steps(capture, steps), capture.manifest.prompt_tokens
    ks = [k for k in ks if k < prompt]
    if len(chosen) < 2 or not ks:
        raise KVBenchError("Recovery needs two decoding steps and a prompt longer than k: capture more tokens.")
    for layer in _ids(layers, capture.layers, "layer"):
        arrays = _arrays(capture, layer)
        for head in _heads(capture, heads):
            weights = _weights(capture, arrays, head, chosen)
            for sinks in (0, SINKS):
                found = {
                    "dynamic": measures.dynamic_recovery(weights, ks, sinks=sinks),
                    "static": measures.static_recovery(weights, ks, sinks=sinks),
                    "static_and_generated": measures.static_recovery(weights, ks, sinks=sinks, generated_from=prompt),
                }
                for place, k in enumerate(ks):
                    # the first step's set is its own top-k: later steps only
                    means = {name: float(values[place, 1:].mean()) for name, values in found.items()}
                    rows.append({"layer": layer, "head": head, "sinks_left_out": sinks, "k": k,
                                 "steps": len(chosen) - 1, **means})  # fmt: skip
    return rows


def sparsity(capture: Capture, *, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None,
             steps: int = 32) -> list[Row]:  # fmt: skip
    """Mean tokens per layer and head that hold 90, 95 and 99% of the mass, and the head's share of a best budget.

    `budget_share`: tokens that the mass-maximising split of 10% of the prompt gives a head, over the uniform split's.
    """
    rows, last = [], []
    chosen = _steps(capture, steps)
    for layer in _ids(layers, capture.layers, "layer"):
        arrays = _arrays(capture, layer)
        for head in _heads(capture, heads):
            weights = _weights(capture, arrays, head, chosen)
            needs = {f"tokens_for_{p}": float(measures.tokens_for_mass(weights, p / 100).mean()) for p in (90, 95, 99)}
            rows.append({"layer": layer, "head": head, "context": weights.shape[1], "steps": len(chosen), **needs})
            last.append(weights[-1])
    total = max(1, capture.manifest.prompt_tokens // 10) * len(last)
    for row, count in zip(rows, measures.best_budgets(np.stack(last), total), strict=True):
        row["budget_share"] = float(count) * len(last) / total
    return rows


def overlap(capture: Capture, *, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None,
            k: int = 100, steps: int = 32) -> list[Row]:  # fmt: skip
    """Share of the exact top-k kept: from a step to the next and to the last, between heads and between layers."""
    count, prompt = capture.manifest.config.decode_tokens, capture.manifest.prompt_tokens
    if count < 2 or k >= prompt:
        raise KVBenchError(f"Overlap of the top {k} needs two decoding steps and a prompt beyond {k}: capture more.")
    chosen = np.arange(min(steps, count))
    names, sets = _ids(layers, capture.layers, "layer"), {}
    for layer in names:
        arrays = _arrays(capture, layer)
        for head in _heads(capture, heads):
            sets[layer, head] = measures.top_k(_weights(capture, arrays, head, chosen), k)
    rows = []
    for (layer, head), mine in sets.items():
        others = [measures.overlap(mine, other).mean() for (n, h), other in sets.items() if n == layer and h != head]
        place = names.index(layer)
        deeper = sets.get((names[place + 1], head)) if place + 1 < len(names) else None
        rows.append({
            "layer": layer, "head": head, "k": k, "steps": len(chosen),
            "next_step": float(measures.overlap(mine[:-1], mine[1:]).mean()),
            "last_step": float(measures.overlap(mine[0], mine[-1])),
            "other_heads": float(np.mean(others)) if others else None,
            "next_captured_layer": None if deeper is None else float(measures.overlap(mine, deeper).mean()),
        })  # fmt: skip
    return rows


def run_trace(folder: Path, column: str) -> list[Row]:
    """Means over layers and heads of a traced quantity by step, for every probed example of a run.

    Raises KVBenchError for a run without the trace, naming the command that records it.
    """
    config = read(folder)["config"]
    files = sorted((folder / "traces").glob("*.safetensors"))
    rows = []
    for file in files:
        trace = read_trace(file)
        if column not in trace.columns:
            continue
        for place, position in enumerate(trace.positions):
            values = trace.columns[column][place]
            if np.isfinite(values).any():
                step = int(position) - trace.prompt_tokens
                rows.append(
                    {
                        "policy": config["policy"],
                        "example": trace.example,
                        "step": step,
                        column: float(np.nanmean(values)),
                    }
                )
    if not rows:
        raise KVBenchError(
            f"{folder} has no trace of {column}: record it with `kvbench run --policy {config['policy']} "
            f"--task {config['task']} --context-length {config['context_length']} --probe-examples 1` and the probe "
            "that measures it (`kvbench probes` lists them), under a budget that leaves the policy a choice."
        )
    return rows


def analyse(name: str, capture: Capture | None, run: Path | None, *, layers: Sequence[int] | None = None,
            heads: Sequence[int] | None = None) -> list[Row]:  # fmt: skip
    """Run the analysis called `name` on a capture, or on a run's traces (recall and recovery)."""
    traced = {"recall": "recall_at_k", "recovery": "recovered_mass", "overlap": "step_overlap",
              "sparsity": "tokens_for_95"}  # fmt: skip
    studies: dict[str, Callable[..., list[Row]]] = {
        "ood": ood, "recovery": recovery, "sparsity": sparsity, "overlap": overlap,
    }  # fmt: skip
    if name not in {*traced, *studies}:
        raise KVBenchError(f"Unknown analysis '{name}': choose ood, recovery, recall, sparsity or overlap.")
    if (capture is None) == (run is None):
        raise KVBenchError("An analysis takes one source: give --capture DIR or --run DIR.")
    if run is not None:
        if name not in traced:
            raise KVBenchError("Distances need vectors, which a run does not store: give --capture DIR.")
        return run_trace(run, traced[name])
    if name not in studies:
        raise KVBenchError("Recall needs a policy's choices: give --run DIR, a folder that `kvbench run` wrote.")
    assert capture is not None
    return studies[name](capture, layers=layers, heads=heads)


def write(name: str, rows: list[Row], folder: Path, source: dict[str, Any]) -> None:
    """Write `NAME.csv`, `NAME.json` and the figure `NAME.svg` and `.png` (300 dpi) into the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        content = {"schema": SCHEMA, "analysis": name, "source": source, "rows": rows}
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
        draw(name, rows, folder, source["title"])
    except OSError as error:
        raise KVBenchError(f"Cannot write to {folder} ({error.strerror or error}): choose another --output.") from None


def draw(name: str, rows: list[Row], folder: Path, title: str) -> None:
    """Draw the analysis: by step for a run, by k for recovery, else by layer with the heads' range."""
    labels = {
        "ood": (
            ("keys_median", "queries_median", "decode_to_keys_median"),
            "median Mahalanobis distance from the keys (σ)",
        ),
        "sparsity": (("tokens_for_90", "tokens_for_95", "tokens_for_99"), "tokens for that share of the mass"),
        "overlap": (("next_step", "last_step", "other_heads", "next_captured_layer"), "share of the top-k in common"),
        "recovery": (("dynamic", "static", "static_and_generated"), "recovered attention mass (share)"),
    }
    with figures.drawing(folder, name) as figure:
        axis = figure.subplots()
        if "step" in rows[0]:
            columns, across = [list(rows[0])[-1]], "step"
            axis.set_ylabel(columns[0].replace("_", " ") + ", mean of layers and heads")
            axis.set_xlabel("decoding step (tokens after the prompt)")
        else:
            across = "k" if name == "recovery" else "layer"
            columns = list(labels[name][0])
            axis.set_ylabel(labels[name][1])
            axis.set_xlabel("tokens attended, k" if across == "k" else "layer (line: median of the heads; bar: range)")
        if name == "recovery" and across == "k":
            rows = [row for row in rows if row["sinks_left_out"] == SINKS]
            figures.logarithmic(axis)
            title += f"; first {SINKS} tokens left out"
        places = sorted({row[across] for row in rows})
        for place, column in enumerate(columns):
            color, marker, dashes, _ = figures.style(place)
            values = [[row[column] for row in rows if row[across] == x and row.get(column) is not None] for x in places]
            xs = [x for x, group in zip(places, values, strict=True) if group]
            groups = [group for group in values if group]
            middle = [float(np.median(group)) for group in groups]
            spread = [[m - min(g) for m, g in zip(middle, groups, strict=True)],
                      [max(g) - m for m, g in zip(middle, groups, strict=True)]]  # fmt: skip
            axis.errorbar(xs, middle, yerr=None if across == "step" else spread, color=color, marker=marker,
                          linestyle=dashes, label=column.replace("_", " "), elinewidth=0.8,
                          markersize=3 if across == "step" else 5)  # fmt: skip
        if name == "ood":
            axis.axhline(math.sqrt(rows[0]["dimension"]), color=figures.REFERENCE, linewidth=0.8, label="√d")
        if any(row.get("missing") for row in rows):
            title += " (partial: heads without a covariance left out)"
        axis.set_title(title)
        axis.legend()
