"""Whether an index's recall holds while the model generates, with and without inserting the new keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from kvbench import figures
from kvbench.analysis.index_benchmark import IndexBenchmark, Vectors, exact_top_k, load_vectors, one_thread, warm_up
from kvbench.analysis.studies.vectors import spread
from kvbench.capture.files import Capture
from kvbench.contract.analysis import Analysis, Counts, Names, Panel, Row, Tables
from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import Options
from kvbench.plugins import registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WAYS = {
    "recall_prompt": "index of the prompt's keys,\nrecall over the prompt's keys",
    "recall_inserted": "new keys inserted,\nrecall over all keys",
    "recall_stale": "index of the prompt's keys,\nrecall over all keys",
}

_SHORT = {
    "recall_prompt": ("prompt's keys, none inserted", "scanned_prompt"),
    "recall_inserted": ("all keys, new ones inserted", "scanned_inserted"),
    "recall_stale": ("all keys, none inserted", "scanned_prompt"),
}


class RecallOverSteps(Analysis):
    """Recall@k of indexes at decoding step after decoding step, per layer and head.

    The index is built on the prompt's keys between sinks and window; then the window slides over the tokens decoded.
    `recall_prompt`: nothing is inserted, and recall counts the prompt's keys (generated tokens stay in the window, as
    RetrievalAttention keeps them). `recall_inserted`: keys that leave the window are inserted, and recall counts all
    indexed keys. `recall_stale`: nothing is inserted, and recall counts all keys that left the window: what forgetting
    generated tokens costs. k is smaller while there are fewer keys. Queries are the decoded tokens': no index saw them.

    A token's vectors do not depend on what follows it, so a capture holds every shorter prompt too: with `prompts` the
    first so many tokens are the prompt and all others count as decoded, those computed in the prompt's pass as well.
    """

    name = "recall"
    summary = "Recall@k of indexes over the decoding steps, with and without inserting the new keys."
    reference = "Liu et al., RetrievalAttention, arXiv 2409.10516 (revised), figures 10 to 12"
    size = (10.5, 3.8)
    probe = "recall"
    panels = (Panel("recall@k", ("recall_at_k",)), Panel("keys scanned (share)", ("scanned_fraction",)))

    class Options(Options):
        """Options of the analysis."""

        indexes: Names = Field(("roargraph",), min_length=1, description="indexes; `kvbench indexes` lists them")
        k: int = Field(100, ge=1, description="k of recall@k")
        sinks: int = Field(4, ge=0, description="first tokens left out of the index")
        window: int = Field(64, ge=1, description="last tokens left out of the index, at each step")
        insert_every: int = Field(1, ge=1, description="tokens that leave the window for the index at a time")
        prompts: Counts = Field((), description="prompt lengths, in tokens; none: the capture's")
        steps: int | None = Field(None, ge=2, description="decoding steps; all there are by default")
        points: int = Field(150, ge=2, description="steps at which recall is measured, evenly spread")
        index_options: dict[str, dict[str, Any]] = Field({}, description="options of an index, as index.option=value")

    def measure(
        self, capture: Capture, layers: Sequence[int], heads: Sequence[int], progress: Callable[[str], None]
    ) -> Tables:
        """`rows`: recall and scanned share per index, prompt, layer, head and step; `times`: search and insertion."""
        options, context = self.options, capture.manifest.config.context_length
        for name in options.index_options:
            if name not in options.indexes:
                raise KVBenchError(f"Options of index '{name}', which is not measured: give -o indexes={name}.")
        found = registry()
        made = {name: found.options("index", name, options.index_options.get(name, {})) for name in options.indexes}
        prompts = sorted(set(options.prompts)) or [capture.manifest.prompt_tokens]
        for prompt in prompts:
            if not options.sinks + options.window < prompt < context - 1:
                raise KVBenchError(
                    f"A prompt of {prompt} tokens, with {options.sinks} sinks and a window of {options.window}, leaves "
                    f"nothing to index or to decode in a context of {context}: choose another prompt or window."
                )
        config = IndexBenchmark(options.indexes, k=options.k, heads=tuple(heads), sinks=0, window=0)
        tables: Tables = {"rows": [], "times": []}
        for number in layers:
            vectors = load_vectors(capture.layer(number), config, capture.manifest.heads, capture.manifest.kv_heads)
            for prompt in prompts:
                for name in options.indexes:
                    progress(f"layer {number}: {name}, prompt of {prompt}")
                    self._follow(tables, vectors, prompt, name, made[name])
        return tables

    def _follow(self, tables: Tables, vectors: Vectors, prompt: int, name: str, index_options: Any) -> None:
        """Decode after a prompt of `prompt` tokens and add one index's rows."""
        options = self.options
        keys = np.concatenate([vectors.keys, vectors.new_keys], axis=1)
        queries = np.concatenate([vectors.training, vectors.queries], axis=1)
        decoded = min(keys.shape[1] - prompt, options.steps or keys.shape[1])
        measured = set(spread(decoded, options.points).tolist())
        sinks, window, shared = options.sinks, options.window, len(vectors.heads) // len(keys)
        fixed, growing = (registry().find("index", name)(index_options) for _ in range(2))
        training = np.ascontiguousarray(queries[:, :prompt]) if fixed.uses_queries else None
        stop = prompt - window
        for index in (fixed, growing):
            index.build(keys[:, sinks:stop], training, heads=len(vectors.heads))
        warm_up(name, index_options, keys[:, sinks:stop], queries[:, :prompt], options.k)
        indexed, insert_s, search_s, inserted = stop, 0.0, [], 0
        for step in range(decoded):
            if prompt + step + 1 - window - indexed >= options.insert_every:
                past, indexed = indexed, prompt + step + 1 - window
                began = time.perf_counter()
                growing.insert(keys[:, past:indexed], storage=keys[:, sinks:indexed])
                insert_s, inserted = insert_s + time.perf_counter() - began, inserted + indexed - past
            if step not in measured:
                continue
            now = np.ascontiguousarray(queries[:, prompt + step : prompt + step + 1])
            with one_thread():
                first = fixed.search(now, min(options.k, stop - sinks))
                began = time.perf_counter()
                second = growing.search(now, min(options.k, indexed - sinks))
                search_s.append(time.perf_counter() - began)
            for place, head in enumerate(vectors.heads):
                mine, query = keys[place // shared], now[place]
                of_prompt, of_all = (
                    exact_top_k(query, mine[sinks:end], min(options.k, end - sinks))[0] for end in (stop, indexed)
                )
                tables["rows"].append({
                    "index": name, "prompt_tokens": prompt, "layer": vectors.layer, "head": head, "step": step + 1,
                    "k": len(of_all), "keys": indexed - sinks,
                    "recall_prompt": len(np.intersect1d(first.ids[place, 0], of_prompt)) / len(of_prompt),
                    "recall_inserted": len(np.intersect1d(second.ids[place, 0], of_all)) / len(of_all),
                    "recall_stale": len(np.intersect1d(first.ids[place, 0], of_all)) / len(of_all),
                    "scanned_prompt": float(first.evaluations[place, 0]) / (stop - sinks),
                    "scanned_inserted": float(second.evaluations[place, 0]) / (indexed - sinks),
                })  # fmt: skip
        tables["times"].append({
            "index": name, "prompt_tokens": prompt, "layer": vectors.layer, "heads": len(vectors.heads),
            "insert_us_per_token": 1e6 * insert_s / inserted if inserted else None,
            "search_us_per_token": 1e6 * float(np.median(search_s)),
        })  # fmt: skip

    def summarise(self, tables: Tables) -> list[Row]:
        """Recall by index, prompt and way: over all steps, over the first and the last tenth of them, and by head."""
        result = []
        for (name, prompt), part in _parts(tables["rows"]).items():
            last = max(row["step"] for row in part)
            times = [row for row in tables["times"] if (row["index"], row["prompt_tokens"]) == (name, prompt)]
            insertion = [row["insert_us_per_token"] for row in times if row["insert_us_per_token"] is not None]
            for way, (title, scanned) in _SHORT.items():
                heads: dict[tuple[int, int], list[float]] = {}
                for row in part:
                    heads.setdefault((row["layer"], row["head"]), []).append(row[way])
                means = {place: float(np.mean(values)) for place, values in heads.items()}
                layer, head = min(means, key=lambda place: means[place])
                result.append({
                    "index": name, "prompt": prompt, "steps": last, "recall": title,
                    "mean": float(np.mean([row[way] for row in part])),
                    "first_tenth": float(np.mean([row[way] for row in part if row["step"] <= max(1, last / 10)])),
                    "last_tenth": float(np.mean([row[way] for row in part if row["step"] > 0.9 * last])),
                    "lowest_head": means[layer, head], "where": f"layer {layer}, head {head}",
                    "scanned": float(np.mean([row[scanned] for row in part])),
                    "search_us": float(np.mean([row["search_us_per_token"] for row in times])),
                    "insert_us": float(np.mean(insertion)) if insertion and way == "recall_inserted" else None,
                })  # fmt: skip
        return result

    def draw(self, figure: Figure, tables: Tables) -> None:
        """The three recalls by decoding step: mean of layers and heads, and the middle half of them."""
        axes = figure.subplots(1, 3, sharey=True)
        parts = _parts(tables["rows"])
        for place, ((name, prompt), part) in enumerate(parts.items()):
            look = figures.style(place)
            steps = sorted({row["step"] for row in part})
            for axis, (way, title) in zip(axes, _WAYS.items(), strict=True):
                values: dict[int, list[float]] = {step: [] for step in steps}
                for row in part:
                    values[row["step"]].append(row[way])
                axis.plot(
                    steps, [np.mean(values[step]) for step in steps], color=look.color, linestyle=look.dashes,
                    marker=look.marker, markevery=max(1, len(steps) // 8), markersize=4, linewidth=1.2,
                    label=f"{name}, prompt of {prompt} tokens",
                )  # fmt: skip
                low, high = np.quantile(np.array([values[step] for step in steps]), (0.25, 0.75), axis=1)
                axis.fill_between(steps, low, high, color=look.color, alpha=0.15, linewidth=0)
                axis.set_title(title)
                axis.set_xlabel("decoding step (tokens)")
                axis.axhline(0.95, color=figures.REFERENCE, linewidth=0.9, linestyle=(0, (1, 1)))
        axes[0].set_ylabel(f"recall@{self.options.k} (mean; shade: middle half\nof layers and heads)")
        axes[0].set_ylim(max(0.0, axes[0].get_ylim()[0]), 1.02)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)


def _parts(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    parts: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        parts.setdefault((row["index"], row["prompt_tokens"]), []).append(row)
    return parts
