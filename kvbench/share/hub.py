"""Finished runs on the Hugging Face Hub, by `huggingface_hub`: a data set of runs, and results in a model's card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvbench.contract.errors import KVBenchError, one_line, unwritable
from kvbench.runs.contents import UNHASHED, contents
from kvbench.share.finished import Finished

DATASET, MODEL_CARD = "dataset", "model-card"
_TAGS = ["kvbench", "kv-cache", "long-context", "benchmark"]


def write_dataset(runs: Sequence[Finished], output: Path) -> list[Path]:
    """Write a data set: its card, a table of runs, a table of examples, and the run folders, which can be verified."""
    from huggingface_hub import DatasetCardData  # noqa: PLC0415  slow to import

    data = DatasetCardData(
        pretty_name="KV-cache policies, measured by kvbench", tags=_TAGS, task_categories=["text-generation"],
        configs=[
            {"config_name": "runs", "data_files": "runs.jsonl", "default": True},
            {"config_name": "examples", "data_files": "examples.jsonl"},
        ],
    )  # fmt: skip
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# KV-cache policies, measured by kvbench\n\n{_table(runs)}\n"
        "`runs.jsonl` has a line for each run, `examples.jsonl` one for each answer. `runs/` holds the folders that "
        "kvbench wrote: `kvbench verify runs` computes every score again, `kvbench report runs` draws the figures.\n"
    )
    examples = [line for run in runs for line in _examples(run)]
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "README.md").write_text(text, "utf-8")
        (output / "runs.jsonl").write_text(_lines(map(_run, runs)), "utf-8")
        (output / "examples.jsonl").write_text(_lines(examples), "utf-8")
        for run in runs:
            for name in contents(run.path):
                if name == "run.json" or name not in UNHASHED:
                    target = output / "runs" / run.path.name / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(run.path / name, target, follow_symlinks=False)
    except OSError as error:
        raise KVBenchError(unwritable(output, error)) from None
    return [output / name for name in ("README.md", "runs.jsonl", "examples.jsonl", "runs")]


def write_model_card(runs: Sequence[Finished], output: Path) -> list[Path]:
    """Write a card of one model, README.md, with its results as metadata (`model-index`) and as a table."""
    from huggingface_hub import ModelCardData  # noqa: PLC0415  slow to import

    model = _one_model(runs)
    data = ModelCardData(model_name=model, tags=_TAGS, eval_results=_results(runs))
    text = f"---\n{data.to_yaml()}\n---\n\n# {model} under KV-cache policies\n\nMeasured by kvbench.\n\n{_table(runs)}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "README.md").write_text(text, "utf-8")
    except OSError as error:
        raise KVBenchError(unwritable(output, error)) from None
    return [output / "README.md"]


def check_push(repository: str) -> None:
    """Raise KVBenchError where nothing could be pushed: no name of a repository, no token, or no Hub to reach."""
    from huggingface_hub import HfApi, get_token  # noqa: PLC0415  slow to import

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise KVBenchError(f"--push {repository} is no repository's name: give OWNER/NAME.")
    if get_token() is None:
        raise KVBenchError("--push needs a token of the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN.")
    with _hub(repository):
        HfApi().whoami()


def push_folder(folder: Path, files: Sequence[Path], repository: str, *, private: bool) -> str:
    """Upload what was written below a folder to a data set, which is made where there is none; its address."""
    from huggingface_hub import HfApi  # noqa: PLC0415  slow to import

    patterns = [
        f"{file.relative_to(folder).as_posix()}{'/**' if file.is_dir() else ''}" for file in files
    ]  # fmt: skip
    with _hub(repository):
        hub = HfApi()
        made = hub.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository, repo_type="dataset", folder_path=folder, allow_patterns=patterns,
            commit_message="Runs of kvbench",
        )  # fmt: skip
    return str(made)


def push_model_card(runs: Sequence[Finished], repository: str) -> str:
    """Add results to the metadata of a model's card by a pull request there; gives its commit's address."""
    from huggingface_hub import metadata_update  # noqa: PLC0415  slow to import
    from huggingface_hub.repocard_data import eval_results_to_model_index  # noqa: PLC0415

    index = eval_results_to_model_index(_one_model(runs), _results(runs))
    with _hub(repository):
        return str(
            metadata_update(
                repository, {"model-index": index}, overwrite=True, create_pr=True,
                commit_message="Results under KV-cache policies, by kvbench",
            )
        )  # fmt: skip


@contextmanager
def _hub(repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises whatever it meets on its way
        reason = one_line(error)
        raise KVBenchError(
            f"The Hub did not take {repository} ({reason}): check the token's rights and the connection; what was "
            "written here is kept."
        ) from None


def _one_model(runs: Sequence[Finished]) -> str:
    models = list(dict.fromkeys(run.model for run in runs))
    if len(models) > 1:
        raise KVBenchError(f"A model's card holds results of one model, and these are of {', '.join(models)}.")
    return models[0]


def _results(runs: Sequence[Finished]) -> list[Any]:
    from huggingface_hub import EvalResult  # noqa: PLC0415  slow to import

    return [
        EvalResult(
            task_type="text-generation", task_name="Text generation", dataset_type=run.config.task,
            dataset_name=f"{run.config.task}, {run.config.context_length} tokens",
            dataset_args={"context_length": run.config.context_length, "examples": len(run.rows)},
            metric_type="accuracy",
            metric_name=f"accuracy, {run.setting}, seed {run.config.seed}",
            metric_value=run.document["metrics"]["accuracy"]["mean"],
        )
        for run in runs
    ]  # fmt: skip


def _table(runs: Sequence[Finished]) -> str:
    lines = ["| model | task | tokens | policy | accuracy | 95% interval | examples | TTFT, s | TPOT p50, ms |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for run in runs:
        m = run.document["metrics"]
        low, high = m["accuracy"]["ci95"]
        cells = [
            run.model, run.config.task, f"{run.config.context_length:,}", run.setting, _share(m["accuracy"]["mean"]),
            f"{_share(low)} to {_share(high)}", str(len(run.rows)), _number(m["ttft_s"].get("total")),
            _number(m["tpot_s"].get("p50"), 1000),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _run(run: Finished) -> dict[str, Any]:
    """A run as one line: what it was asked, and its metrics by dotted names."""
    config = run.config.model_dump(mode="json", exclude={"plugins", "policy_options", "task_options", "task_data"})
    return {
        "run": run.path.name, **dict(_flat(config)),
        "policy_options": json.dumps(run.config.policy_options), "task_options": json.dumps(run.config.task_options),
        "device_name": run.document["environment"].get("device_name"),
        **{f"metrics.{name}": value for name, value in _flat(run.document["metrics"])},
    }  # fmt: skip


def _flat(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", json.dumps(value) if isinstance(value, list) else value


def _examples(run: Finished) -> Iterator[dict[str, Any]]:
    for row in run.rows:
        yield {
            "run": run.path.name, "model": run.model, "policy": run.config.policy, "task": run.config.task,
            "context_length": run.config.context_length, "id": row["id"], "score": float(row["score"]),
            "prediction": row.get("prediction", ""), "references": row["references"],
            "prompt_tokens": row.get("prompt_tokens"), "generated_tokens": row.get("generated_tokens"),
        }  # fmt: skip


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _number(value: float | None, unit: float = 1) -> str:
    return "–" if value is None else f"{value * unit:.2f}"
