"""`kvbench.index`: vector indexes on captured queries and keys, or on a data set of vector search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kvbench.api.capture import captured
from kvbench.api.formats import mib, share
from kvbench.api.given import listed, numbers, whole
from kvbench.api.progress import Reporter, Told
from kvbench.api.run import plugins
from kvbench.api.table import Column, Table, flat, frame, html
from kvbench.contract.errors import KVBenchError, check_output

if TYPE_CHECKING:
    from kvbench.capture.files import Capture

_HEADINGS = (
    "effort", "recall", "95%", "scanned", "µs per\nquery", "µs\np50", "µs\np95", "QPS", "build\ns", "insert\ns", "MiB",
)  # fmt: skip


class StepReporter(Reporter, Protocol):
    """Is told how far a call is; a context, entered while it works."""

    def step(self, done: int, of: int, now: str) -> None:
        """`done` of `of` parts are finished, and this happens now."""

    def __enter__(self) -> Any:
        """Start to show it."""

    def __exit__(self, *error: object) -> None:
        """Stop to show it."""


@dataclass(frozen=True, repr=False, eq=False)
class IndexResults:
    """What `kvbench.index` gives: `rows` by index, effort, layer and head, and the `summary` by index.

    `content` is the command's `--json` document, without the folder.
    """

    content: Mapping[str, Any]
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each index, effort, layer and head."""
        return list(self.content["rows"])

    @property
    def summary(self) -> list[dict[str, Any]]:
        """One for each index, with its curve over the efforts."""
        return list(self.content["summary"])

    def document(self) -> dict[str, Any]:
        """The `--json` document of `kvbench index`."""
        return {**self.content, "folder": str(self.folder)}

    def table(self) -> Table:
        """A row for each index and effort: means over layers and heads."""
        from kvbench.analysis.index_results import title  # noqa: PLC0415

        rows, sections = [], set()
        for entry in self.summary:
            for place, point in enumerate(entry["curve"]):
                low, high = point["recall_ci95"] or (None, None)
                cells = [
                    "–" if point["effort"] is None else str(point["effort"]), f"{point['recall']:.3f}",
                    "–" if low is None else f"{low:.2f}–{high:.2f}", share(point["scanned"]),
                    *(f"{point[name]:.0f}" for name in ("us_per_query", "us_p50", "us_p95", "qps")),
                ]  # fmt: skip
                inserted = "–" if entry["insert_s"] is None else f"{entry['insert_s']:.3f}"
                of_index = [f"{entry['build_s']:.2f}", inserted, mib(entry["bytes"])]
                rows.append([entry["index"] if not place else "", *cells, *(["", "", ""] if place else of_index)])
            sections.add(len(rows) - 1)
        return Table(
            f"{title(self.content)}, recall@{self.content['config']['k']}",
            [Column("index", numeric=False), *map(Column, _HEADINGS)], rows, boxed=False, sections=frozenset(sections),
        )  # fmt: skip

    def notes(self) -> list[str]:
        """What belongs below the table: what was measured, and at what cost each index reaches recall 0.95."""
        rows, threads = self.rows, self.content["environment"]["build_threads"]
        keys, queries = rows[0]["n_keys"], rows[0]["n_queries"]
        if self.content["capture"] is None:
            first = (
                f"{keys} vectors, {queries} queries; searches on one thread, one query at a time; build on {threads}"
            )
            first += " threads. Percentiles are over queries and repeats."
        else:
            first = (
                f"{keys} keys, {queries} decoding queries that no index saw, of {_count(rows, 'layer')} × "
                f"{_count(rows, 'head')}; searches on one thread, one step of all heads at a time; build and insertion "
                f"of {self.content['capture']['decode_tokens']} keys on {threads} threads and bytes are per layer, for "
                "all heads at once. 95% intervals over layers and heads; percentiles over steps and repeats."
            )
        return [first, *(f"{_reached(entry)} {_whole(entry, threads)}" for entry in self.summary)]

    def to_pandas(self) -> Any:
        """A pandas.DataFrame of `rows`, options as columns `params_…`; KVBenchError where pandas is not installed."""
        return frame([flat(row) for row in self.rows])

    def _repr_html_(self) -> str:
        return html([self.table()], [*self.notes(), str(self.folder)])

    def __repr__(self) -> str:
        return "\n".join([str(self.table()), *self.notes(), str(self.folder)])

    def __str__(self) -> str:
        return str(self.table())


class _Shown:
    """The line that Python's callers see, if any."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self.warn, self.say = told.warn, told.say

    def step(self, done: int, of: int, now: str) -> None:
        self._told.show(f"[{done}/{of}] {now}")

    def __enter__(self) -> None:
        self._told.__enter__()

    def __exit__(self, *error: object) -> None:
        self._told.__exit__(None, None, None)


def index(
    indexes: str | Sequence[str],
    *,
    capture: str | Path | Capture | None = None,
    dataset: str | Path | None = None,
    learn: int = 0,
    k: int = 100,
    layers: str | Iterable[int] | None = None,
    heads: str | Iterable[int] | None = None,
    efforts: Iterable[int] | Mapping[str, Iterable[int]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    sinks: int = 4,
    window: int = 64,
    model: str = "smollm2-135m",
    text: str = "default",
    context_length: int = 4096,
    decode_tokens: int = 128,
    decoding: Literal["text", "greedy"] = "text",
    rope_scaling: str | None = None,
    prefill_chunk: int = 1024,
    store_dtype: str | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    output: str | Path = "kvbench-index",
    progress: bool | None = None,
) -> IndexResults:
    """Compare vector indexes on real queries and keys, as the command `kvbench index` does with the same options.

    On a capture (its folder, or what `kvbench.capture.files.load_capture` gave), on an HDF5 `dataset` in
    ann-benchmarks' layout, or on a capture that is made first. `efforts` are for all indexes, or by index; `options` by
    index. A call that was stopped goes on where it was. `progress` says on stderr how far it is (None: where a terminal
    or a notebook shows it). KVBenchError for input that cannot be: the command's own sentence.
    """
    return execute(
        indexes, _Shown(Told(progress)), capture=capture, dataset=dataset, learn=learn, k=k, layers=layers, heads=heads,
        efforts=efforts, options=options, sinks=sinks, window=window, model=model, text=text,
        context_length=context_length, decode_tokens=decode_tokens, decoding=decoding, rope_scaling=rope_scaling,
        prefill_chunk=prefill_chunk, store_dtype=store_dtype, seed=seed, device=device, dtype=dtype, output=output,
    )  # fmt: skip


def execute(
    indexes: str | Sequence[str], reporter: StepReporter, *, capture: str | Path | Capture | None,
    dataset: str | Path | None, learn: int, k: int, layers: str | Iterable[int] | None,
    heads: str | Iterable[int] | None, efforts: Iterable[int] | Mapping[str, Iterable[int]] | None,
    options: Mapping[str, Mapping[str, Any]] | None, sinks: int, window: int, model: str, text: str,
    context_length: int, decode_tokens: int, decoding: str, rope_scaling: str | None, prefill_chunk: int,
    store_dtype: str | None, seed: int, device: str | None, dtype: str | None, output: str | Path,
) -> IndexResults:  # fmt: skip
    """What `index` and the command share."""
    for name, value, least in (("-k", k, 1), ("--sinks", sinks, 0), ("--window", window, 0), ("--learn", learn, 0)):
        whole(name, value, least)
    folder = Path(output)
    found = plugins(reporter)
    chosen = tuple(listed(indexes))
    if not chosen:
        given = indexes if isinstance(indexes, str) else ",".join(indexes)
        raise KVBenchError(f"--indexes '{given}' names no index: `kvbench indexes` lists them.")
    check_output(folder)
    for name in chosen:
        found.find("index", name)
    if capture is not None and dataset is not None:
        raise KVBenchError("Both --capture and --dataset were given; a benchmark has one source: give one of them.")
    if learn and dataset is None:
        raise KVBenchError(f"--learn {learn} is for the queries of a --dataset: give one, or leave it out.")
    from kvbench.analysis import index_benchmark, index_results  # noqa: PLC0415
    from kvbench.analysis.index_parts import Parts  # noqa: PLC0415
    from kvbench.capture.datasets import Dataset, load_dataset  # noqa: PLC0415
    from kvbench.capture.files import Capture, load_capture  # noqa: PLC0415

    wanted = numbers("--layers", layers)
    config = index_benchmark.IndexBenchmark(
        chosen, k=k, layers=wanted, heads=numbers("--heads", heads), efforts=_efforts(efforts, chosen),
        options=dict(options or {}), sinks=sinks, window=window,
    )  # fmt: skip
    source: Capture | Dataset
    with reporter:
        if dataset is not None:
            source = load_dataset(dataset, learn=learn)
        elif isinstance(capture, Capture):
            source = capture
        elif capture is not None:
            source = load_capture(capture)
        else:
            source = captured(
                model, text, context_length, "all" if wanted is None else ",".join(map(str, wanted)),
                lambda name: folder / f"capture-{name}", decode_tokens=decode_tokens, decoding=decoding,
                rope_scaling=rope_scaling, prefill_chunk=prefill_chunk, store_dtype=store_dtype, seed=seed,
                device=device, dtype=dtype, progress=reporter.step,
            )  # fmt: skip
        place = folder / index_results.folder_name(source, config)
        parts = Parts(place)
        rows = index_benchmark.run(source, config, reporter.step, parts)
    content = index_results.document(source, config, rows)
    index_results.write(content, place)
    parts.remove()
    return IndexResults(content, place)


def _efforts(
    given: Iterable[int] | Mapping[str, Iterable[int]] | None, names: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    if given is None:
        return {}
    by_name = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)
    found = {}
    for name, efforts in by_name.items():
        values = numbers("--efforts", efforts)
        if not values:
            raise KVBenchError(f"--efforts {efforts} is not a list of whole numbers separated by commas.")
        found[name] = values
    return found


def _count(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    number = len({row[name] for row in rows})
    return f"{number} {name}{'s' if number > 1 else ''}"


def _reached(entry: Mapping[str, Any]) -> str:
    scanned = entry["scanned_at_recall_95"]
    if scanned is None:
        return f"{entry['index']}: recall 0.95 not reached."
    first = entry["first_point_above"]
    how = "its lowest measured effort" if first else "interpolated between measured points"
    most = "≤ " if first and entry["curve"][0]["effort"] is not None else ""
    time = entry["us_per_query_at_recall_95"]
    return (
        f"{entry['index']}: recall 0.95 at {most}{share(scanned)} scanned, {time:.0f} µs per query, {1e6 / time:.0f} "
        f"queries per second ({how})."
    )


def _whole(entry: Mapping[str, Any], threads: int) -> str:
    grown = entry["recall_grown"]
    text = "" if grown is None else f"Recall {grown:.3f} with half of the decoded keys inserted; "
    text += f"parallel efficiency {share(entry['parallel_efficiency'])} on {threads} threads"
    text = text[:1].upper() + text[1:]
    lost = entry["unreached"]
    return f"{text}, {share(lost)} of the keys out of any search's reach." if lost else f"{text}."
