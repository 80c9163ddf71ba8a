"""How far queries lie from keys, as Mahalanobis distances (RetrievalAttention, arXiv 2409.10516, figure 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from kvbench import figures
from kvbench.analysis import measures
from kvbench.analysis.studies import plots
from kvbench.analysis.studies.vectors import layers_of
from kvbench.capture.files import Capture
from kvbench.contract.analysis import Analysis, Row, Tables
from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import Options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FROM = {
    "keys": {"keys": "prompt keys, held out", "queries": "prompt queries", "decode_to_keys": "decoding queries"},
    "prompt queries": {"prompt_queries": "prompt queries, held out", "decode_queries": "decoding queries"},
}
_BINS = 48


class OOD(Analysis):
    """Mahalanobis distances per layer and head: D(x) = √((x − μ)ᵀΣ⁻¹(x − μ)), float64.

    A random half of the prompt's keys gives μ and Σ; the other half, half of the prompt's queries and the decoding
    queries are measured against them. The prompt's queries in turn give μ and Σ for the decoding queries. Vectors of
    the distribution itself lie at about √d. Heads without a covariance are left out, marked, with the reason.
    """

    name = "ood"
    summary = "Mahalanobis distances: queries from keys, keys from keys, decoding queries from the prompt's queries."
    reference = "Liu et al., RetrievalAttention, arXiv 2409.10516, figures 3 and 9; Mahalanobis 1936"
    size = (10.5, 3.6)

    class Options(Options):
        """Options of the analysis."""

        shrinkage: float = Field(0.0, ge=0, le=1, description="share of tr(Σ)/d·I mixed into Σ (Ledoit and Wolf 2004)")
        pseudo_inverse: bool = Field(False, description="leave directions without variance out, instead of refusing")
        seed: int = Field(0, description="seed of the split into halves")

    def measure(
        self, capture: Capture, layers: Sequence[int], heads: Sequence[int], progress: Callable[[str], None]
    ) -> Tables:
        """`rows`: medians, ratios, sample sizes and ranks per layer and head; `histogram`: shares over all of them."""
        rows: list[Row] = []
        distances: dict[str, list[measures.Float]] = {name: [] for part in _FROM.values() for name in part}
        for vectors in layers_of(capture, layers):
            progress(f"layer {vectors.number}: distances")
            for head in heads:
                row: Row = {
                    "layer": vectors.number, "head": head, "dimension": capture.manifest.head_dim,
                    "shrinkage": self.options.shrinkage, "pseudo_inverse": self.options.pseudo_inverse,
                    "seed": self.options.seed,
                }  # fmt: skip
                try:
                    found = measures.ood_distances(
                        vectors.keys_of_prompt(head), vectors.queries_of_prompt(head),
                        vectors.queries_of_decoding(head), **self.options.model_dump(),
                    )  # fmt: skip
                except KVBenchError as error:
                    rows.append({**row, "missing": str(error)})
                    continue
                for name, kept in distances.items():
                    values = getattr(found, name)
                    kept.append(values)
                    row[f"{name}_median"] = float(np.median(values))
                rows.append({
                    **row,
                    "queries_over_keys": row["queries_median"] / row["keys_median"],
                    "decode_over_keys": row["decode_to_keys_median"] / row["keys_median"],
                    "decode_over_prompt_queries": row["decode_queries_median"] / row["prompt_queries_median"],
                    "key_samples": found.key_samples, "key_rank": found.key_rank,
                    "query_samples": found.query_samples, "query_rank": found.query_rank,
                    "keys_measured": len(found.keys), "queries_measured": len(found.queries),
                    "decode_queries_measured": len(found.decode_queries), "missing": "",
                })  # fmt: skip
        if all(row["missing"] for row in rows):
            raise KVBenchError(
                f"No head has a covariance: {rows[0]['missing']} (-o shrinkage=0.1, -o pseudo_inverse=true, or a "
                "longer --context-length.)"
            )
        return {"rows": rows, "histogram": _histogram(distances)}

    def summarise(self, tables: Tables) -> list[Row]:
        """Each layer's median over the heads of the distances and of their ratios."""
        return [
            {
                "layer": layer, "heads": len(part), "√d": math.sqrt(part[0]["dimension"]),
                **{_TITLES[name]: float(np.median([row[name] for row in part])) for name in _TITLES},
            }
            for layer, part in _by_layer(tables["rows"])
        ]  # fmt: skip

    def draw(self, figure: Figure, tables: Tables) -> None:
        """Histograms of the distances from the keys and from the prompt's queries; the ratios by layer."""
        of_keys, of_queries, by_layer = figure.subplots(1, 3)
        rows = [row for row in tables["rows"] if not row["missing"]]
        root = math.sqrt(rows[0]["dimension"])
        for axis, reference in ((of_keys, "keys"), (of_queries, "prompt queries")):
            for place, title in enumerate(_FROM[reference].values()):
                bins = [b for b in tables["histogram"] if (b["distribution"], b["vectors"]) == (reference, title)]
                edges = [bins[0]["low"], *(b["high"] for b in bins)]
                look = figures.style(place if reference == "keys" else place + 1)
                axis.stairs(
                    [100 * b["share"] for b in bins], edges, color=look.color, linestyle=look.dashes, linewidth=1.6,
                    label=title,
                )  # fmt: skip
            axis.axvline(root, color=figures.REFERENCE, linewidth=0.9, linestyle=(0, (1, 1)), label=f"√d = {root:.3g}")
            figures.logarithmic(axis, "x")
            axis.set_xlabel(f"Mahalanobis distance from the {reference} (σ, log)")
            axis.set_ylabel("vectors (% per bin)")
            axis.set_ylim(0, axis.get_ylim()[1] * 1.35)
            axis.legend(loc="upper right")
        ratios = ("queries_over_keys", "decode_over_keys", "decode_over_prompt_queries")
        for place, name in enumerate(ratios):
            look = figures.style(place + 1 if place < 2 else 3)
            plots.with_spread(by_layer, {n: [row[name] for row in part] for n, part in _by_layer(rows)}, look,
                               _TITLES[name])  # fmt: skip
        by_layer.axhline(1, color=figures.REFERENCE, linewidth=0.9, linestyle=(0, (1, 1)))
        by_layer.set_xlabel("layer (median and middle half of the heads)")
        by_layer.set_ylabel("ratio of median distances")
        by_layer.set_ylim(0, by_layer.get_ylim()[1] * 1.3)
        by_layer.legend(loc="upper left")


_TITLES = {
    "keys_median": "keys", "queries_median": "prompt queries", "decode_to_keys_median": "decoding queries",
    "queries_over_keys": "prompt queries / keys", "decode_over_keys": "decoding queries / keys",
    "decode_over_prompt_queries": "decoding / prompt queries",
}  # fmt: skip


def _by_layer(rows: Iterable[Row]) -> list[tuple[int, list[Row]]]:
    layers: dict[int, list[Row]] = {}
    for row in rows:
        if not row["missing"]:
            layers.setdefault(row["layer"], []).append(row)
    return list(layers.items())


def _histogram(distances: dict[str, list[Any]]) -> list[Row]:
    """Shares of all heads' vectors between logarithmic edges, each head counting the same."""
    rows: list[Row] = []
    for reference, parts in _FROM.items():
        everything = np.concatenate([values for name in parts for values in distances[name]])
        low, high = np.quantile(everything[everything > 0], 0.0005), everything.max()
        edges = np.geomspace(low, max(high, low * 1.01), _BINS + 1)
        for name, title in parts.items():
            # what lies outside falls into the outermost bin
            shares = np.mean(
                [np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0] / len(v) for v in distances[name]], axis=0
            )
            rows += [
                {"distribution": reference, "vectors": title, "low": float(a), "high": float(b), "share": float(share)}
                for (a, b), share in zip(pairwise(edges), shares, strict=True)
            ]
    return rows
