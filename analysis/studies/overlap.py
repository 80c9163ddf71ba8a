"""How much the tokens that matter change: from step to step, between heads, and from layer to layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from kvbench import figures
from kvbench.analysis import measures
from kvbench.analysis.studies import plots
from kvbench.analysis.studies.vectors import layers_of
from kvbench.capture.files import Capture
from kvbench.contract.analysis import Analysis, Panel, Row, Tables
from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import Options

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class OverlapOfSets(Analysis):
    """Share of the exact top-k of a step, layer and head that is also in another step's, head's or layer's.

    The first `steps` decoding steps. Between layers the same query head is compared, and between heads the same layer,
    at the same step. For a run: the share of the tokens that the policy attended to at the step before.
    """

    name = "overlap"
    summary = "Share of the exact top-k in common between steps, layers and heads."
    size = (10.5, 3.4)
    probe = "overlap"
    panels = (Panel("attended tokens kept from the step before (share)", ("step_overlap",)),)

    class Options(Options):
        """Options of the analysis."""

        k: int = Field(100, ge=1, description="size of the sets")
        steps: int = Field(32, ge=2, description="decoding steps from the first on")

    def measure(
        self, capture: Capture, layers: Sequence[int], heads: Sequence[int], progress: Callable[[str], None]
    ) -> Tables:
        """`rows`: means per layer and head; `lags`: by the distance of two steps; `layers`: between any two layers."""
        k, count = self.options.k, min(self.options.steps, capture.manifest.config.decode_tokens)
        if count < 2 or k >= capture.manifest.prompt_tokens:
            raise KVBenchError(
                f"Overlap of the top {k} needs two decoding steps and a prompt beyond {k} tokens: capture more "
                "(--context-length, --decode-tokens), or give -o k=."
            )
        steps = np.arange(count)
        found = []
        for vectors in layers_of(capture, layers):
            progress(f"layer {vectors.number}: overlap")
            found.append([measures.top_k(vectors.weights(head, steps), k) for head in heads])
        sets = np.array(found)
        between = np.stack([_between(sets[:, :, step]) for step in steps]).mean(0) / k
        lags = [lag for lag in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if lag < count]
        by_lag = {lag: measures.overlap(sets[:, :, :-lag], sets[:, :, lag:]).mean(-1) for lag in lags}
        rows: list[Row] = []
        for i, layer in enumerate(layers):
            for j, head in enumerate(heads):
                others = np.delete(between[i, j, i], j)
                rows.append({
                    "layer": layer, "head": head, "k": k, "steps": count,
                    "next_step": float(by_lag[1][i, j]),
                    "last_step": float(measures.overlap(sets[i, j, 0], sets[i, j, -1])),
                    "other_heads": float(others.mean()) if len(others) else None,
                    "next_captured_layer": float(between[i, j, i + 1, j]) if i + 1 < len(layers) else None,
                })  # fmt: skip
        same_head = np.einsum("ijkj->ikj", between).mean(-1)
        return {
            "rows": rows,
            "lags": [
                {"layer": layer, "head": head, "lag": lag, "overlap": float(values[i, j])}
                for lag, values in by_lag.items()
                for i, layer in enumerate(layers)
                for j, head in enumerate(heads)
            ],
            "layers": [
                {"layer": first, "other_layer": second, "overlap": float(same_head[i, j])}
                for i, first in enumerate(layers)
                for j, second in enumerate(layers)
            ],
        }

    def summarise(self, tables: Tables) -> list[Row]:
        """Each layer's means over the heads."""
        names = ("next_step", "last_step", "other_heads", "next_captured_layer")
        result = []
        for layer in dict.fromkeys(row["layer"] for row in tables["rows"]):
            part = [row for row in tables["rows"] if row["layer"] == layer]
            means = {name: [row[name] for row in part if row[name] is not None] for name in names}
            result.append({
                "layer": layer, "heads": len(part), "k": part[0]["k"],
                **{name: float(np.mean(values)) if values else None for name, values in means.items()},
            })  # fmt: skip
        return result

    def draw(self, figure: Figure, tables: Tables) -> None:
        """Overlap by the distance of two steps, with the next step and other heads by layer, and between layers."""
        by_lag, by_layer, between = figure.subplots(1, 3)
        lags = sorted({row["lag"] for row in tables["lags"]})
        groups = {lag: [row["overlap"] for row in tables["lags"] if row["lag"] == lag] for lag in lags}
        plots.with_spread(by_lag, groups, figures.style(0), "exact top-k")
        figures.logarithmic(by_lag, "x")
        by_lag.set_xlabel("decoding steps apart (log)")
        by_lag.set_ylabel("share of the top-k in common\n(median and middle half of the heads)")
        layers = list(dict.fromkeys(row["layer"] for row in tables["rows"]))
        for place, (name, label) in enumerate((("next_step", "next step"), ("other_heads", "other heads"))):
            groups = {
                n: [row[name] for row in tables["rows"] if row["layer"] == n and row[name] is not None] for n in layers
            }
            if any(groups.values()):
                plots.with_spread(by_layer, groups, figures.style(place), label)
        by_layer.set_xlabel("layer")
        by_layer.legend(loc="best")
        for axis in (by_lag, by_layer):
            axis.set_ylim(0, 1.02)
        values = {(row["layer"], row["other_layer"]): row["overlap"] for row in tables["layers"]}
        plots.heat_map(figure, between, values, ("layer", "layer", "share in common, same head"), (0, 1))


def _between(sets: measures.Bool) -> measures.Float:
    """Tokens in common [L, H, L, H] of sets, bool [L, H, n]."""
    flat = sets.reshape(-1, sets.shape[-1]).astype(np.float32)
    common: measures.Float = (flat @ flat.T).astype(np.float64).reshape(*sets.shape[:2], *sets.shape[:2])
    return common
