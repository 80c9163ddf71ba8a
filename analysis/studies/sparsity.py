"""How few tokens hold the attention, by layer and head, and what a budget allocator should make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from kvbench import figures
from kvbench.analysis import measures
from kvbench.analysis.studies import plots
from kvbench.analysis.studies.vectors import layers_of, spread
from kvbench.capture.files import Capture
from kvbench.contract.analysis import Analysis, Panel, Row, Tables
from kvbench.contract.extension import Options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = ("tokens_for_90", "tokens_for_95", "tokens_for_99")
_BUDGET_STEPS = 8


class SparsityProfile(Analysis):
    """Fewest tokens that hold 90, 95 and 99% of exact attention's mass, and the shares of a budget that heads deserve.

    `budget_share`: for each layer and head, the tokens that the mass-maximising split of the budget (the largest
    weights over all layers and heads, at each of eight steps) gives it, over the uniform split's; the mean is 1. Budget
    `profile` reads `layer`, `head` and `budget_share` of the rows of `sparsity.json`.
    """

    name = "sparsity"
    summary = "Tokens that hold 90, 95, 99% of the mass, and the budget shares that layers and heads deserve."
    reference = "Liu et al., RetrievalAttention, arXiv 2409.10516; Feng et al., Ada-KV, arXiv 2407.11550"
    size = (8.5, 3.8)
    probe = "sparsity"
    panels = (Panel("tokens that hold 90, 95, 99% of the mass", _COLUMNS),)

    class Options(Options):
        """Options of the analysis."""

        steps: int = Field(32, ge=1, description="decoding steps, evenly spread over those captured")
        ratio: float = Field(0.1, gt=0, le=1, description="budget of the shares, as a share of the context")

    def measure(
        self, capture: Capture, layers: Sequence[int], heads: Sequence[int], progress: Callable[[str], None]
    ) -> Tables:
        """`rows`: mean tokens and the budget share, per layer and head."""
        steps = spread(capture.manifest.config.decode_tokens, self.options.steps)
        shown = np.unique(np.linspace(0, len(steps) - 1, _BUDGET_STEPS).round().astype(int))
        rows: list[Row] = []
        kept = []
        for vectors in layers_of(capture, layers):
            progress(f"layer {vectors.number}: sparsity")
            for head in heads:
                weights = vectors.weights(head, steps)
                needs = {
                    f"tokens_for_{percent}": float(measures.tokens_for_mass(weights, percent / 100).mean())
                    for percent in (90, 95, 99)
                }
                context = float((capture.manifest.prompt_tokens + steps + 1).mean())
                rows.append({"layer": vectors.number, "head": head, "context": context, "steps": len(steps), **needs})
                kept.append(weights[shown].astype(np.float32))
        shares = budget_shares(np.stack(kept, axis=1), self.options.ratio)
        for row, share in zip(rows, shares, strict=True):
            row["budget_share"] = float(share)
        return {"rows": rows}

    def summarise(self, tables: Tables) -> list[Row]:
        """Each layer's mean over the heads, and the lowest and highest share among them."""
        result = []
        for layer in dict.fromkeys(row["layer"] for row in tables["rows"]):
            part = [row for row in tables["rows"] if row["layer"] == layer]
            shares = [row["budget_share"] for row in part]
            result.append({
                "layer": layer, "heads": len(part), "context": part[0]["context"],
                **{column: float(np.mean([row[column] for row in part])) for column in _COLUMNS},
                "budget_share": float(np.mean(shares)), "lowest_share": min(shares), "highest_share": max(shares),
            })  # fmt: skip
        return result

    def draw(self, figure: Figure, tables: Tables) -> None:
        """The numbers of tokens by layer, and the shares by layer and head."""
        left, right = figure.subplots(1, 2)
        layers = list(dict.fromkeys(row["layer"] for row in tables["rows"]))
        for place, (column, percent) in enumerate(zip(_COLUMNS, (90, 95, 99), strict=True)):
            groups = {n: [row[column] for row in tables["rows"] if row["layer"] == n] for n in layers}
            plots.with_spread(left, groups, figures.style(place), f"{percent}% of the mass")
        figures.logarithmic(left, "y")
        left.set_xlabel("layer (median and middle half of the heads)")
        left.set_ylabel(f"tokens, of {tables['rows'][0]['context']:.0f} (log)")
        left.legend(loc="best")
        values = {(row["layer"], row["head"]): row["budget_share"] for row in tables["rows"]}
        plots.heat_map(figure, right, values, ("layer", "query head", "budget deserved, over the uniform share"))


def budget_shares(weights: measures.Float, ratio: float) -> measures.Float:
    """Shares [heads] of a budget that maximise the mass of weights [steps, heads, n], mean 1; steps are averaged.

    The budget at each step is `ratio` of the n tokens for each head (see `measures.best_budgets`).
    """
    steps, heads, n = weights.shape
    tokens = max(1, round(ratio * n)) * heads
    counts = np.stack([measures.best_budgets(weights[step], tokens) for step in range(steps)])
    shares: measures.Float = counts.mean(0) * heads / tokens
    return shares
