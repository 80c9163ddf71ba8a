"""What building an index costs as the context grows: time, memory and insertion."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from pydantic import Field

from kvbench import figures
from kvbench.analysis.index_benchmark import IndexBenchmark, load_vectors, warm_up
from kvbench.capture.files import Capture
from kvbench.contract.analysis import Analysis, Counts, Names, Row, Tables
from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import Options
from kvbench.plugins import registry
from kvbench.runs.memory import PeakMemory, release

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Construction(Analysis):
    """Time and memory of building an index over the first keys of a prompt, for several lengths, per layer.

    For all chosen heads of a layer in one call, on as many threads as `numba.set_num_threads` says, the search for
    training queries' nearest keys included. `bytes`: the structure afterwards, keys apart. `peak_bytes`: how far the
    process's resident memory rose while building. `insert_us_per_token`: then inserting the decoded keys one by one.
    """

    name = "construction"
    summary = "Index construction time and memory by context length."
    reference = "asked for in the reviews of RetrievalAttention (arXiv 2409.10516)"
    size = (10.5, 3.6)

    class Options(Options):
        """Options of the analysis."""

        indexes: Names = Field(
            ("roargraph", "ivf", "hnsw"), min_length=1, description="indexes; `kvbench indexes` lists them"
        )
        contexts: Counts = Field((), description="context lengths, in tokens; by default the prompt's, ½, ¼, ⅛ of it")
        sinks: int = Field(4, ge=0, description="first tokens left out of the index")
        window: int = Field(64, ge=0, description="last tokens of each context left out of the index")
        index_options: dict[str, dict[str, Any]] = Field({}, description="options of an index, as index.option=value")

    def measure(
        self, capture: Capture, layers: Sequence[int], heads: Sequence[int], progress: Callable[[str], None]
    ) -> Tables:
        """`rows`: one per index, context length and layer."""
        import numba  # noqa: PLC0415 - slow

        options, prompt = self.options, capture.manifest.prompt_tokens
        made = {
            name: registry().options("index", name, options.index_options.get(name, {})) for name in options.indexes
        }
        least = options.sinks + options.window
        halves = {prompt >> shift for shift in range(4) if prompt >> shift > least or not shift}
        contexts = sorted(set(options.contexts) or halves)
        if contexts[0] <= least or contexts[-1] > prompt:
            raise KVBenchError(
                f"Contexts of {', '.join(map(str, contexts))} tokens do not fit a captured prompt of {prompt}, where "
                f"{least} are sinks and window: choose others, or capture more."
            )
        config = IndexBenchmark(options.indexes, heads=tuple(heads), sinks=0, window=0)
        rows: list[Row] = []
        for number in layers:
            vectors = load_vectors(capture.layer(number), config, capture.manifest.heads, capture.manifest.kv_heads)
            for name in options.indexes:
                warm_up(name, made[name], vectors.keys, vectors.training, 10)
                for context in contexts:
                    progress(f"layer {number}: {name}, {context} tokens")
                    keys = vectors.keys[:, options.sinks : context - options.window]
                    index = registry().find("index", name)(made[name])
                    training = np.ascontiguousarray(vectors.training[:, :context]) if index.uses_queries else None
                    release()
                    before = psutil.Process().memory_info().rss
                    with PeakMemory(torch.device("cpu")) as peak:
                        began = time.perf_counter()
                        index.build(keys, training, heads=len(vectors.heads))
                        build_s = time.perf_counter() - began
                    size = int(index.nbytes)
                    new = vectors.new_keys
                    began = time.perf_counter()
                    for place in range(new.shape[1]):
                        index.insert(new[:, place : place + 1])
                    insert_s = time.perf_counter() - began
                    rows.append({
                        "index": name, "context": context, "layer": number, "heads": len(vectors.heads),
                        "keys": keys.shape[1], "build_s": build_s, "bytes": size,
                        "bytes_per_key": size / keys.shape[1], "peak_bytes": max(peak.bytes - before, 0),
                        "peak_method": peak.method, "insert_us_per_token": 1e6 * insert_s / new.shape[1],
                        "threads": numba.get_num_threads(),
                    })  # fmt: skip
        return {"rows": rows}

    def summarise(self, tables: Tables) -> list[Row]:
        """Means over the layers by index and context length."""
        means = ("build_s", "bytes", "peak_bytes", "insert_us_per_token")
        return [
            {
                "index": name, "context": context, "keys": part[0]["keys"], "layers": len(part),
                "threads": part[0]["threads"],
                **{column: float(np.mean([row[column] for row in part])) for column in means},
            }
            for (name, context), part in _parts(tables["rows"]).items()
        ]  # fmt: skip

    def draw(self, figure: Figure, tables: Tables) -> None:
        """Build time, bytes and the peak of memory by context length, a layer's means."""
        axes = figure.subplots(1, 3)
        columns = (
            ("build_s", 1.0, "construction of a layer (s, log)"),
            ("bytes", 2.0**-20, "index of a layer (MiB, log)"),
            ("peak_bytes", 2.0**-20, "memory above that before\nthe construction (MiB, log)"),
        )
        parts = _parts(tables["rows"])
        for axis, (column, unit, label) in zip(axes, columns, strict=True):
            for place, name in enumerate(dict.fromkeys(name for name, _ in parts)):
                look = figures.style(place)
                points = [
                    (context, unit * float(np.mean([row[column] for row in part])))
                    for (index, context), part in parts.items() if index == name
                ]  # fmt: skip
                shown = [(x, y) for x, y in points if y > 0]  # an exact index holds nothing: no place on a log scale
                if shown:
                    axis.plot(*zip(*shown, strict=True), color=look.color, marker=look.marker, linestyle=look.dashes,
                              label=name)  # fmt: skip
            figures.logarithmic(axis, "x")
            figures.logarithmic(axis, "y")
            axis.set_xlabel("context (tokens, log)")
            axis.set_ylabel(label)
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8)


def _parts(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    parts: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        parts.setdefault((row["index"], row["context"]), []).append(row)
    return parts
