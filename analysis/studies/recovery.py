"""How much attention mass a fixed number of tokens recovers: chosen anew at every step, or once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from kvbench import figures
from kvbench.analysis import measures
from kvbench.analysis.probes.standard import SINKS
from kvbench.analysis.studies import plots
from kvbench.analysis.studies.vectors import layers_of, spread
from kvbench.capture.files import Capture
from kvbench.contract.analysis import Analysis, Counts, Panel, Row, Tables
from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import Options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WAYS = {
    "dynamic": "dynamic: each step's exact top-k",
    "static": "static: the first step's top-k",
    "static_and_generated": "static, and all tokens generated",
}


class RecoveryByK(Analysis):
    """Share of exact attention's mass on k tokens, per layer, head and k, averaged over the decoding steps.

    `dynamic`: the k largest weights of each step, the most that any k tokens hold. `static`: the k largest of the first
    decoding step, used again at every later one. `static_and_generated`: those, and every token decoded since. All once
    over the whole context and once with the first four tokens (sinks) left out of the mass and of the choice.
    For a run: what the policy's own choice recovers, beside what as many tokens do that are chosen in these ways.
    """

    name = "recovery"
    summary = "Attention mass that k tokens recover: exact top-k, the first step's top-k, a policy's choice."
    reference = "Liu et al., RetrievalAttention, arXiv 2409.10516, figure 2"
    size = (8.5, 3.8)
    probe = "recovery"
    panels = (
        Panel("recovered mass (share)", ("recovered_mass", "dynamic_mass", "static_mass")),
        Panel(
            "the same without the sinks",
            ("recovered_mass_without_sinks", "dynamic_mass_without_sinks", "static_mass_without_sinks"),
        ),
    )

    class Options(Options):
        """Options of the analysis."""

        ks: Counts = Field((10, 30, 100, 300, 1000), min_length=1, description="numbers of tokens, k")
        steps: int = Field(32, ge=2, description="decoding steps, evenly spread over those captured")

    def measure(
        self, capture: Capture, layers: Sequence[int], heads: Sequence[int], progress: Callable[[str], None]
    ) -> Tables:
        """`rows`: the three recoveries per layer, head, k, with and without sinks."""
        steps, prompt = (
            spread(capture.manifest.config.decode_tokens, self.options.steps),
            capture.manifest.prompt_tokens,
        )
        ks = [k for k in sorted(set(self.options.ks)) if k + SINKS < prompt]
        if len(steps) < 2 or not ks:
            raise KVBenchError(
                f"Recovery by k = {min(self.options.ks)} tokens needs two decoding steps and a longer prompt than "
                f"{prompt} tokens: capture more (--context-length, --decode-tokens), or give -o ks=."
            )
        rows: list[Row] = []
        for vectors in layers_of(capture, layers):
            progress(f"layer {vectors.number}: recovery")
            for head in heads:
                weights = vectors.weights(head, steps)
                for sinks in (0, SINKS):
                    found = {
                        "dynamic": measures.dynamic_recovery(weights, ks, sinks=sinks),
                        "static": measures.static_recovery(weights, ks, sinks=sinks),
                        "static_and_generated": measures.static_recovery(
                            weights, ks, sinks=sinks, generated_from=prompt
                        ),
                    }
                    for place, k in enumerate(ks):
                        # the first step's set is its own top-k: later steps only
                        means = {name: float(values[place, 1:].mean()) for name, values in found.items()}
                        rows.append({
                            "layer": vectors.number, "head": head, "sinks_left_out": sinks, "k": k,
                            "context": weights.shape[1], "steps": len(steps) - 1, **means,
                        })  # fmt: skip
        return {"rows": rows}

    def summarise(self, tables: Tables) -> list[Row]:
        """Means over layers and heads by k, and the lowest head's dynamic recovery."""
        return [
            {
                "sinks": "left out" if sinks else "counted", "k": k, "share_of_context": k / part[0]["context"],
                **{way: float(np.mean([row[way] for row in part])) for way in _WAYS},
                "lowest_head_dynamic": min(row["dynamic"] for row in part),
            }
            for sinks in (0, SINKS)
            for k in sorted({row["k"] for row in tables["rows"]})
            for part in [[row for row in tables["rows"] if (row["sinks_left_out"], row["k"]) == (sinks, k)]]
        ]  # fmt: skip

    def draw(self, figure: Figure, tables: Tables) -> None:
        """The recoveries by k, over the whole context and without the sinks."""
        axes = figure.subplots(1, 2, sharey=True)
        for axis, sinks, title in zip(
            axes, (0, SINKS), ("whole context", f"first {SINKS} tokens left out"), strict=True
        ):
            rows = [row for row in tables["rows"] if row["sinks_left_out"] == sinks]
            ks = sorted({row["k"] for row in rows})
            for place, (way, label) in enumerate(_WAYS.items()):
                groups = {k: [row[way] for row in rows if row["k"] == k] for k in ks}
                plots.with_spread(axis, groups, figures.style(place), label)
            figures.logarithmic(axis, "x")
            axis.set_title(title)
            axis.set_xlabel("tokens, k (log)")
            axis.set_ylim(0, 1.02)
        axes[0].set_ylabel("recovered attention mass (share;\nmedian and middle half of the heads)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
