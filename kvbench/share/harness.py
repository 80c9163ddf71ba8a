"""Finished runs in the files of EleutherAI's lm-evaluation-harness 0.4: `results_*.json` and `samples_*.jsonl`.

What reads the harness's output folder reads these: its tables, its viewers, collections on the Hub. Runs of one model
and setting stand in one file of results, each task in a file of samples beside it.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbench.contract.errors import KVBenchError, unwritable
from kvbench.runs.redraw import Drawer, Drawn
from kvbench.share.finished import Finished

FILTER = "none"
"""The harness's name for answers as they were generated."""


def write_lm_eval(runs: Sequence[Finished], output: Path, *, prompts: bool = False) -> list[Path]:
    """Write runs below `output` in the harness's layout, and give the files.

    With `prompts` each sample holds its prompt, which the task makes again from its seed; without, it is empty.
    """
    drawer = Drawer() if prompts else None
    written = []
    for group in _groups(runs):
        first = group[0]
        date = max(run.ended for run in group).strftime("%Y-%m-%dT%H-%M-%S.%f")
        folder = output / _safe(f"{first.model}__{first.config.policy}-{first.config.context_length}-{_key(first)[:8]}")
        samples = {run.config.task: _samples(run, drawer) for run in group}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"results_{date}.json"
            file.write_text(
                json.dumps(_results(group, samples), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
            )
            written.append(file)
            for task, lines in samples.items():
                file = folder / f"samples_{_safe(task)}_{date}.jsonl"
                file.write_text(
                    "".join(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in lines), "utf-8"
                )
                written.append(file)
        except OSError as error:
            raise KVBenchError(unwritable(folder, error)) from None
    return written


def _groups(runs: Sequence[Finished]) -> list[list[Finished]]:
    """Runs that differ in their tasks alone, each task once."""
    groups: list[list[Finished]] = []
    for run in sorted(runs, key=lambda run: (run.config.task, run.path)):
        fitting = (
            group for group in groups
            if _key(group[0]) == _key(run) and run.config.task not in {other.config.task for other in group}
        )  # fmt: skip
        group = next(fitting, None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


def _key(run: Finished) -> str:
    """The same for runs that differ in their tasks alone."""
    fields = run.config.model_dump(mode="json", exclude={"task", "task_options", "task_data", "plugins"})
    policy = run.config.plugins.get("policy")
    return _sha256({**fields, "code": policy and policy.source})


def _results(group: Sequence[Finished], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    first, runs = group[0], {run.config.task: run for run in group}
    config = first.config
    counts = {task: {"original": len(run.rows), "effective": len(run.rows)} for task, run in runs.items()}
    return {
        "results": {task: _task_results(run) for task, run in runs.items()},
        "group_subtasks": {task: [] for task in runs},
        "configs": {task: _task_config(run) for task, run in runs.items()},
        "versions": {task: _version(run) for task, run in runs.items()},
        "n-shot": dict.fromkeys(runs, 0),
        "higher_is_better": {
            task: {name: True if name == "accuracy" else None for name in run.metrics} for task, run in runs.items()
        },
        "n-samples": counts,
        "config": {
            "model": "kvbench",
            "model_args": _model_args(first),
            "model_dtype": f"torch.{config.dtype}",
            "model_fingerprint": config.model_fingerprint,
            "policy": config.policy,
            "policy_options": config.policy_options,
            "budget": None if config.budget is None else config.budget.model_dump(mode="json"),
            "batch_size": str(config.batch_size),
            "device": config.device,
            "limit": None,
            "bootstrap_iters": 0,
            "gen_kwargs": None,
            "random_seed": config.seed,
        },
        "date": first.ended.timestamp(),
        "transformers_version": first.document["environment"].get("packages", {}).get("transformers", ""),
        "model_source": "kvbench",
        "model_name": first.model,
        "model_name_sanitized": _safe(first.model),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": False,
        "chat_template": None,
        "chat_template_sha": None,
        "task_hashes": {
            task: _hash("".join(one["doc_hash"] + one["prompt_hash"] + one["target_hash"] for one in lines))
            for task, lines in samples.items()
        },
        "total_evaluation_time_seconds": str(sum(_seconds(run) for run in group)),
        "kvbench": {
            task: {
                "folder": run.path.name,
                **{part: run.document[part] for part in ("config", "environment", "metrics")},
            }
            for task, run in runs.items()
        },
    }  # fmt: skip


def _task_results(run: Finished) -> dict[str, Any]:
    found: dict[str, Any] = {"name": run.config.task, "alias": run.config.task, "sample_len": len(run.rows)}
    for name in run.metrics:
        values = run.scores(name)
        found[f"{name},{FILTER}"] = statistics.fmean(values)
        found[f"{name}_stderr,{FILTER}"] = (
            statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else "N/A"
        )  # fmt: skip
    return found


def _task_config(run: Finished) -> dict[str, Any]:
    return {
        "task": run.config.task,
        "output_type": "generate_until" if run.generates else "loglikelihood",
        "num_fewshot": 0,
        "metric_list": [{"metric": name, "aggregation": "mean"} for name in run.metrics],
        "metadata": {
            "version": _version(run), "context_length": run.config.context_length, "question": run.config.question,
            "options": run.config.task_options, "data": run.config.task_data,
        },
    }  # fmt: skip


def _version(run: Finished) -> str:
    """The version and source of the task's code."""
    code = run.config.plugins.get("task")
    return "" if code is None else f"{code.version}+{code.source}"


def _model_args(run: Finished) -> str:
    """As `kvbench lm-eval --model kvbench` takes them."""
    config = run.config
    words = [f"pretrained={run.model}", f"policy={config.policy}"]
    if config.budget is not None:
        sizes = {name: getattr(config.budget, name) for name in ("tokens", "ratio", "bytes")}
        words += [f"budget={config.budget.allocator}", *(f"{k}={v}" for k, v in sizes.items() if v is not None)]
    words += [f"{name}={value}" for name, value in config.policy_options.items()]
    return ",".join([*words, f"dtype={config.dtype}", f"dense_layers={config.dense_layers}"])


def _samples(run: Finished, drawer: Drawer | None) -> list[dict[str, Any]]:
    drawn = {} if drawer is None else {one.id: one for one in drawer.draw(run.config)}
    return [_sample(run, number, row, drawn.get(row["id"])) for number, row in enumerate(run.rows)]


def _sample(run: Finished, number: int, row: Mapping[str, Any], drawn: Drawn | None) -> dict[str, Any]:
    doc = {"id": row["id"], "references": row["references"], **row.get("info", {})}
    prompt = "" if drawn is None else drawn.prompt
    arguments = {"do_sample": False, **({} if drawn is None else {"max_gen_toks": drawn.max_new_tokens})}
    answer = row.get("prediction", "")
    target = str(row["references"])
    return {
        "doc_id": number,
        "doc": doc,
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": arguments}},
        "resps": [[answer]],
        "filtered_resps": [answer],
        "filter": FILTER,
        "metrics": run.metrics,
        "doc_hash": _sha256(doc),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(target),
        **{name: row["score"] if name == "accuracy" else row["scores"][name] for name in run.metrics},
    }


def _seconds(run: Finished) -> float:
    return sum(float(row["prefill_s"] + row["index_s"] + sum(row["step_s"])) for row in run.rows)


def _safe(name: str) -> str:
    """A name as the harness makes a folder's of it."""
    return re.sub(r"[\"<>:/|\\?*\[\]]+", "__", name)


def _sha256(content: Any) -> str:
    """As the harness hashes a document."""
    return _hash(json.dumps(content, indent=2, ensure_ascii=False))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
