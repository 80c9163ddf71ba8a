"""Measures the indexes on captures of two models and writes the tables of docs/indexes.md.

`python tests/bench/index_tables.py measure CAPTURE NAME` measures on a capture (`kvbench capture`) into
docs/measurements/indexes-NAME.json, and `wide CAPTURE NAME` at k of 100 to 2,000 into wide-NAME.json; `python
tests/bench/index_tables.py` then writes the page's tables, and `--check` only says whether that is needed. Times are
ratios of processor time, of searches on one thread in turns within one process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbench.analysis.index_benchmark import (
    IndexBenchmark,
    Vectors,
    exact_top_k,
    load_vectors,
    one_thread,
    recall_at_k,
    warm_up,
)
from kvbench.capture.files import load_capture
from kvbench.indexes.tuning import least_effort
from kvbench.plugins import registry
from kvbench.strategies.selecting.index_retrieval import HELD_OUT, held_out_recall

DOCS = Path(__file__).parents[2] / "docs"
PAGE, MEASUREMENTS = DOCS / "indexes.md", DOCS / "measurements"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
WIDE_BEGIN, WIDE_END = "<!-- wide: begin -->", "<!-- wide: end -->"
WIDE = {"flat": ("flat", {}), "roargraph": ("roargraph", {}), "roargraph, `sq8=true`": ("roargraph", {"sq8": True}),
        "ivf": ("ivf", {})}  # fmt: skip
WIDTHS = (100, 500, 2000)
INDEXES = ("roargraph", "cagra", "vamana", "robust_vamana", "hnsw", "ivf", "ivfpq", "sq8")
K, TARGET, ROUNDS, SINKS, WINDOW = 100, 0.95, 3, 4, 64
EVERY = 4
"""Of the decoding queries every fourth is searched for."""
HEADINGS = (
    "index", "default effort", "recall", "scanned", "0.95: effort", "scanned", "time", "auto: recall", "scanned",
    "recall, grown", "index / keys and values",
)  # fmt: skip
Ids = list[NDArray[np.int64]]


def exact(queries: Any, keys: Any, k: int = K) -> Ids:
    """The ids of the k nearest keys [G, n, d] of each head's queries [H, q, d]."""
    share = len(queries) // len(keys)
    return [exact_top_k(own, keys[head // share], k) for head, own in enumerate(queries)]


def found(index: Any, queries: Any, best: Ids, effort: int | None) -> tuple[float, float]:
    """Recall and scanned share."""
    result = index.search(queries, best[0].shape[1], effort=effort)
    recall = float(np.mean([recall_at_k(ids, true) for ids, true in zip(result.ids, best, strict=True)]))
    return recall, float(result.evaluations.mean() / index.keys.n)


def seconds(index: Any, queries: Any, effort: int | None, k: int = K) -> float:
    """Processor time of a search, one step at a time."""
    began = time.thread_time()
    for step in range(queries.shape[1]):
        index.search(np.ascontiguousarray(queries[:, step : step + 1]), k, effort=effort)
    return time.thread_time() - began


def measure_layer(vectors: Vectors) -> dict[str, dict[str, Any]]:
    """What each index does on one layer."""
    prompt, queries = vectors.training[:, :-HELD_OUT], np.ascontiguousarray(vectors.queries[:, ::EVERY])
    held_out = np.ascontiguousarray(vectors.training[:, -HELD_OUT:])
    best, held_best = exact(queries, vectors.keys), exact(held_out, vectors.keys)
    both = 2 * vectors.keys.size * 2  # bytes of keys and values in bfloat16
    indexes, rows = {}, {}
    for name in INDEXES:
        options = registry().options("index", name, {})
        warm_up(name, options, vectors.keys, vectors.training, K)
        index = indexes[name] = registry().find("index", name)(options)
        index.build(vectors.keys, prompt if index.uses_queries else None, heads=len(vectors.heads))
        default = int(getattr(index.options, index.search_parameter))
        row: dict[str, Any] = {"default": {"effort": default}, "bytes": index.nbytes / both}
        row["default"]["recall"], row["default"]["scanned"] = found(index, queries, best, default)
        tasks = (("target", queries, best, TARGET), ("auto", held_out, held_best, held_out_recall(TARGET)))
        for key, asked, true, recall in tasks:
            effort = least_effort(index, asked, np.stack(true), K, recall)
            row[key] = {"effort": effort}
            row[key]["recall"], row[key]["scanned"] = found(index, queries, best, effort)
        rows[name] = row
        print(name, json.dumps(row), flush=True)
    some = queries[:, ::4]
    times = [[seconds(indexes[name], some, rows[name]["target"]["effort"]) for name in INDEXES] for _ in range(ROUNDS)]
    ratios = np.median(np.array(times) / np.array(times)[:, :1], axis=0)
    half = vectors.queries.shape[1] // 2
    keys = np.concatenate([vectors.keys, vectors.new_keys[:, :half]], axis=1)
    later = np.ascontiguousarray(vectors.queries[:, half::EVERY])
    best = exact(later, keys)
    for (name, row), ratio in zip(rows.items(), ratios, strict=True):
        row["time"] = float(ratio)
        for first in range(0, half, 16):
            indexes[name].insert(vectors.new_keys[:, first : min(first + 16, half)])
        row["grown"] = found(indexes[name], later, best, None)[0]
    return rows


def measure_wide(vectors: Vectors) -> dict[str, dict[str, Any]]:
    """What finding more and more keys costs, at recall 0.95 of all of them, as a multiple of exact search."""
    queries, prompt = np.ascontiguousarray(vectors.queries[:, :: 2 * EVERY]), vectors.training
    indexes = {}
    for told, (name, given) in WIDE.items():
        options = registry().options("index", name, given)
        warm_up(name, options, vectors.keys, prompt, K)
        indexes[told] = registry().find("index", name)(options)
        indexes[told].build(vectors.keys, prompt if indexes[told].uses_queries else None, heads=len(vectors.heads))
    rows: dict[str, dict[str, Any]] = {}
    for k in (k for k in WIDTHS if 3 * k <= vectors.keys.shape[1]):
        best = exact(queries, vectors.keys, k)
        efforts = {told: least_effort(index, queries, np.stack(best), k, TARGET) for told, index in indexes.items()}
        times = [
            [seconds(index, queries, efforts[told], k) for told, index in indexes.items()] for _ in range(ROUNDS)
        ]  # fmt: skip
        ratios = np.median(np.array(times) / np.array(times)[:, :1], axis=0)
        for (told, index), ratio in zip(indexes.items(), ratios, strict=True):
            recall, scanned = found(index, queries, best, efforts[told])
            row = {"effort": efforts[told], "recall": recall, "scanned": scanned, "time": float(ratio)}
            rows.setdefault(told, {})[str(k)] = row
            print(told, k, json.dumps(row), flush=True)
    return rows


def measure(folder: Path, name: str, layers: list[int] | None, wide: bool) -> None:
    """Measure on a capture and write the JSON file."""
    capture = load_capture(folder)
    manifest = capture.manifest
    config = IndexBenchmark(INDEXES, k=K, sinks=SINKS, window=WINDOW)
    chosen, work = layers or list(capture.layers), measure_wide if wide else measure_layer
    with one_thread():
        rows = {
            str(number): work(load_vectors(capture.layer(number), config, manifest.heads, manifest.kv_heads))
            for number in chosen
        }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=DOCS, check=False
    )
    document = {
        "model": Path(manifest.config.model).name, "commit": commit.stdout.strip(), "text": manifest.config.text,
        "context_length": manifest.config.context_length, "keys": manifest.prompt_tokens - SINKS - WINDOW,
        "queries": manifest.config.decode_tokens // EVERY, "heads": manifest.heads, "kv_heads": manifest.kv_heads,
        "head_dim": manifest.head_dim, "k": K, "target": TARGET, "layers": rows,
    }  # fmt: skip
    (MEASUREMENTS / f"{'wide' if wide else 'indexes'}-{name}.json").write_text(
        json.dumps(document, indent=1) + "\n", "utf-8"
    )


def tables(files: list[Path]) -> str:
    """The tables of all files, as Markdown."""
    return "\n\n".join(table(json.loads(file.read_text("utf-8")), file.name) for file in files)


def table(document: dict[str, Any], name: str) -> str:
    """One file's table: means over the layers, and the least recall of a layer in parentheses."""
    layers = list(document["layers"].values())
    lines = [
        f"#### {document['model']}, {document['context_length']} tokens: [{name}](measurements/{name})",
        "",
        f"{document['heads']} query heads on {document['kv_heads']} key/value heads of {document['head_dim']} "
        f"dimensions, layers {', '.join(document['layers'])}; {document['keys']} keys, {document['queries']} decoding "
        f"queries a head; {document['text']}; commit {document['commit']}.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|---|{'--:|' * (len(HEADINGS) - 1)}",
    ]
    for index in layers[0]:
        rows = [layer[index] for layer in layers]

        def mean(part: str, key: str, rows: list[Any] = rows) -> float:
            return float(np.mean([row[part][key] for row in rows]))

        def recall(part: str, rows: list[Any] = rows) -> str:
            return f"{np.mean([r[part]['recall'] for r in rows]):.3f} ({min(r[part]['recall'] for r in rows):.3f})"

        efforts = [row["target"]["effort"] for row in rows]
        reached = min(row["target"]["recall"] for row in rows) >= document["target"]
        cells = [
            f"`{index}`", str(rows[0]["default"]["effort"]), recall("default"), f"{mean('default', 'scanned'):.1%}",
            _range(efforts) if reached else "–",
            f"{mean('target', 'scanned'):.1%}" if reached else "not reached",
            f"{np.mean([row['time'] for row in rows]):.2f}" if reached else "–", recall("auto"),
            f"{mean('auto', 'scanned'):.1%}", f"{np.mean([row['grown'] for row in rows]):.3f}",
            f"{np.mean([row['bytes'] for row in rows]):.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(efforts: list[int]) -> str:
    least, most = min(efforts), max(efforts)
    return "–" if not most else str(most) if least == most else f"{least}–{most}"


def wide_table(files: list[Path]) -> str:
    """The costs of finding more keys, of all files, as Markdown: means over the layers."""
    documents = [json.loads(file.read_text("utf-8")) for file in files]
    lines = ["| keys | index | k | effort | scanned | time / exact search |", "|---|---|--:|--:|--:|--:|"]
    for document, file in zip(documents, files, strict=True):
        layers = list(document["layers"].values())
        for index in layers[0]:
            for k in layers[0][index]:
                rows = [layer[index][k] for layer in layers]
                reached = min(row["recall"] for row in rows) >= document["target"]
                efforts = [row["effort"] or 0 for row in rows]
                cells = [
                    f"[{document['model']}, {document['keys']}](measurements/{file.name})",
                    f"`{index}`" if "`" not in index else index, k,
                    _range(efforts),
                    f"{np.mean([row['scanned'] for row in rows]):.0%}" if reached else "not reached",
                    f"{np.mean([row['time'] for row in rows]):.2f}" if reached else "–",
                ]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def between(page: str, begin: str, content: str, end: str) -> str:
    """The page with the content between two marks."""
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}"


def filled(page: str, folder: Path = MEASUREMENTS) -> str:
    """The page with the tables of a folder's files."""
    page = between(page, BEGIN, tables(sorted(folder.glob("indexes-*.json"))), END)
    return between(page, WIDE_BEGIN, wide_table(sorted(folder.glob("wide-*.json"))), WIDE_END)


def main() -> int:
    """Measure, or write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where the page is old")
    commands = parser.add_subparsers(dest="command")
    for name in ("measure", "wide"):
        measuring = commands.add_parser(name)
        measuring.add_argument("capture", type=Path)
        measuring.add_argument("name")
        measuring.add_argument("--layers", help="some of the captured layers, by commas")
    arguments = parser.parse_args()
    if arguments.command:
        layers = [int(number) for number in arguments.layers.split(",")] if arguments.layers else None
        measure(arguments.capture, arguments.name, layers, arguments.command == "wide")
        return 0
    page = PAGE.read_text("utf-8")
    new = filled(page)
    if not arguments.check:
        PAGE.write_text(new, "utf-8")
    elif new != page:
        print("docs/indexes.md is older than docs/measurements: run python tests/bench/index_tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
