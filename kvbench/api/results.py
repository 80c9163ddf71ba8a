"""What `kvbench.run` and `kvbench.sweep` give: finished runs with their tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench.api.formats import mib, seconds, share
from kvbench.api.runs_table import MOST_COLUMNS, results_table
from kvbench.api.table import Column, Table, flat, frame, html
from kvbench.contract.errors import KVBenchError

_SETTINGS = ("model", "task", "context_length", "examples", "seed", "question", "device", "dtype")


@dataclass(frozen=True)
class RunResult:
    """One finished run: its configuration, what it was measured on, and its metrics (docs/metrics.md)."""

    policy: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Mapping[str, Any]
    folder: Path
    label: str
    """The policy with its budget and the options that are not the default ones."""
    _document: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> RunResult:
        """From an element of a `--json` document's `runs`."""
        from kvbench.compare.comparison import describe  # noqa: PLC0415  scipy takes seconds to import

        return cls(
            document["policy"], document["config"], document["environment"], document["metrics"],
            Path(document["folder"]), describe(document["config"]), document,
        )  # fmt: skip

    @property
    def accuracy(self) -> float:
        """Mean score over the examples, 0 to 1."""
        return float(self.metrics["accuracy"]["mean"])

    def examples(self) -> list[dict[str, Any]]:
        """The finished examples: prompts' ids, answers, references, scores and times of each."""
        from kvbench.runs.results import finished_rows  # noqa: PLC0415  --help stays quick

        return finished_rows(self.folder)

    def document(self) -> dict[str, Any]:
        """The run as one element of the `--json` document's `runs`."""
        return dict(self._document)

    def row(self) -> dict[str, Any]:
        """Settings and metrics as one flat row: `ttft_s_total`, `accuracy_mean`, `accuracy_low`, ..."""
        settings = {name: self.config[name] for name in _SETTINGS}
        named = {"policy": self.policy, "label": self.label, **settings, "budget": self.config["budget"]}
        return flat(named) | flat(self.metrics) | {"folder": str(self.folder)}


class _Runs(Sequence[RunResult]):
    """Finished runs in order."""

    runs: Sequence[RunResult]
    failures: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[RunResult]:
        return iter(self.runs)

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with a row for each run; KVBenchError where pandas is not installed."""
        return frame([run.row() for run in self.runs])

    def table(self) -> Table:
        """The table that the command prints."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.table())

    def _failed(self) -> list[str]:
        return [f"Failed: {name}: {reason}" for name, reason in self.failures.items()]


@dataclass(frozen=True, repr=False, eq=False)
class RunResults(_Runs):
    """What `kvbench.run` gives: the runs, by place or by policy, and those that failed.

    `failures` are the reasons by policy, `left_out` those of policies that `all` could not take; `title` and `metrics`
    are the table's.
    """

    runs: Sequence[RunResult]
    title: str
    asked: int
    failures: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    """The task's metrics with their labels."""
    main: str | None = None

    def __getitem__(self, key: Any) -> Any:
        """The run at a place, or of a policy."""
        if not isinstance(key, str):
            return self.runs[key]
        found = [run for run in self.runs if run.policy == key]
        if not found:
            why = self.failures.get(key) or self.left_out.get(key)
            there = ", ".join(run.policy for run in self.runs)
            raise KVBenchError(f"There is no run of policy '{key}': {why or f'there are {there}.'}")
        return found[0]

    def documents(self) -> list[dict[str, Any]]:
        """The runs as in the `--json` document."""
        return [run.document() for run in self.runs]

    def document(self) -> dict[str, Any]:
        """The `--json` document of `kvbench run`."""
        told = [{"policy": name, "error": reason} for name, reason in {**self.left_out, **self.failures}.items()]
        return {"schema": 1, "runs": self.documents(), "failures": told}

    def table(self) -> Table:
        """A column for each policy, or with many policies a row."""
        documents = self.documents()
        return results_table(documents, f"{self.title}, {_budget(documents)}", self.labels, self.main)

    def notes(self) -> list[str]:
        """What belongs below the table: how the runs were made."""
        lines = []
        for run in self.runs:
            if reason := run.metrics.get("mode_reason"):
                lines.append(f"{run.policy} decoded hook by hook: {reason}")
            if aware := run.metrics.get("query_aware"):
                lines.append(f"{run.policy} {aware}: its prefix was compressed without the question.")
        return [*lines, _provenance(self.documents())]

    def folders(self) -> list[str]:
        """The folder of each run, in a line."""
        return [f"{run.policy}: {run.folder}" for run in self.runs]

    def require(self) -> None:
        """Raise KVBenchError where a policy failed."""
        if len(self.failures) == 1 and not self.runs:
            raise KVBenchError(next(iter(self.failures.values())))
        if self.failures:
            raise KVBenchError(
                f"{len(self.failures)} of {self.asked} policies failed; the others are kept, and the same command "
                "tries these again."
            )

    def _repr_html_(self) -> str:
        told = [*(f"Left out {name}: {reason}" for name, reason in self.left_out.items()), *self.warnings]
        if not self.runs:
            return html([], (), [*told, *self._failed()])
        return html([self.table()], [*self.notes(), *self.folders()], [*told, *self._failed()])

    def __repr__(self) -> str:
        return "\n".join(
            [
                *([str(self.table()), *self.notes(), *self.folders()] if self.runs else []),
                *self.warnings,
                *self._failed(),
            ]
        )


@dataclass(frozen=True, repr=False, eq=False)
class SweepResults(_Runs):
    """What `kvbench.sweep` gives: the finished runs in the file's order, and the failures by run.

    After a dry run there are no runs, but the `planned` configurations.
    """

    runs: Sequence[RunResult]
    failures: Mapping[str, str] = field(default_factory=dict)
    """The reasons by run: policy, budget, model, task, length and seed in words."""
    failed: Sequence[Mapping[str, Any]] = ()
    """Configuration, folder and error of each failure, as in the `--json` document."""
    planned: Sequence[Mapping[str, Any]] = ()
    dry: bool = False

    def __getitem__(self, key: Any) -> Any:
        return self.runs[key]

    def document(self) -> dict[str, Any]:
        """The `--json` document of `kvbench sweep`."""
        if self.dry:
            return {"schema": 1, "planned": list(self.planned)}
        return {"schema": 1, "runs": [run.document() for run in self.runs], "failures": list(self.failed)}

    def table(self) -> Table:
        """A row for each run; after a dry run for each that is planned."""
        if self.dry:
            return Table(
                f"{len(self.planned)} runs of {self.planned[0]['examples']} examples; nothing was run.",
                [Column("run", numeric=False)], [[label_of(config)] for config in self.planned], boxed=False,
            )  # fmt: skip
        rows = []
        for run in self.runs:
            config, m = run.config, run.metrics
            rows.append([
                Path(config["model"]).name, config["task"], str(config["context_length"]), str(config["seed"]),
                run.label + (" (over budget)" if m.get("over_budget") else ""), share(m["accuracy"]["mean"]),
                " to ".join(share(end) for end in m["accuracy"]["ci95"]), share(m["recall_at_k"]), share(m["density"]),
                seconds(m["ttft_s"]["total"]), seconds(m["tpot_s"]["p50"], 1000),
            ])  # fmt: skip
        words = [Column(name, numeric=False) for name in ("model", "task", "tokens", "seed", "policy")]
        figures = [
            Column("accuracy"), Column("95% interval"), Column("recall@k"), Column("density"), Column("TTFT, s"),
            Column("TPOT p50, ms"),
        ]  # fmt: skip
        return Table(f"{len(self.runs)} runs", [*words, *figures], rows)

    def require(self) -> None:
        """Raise KVBenchError where a run failed."""
        if self.failures:
            raise KVBenchError(
                f"{len(self.failures)} of {len(self.failures) + len(self.runs)} runs failed; the others are kept, and "
                "the same command tries these again."
            )

    def _repr_html_(self) -> str:
        return html([self.table()] if self.runs or self.dry else [], (), self._failed())

    def __repr__(self) -> str:
        return "\n".join([*([str(self.table())] if self.runs or self.dry else []), *self._failed()])


def label_of(config: Mapping[str, Any]) -> str:
    """A run in words: policy, model, task, length and seed."""
    from kvbench.compare.comparison import describe  # noqa: PLC0415  scipy takes seconds to import

    of = f"{Path(config['model']).name}, {config['task']}, {config['context_length']} tokens, seed {config['seed']}"
    return f"{describe(dict(config))} on {of}"


def _budget(documents: Sequence[Mapping[str, Any]]) -> str:
    budgets = [document["budget"] for document in documents if document["budget"]]
    if not budgets:
        return "no budget"
    first = budgets[0]
    size = f"{first['tokens']} tokens" if first["tokens"] is not None else f"ratio {first['ratio']}"
    if first["bytes"] is not None:
        size = f"{mib(first['bytes'])} MiB"
    every = f", compressed every {first['compress_every']} tokens" if first.get("compress_every") else ""
    return f"budget {size}, {first['allocator']}{every}"


def _provenance(documents: Sequence[Mapping[str, Any]]) -> str:
    document = documents[0]
    config, environment, metrics = document["config"], document["environment"], document["metrics"]
    cut, unled = metrics.get("truncated_examples"), metrics.get("prefix_left_out_examples")
    return (
        f"{metrics['accuracy']['n']} examples"
        + (f" ({cut} with the middle of the context cut out)" if cut else "")
        + (f" ({unled} without the answer prefix, since the chat template opens a thinking block)" if unled else "")
        + f", seed {config['seed']}, question {config['question']}, "
        f"k = {config['recall_k']}, {metrics['probed_examples']} probed; {config['dtype']} on "
        f"{environment['device_name']}, {environment['threads']} threads{_stretched(document)}; "
        f"{_own_prompts(documents)}times, bytes and answers are of undisturbed generations{_overhead(documents)}"
    )


def _stretched(document: Mapping[str, Any]) -> str:
    """What the run states of its model and of sizes that memory decided."""
    config, environment, metrics = document["config"], document["environment"], document["metrics"]
    found = []
    if config["rope_scaling"]:
        found.append(f"rope scaling {config['rope_scaling']}")
    if config["weights"]:
        found.append(f"weights: {environment.get('weights') or config['weights']}")
    if spread := environment.get("device_map"):
        found.append("layers on " + ", ".join(f"{place}: {module}" for module, place in spread.items()))
    for name, text in (("batch", "batches of {}"), ("prefill_chunk", "prompts in chunks of {} tokens")):
        if config["batch_size" if name == "batch" else name] == "auto" and (sizes := metrics.get(name)):
            low, high = sizes["smallest"], sizes["largest"]
            found.append(text.format(low if low == high else f"{low} to {high}"))
    if short := metrics.get("out_of_memory"):
        found.append(f"memory ran out {short} time{'s' * (short > 1)} and less was tried")
    return "".join(f"; {text}" for text in found)


def _own_prompts(documents: Sequence[Mapping[str, Any]]) -> str:
    own = [d["policy"] for d in documents if d["config"]["prompt_attention"] == "policy"]
    return f"the prompt's attention of {', '.join(own)} is the policy's own; " if own else ""


def _overhead(documents: Sequence[Mapping[str, Any]]) -> str:
    shares = {d["policy"]: d["metrics"].get("probe_overhead") for d in documents}
    found = [f"{100 * share:+.0f}% ({policy})" for policy, share in shares.items() if share is not None]
    if len(found) > MOST_COLUMNS:
        known = [share for share in shares.values() if share is not None]
        found = [f"{100 * min(known):+.0f}% to {100 * max(known):+.0f}%"]
    return f"; probes change a step's time by {', '.join(found)}" if found else ""
