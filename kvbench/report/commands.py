"""The command lines that made what a report shows, rebuilt from the configurations."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbench.contract.errors import KVBenchError
from kvbench.plugins import registry
from kvbench.runs.defaults import PROBE_TOKENS
from kvbench.runs.results import RunConfig

FLAGS = {
    "model": "--model", "task": "--task", "context_length": "--context-length", "examples": "--examples",
    "seed": "--seed", "question": "--question", "prefill_chunk": "--prefill-chunk", "recall_k": "--recall-k",
    "probe_examples": "--probe-examples", "probe_tokens": "--probe-tokens",
    "batch_size": "--batch-size", "dense_layers": "--dense-layers",
    "decoding": "--decoding", "prefix": "--prefix", "new_tokens": "--new-tokens",
    "device": "--device", "dtype": "--dtype", "rope_scaling": "--rope-scaling", "device_map": "--device-map",
}  # fmt: skip
"""Options of `kvbench run`, by the field of the configuration that they set as it is."""


def run_command(config: Mapping[str, Any], output: Path | None = None, *, probes: Sequence[str] = ()) -> str:
    """The `kvbench run` line that makes a run of this configuration in `output`, with more `probes` where asked.

    Options that a plugin's defaults give anyway are left out where the plugin is installed.
    """
    words = ["kvbench", "run", "--policy", config["policy"]]
    words += _pairs("--option", "policy", config["policy"], config["policy_options"])
    budget = config["budget"]
    if budget is not None:
        words += ["--budget", budget["allocator"]]
        words += [word for size in ("tokens", "ratio", "bytes") if budget.get(size) is not None
                  for word in (f"--{size}", _text(budget[size]))]  # fmt: skip
        words += ["--compress-every", str(budget["compress_every"])] if budget.get("compress_every") else []
        words += _pairs("--budget-option", "budget", budget["allocator"], budget["options"])
    for key, flag in FLAGS.items():
        value = config[key]
        default = PROBE_TOKENS if key == "probe_tokens" else RunConfig.model_fields[key].default
        if value is not None and value != default:
            words += [flag] if value is True else [flag, _text(value)]
    if config["share_prefill"] != (config["batch_size"] == 1):
        words.append("--share-prefill" if config["share_prefill"] else "--no-share-prefill")
    words += _pairs("--task-option", "task", config["task"], config["task_options"])
    for probe in dict.fromkeys((*config["probes"], *probes)):
        words += ["--probe", probe]
    if config["policy"] != "full":
        words.append("--no-baseline")
    if output is not None:
        words += ["--output", str(output)]
    return shlex.join(words)


def analyze_command(name: str, source: Mapping[str, Any], options: Mapping[str, Any], output: Path) -> str:
    """The `kvbench analyze` line behind an analysis of a capture, of runs or of benchmarks."""
    words = ["kvbench", "analyze", name]
    for folder in source.get("runs", ()):
        words += ["--run", str(folder)]
    for file in source.get("benchmarks", ()):
        words += ["--benchmark", str(file)]
    if "runs" not in source:
        words += ["--capture", str(source.get("folder", "DIR"))]
        words += _pairs("--option", "analysis", name, options)
    return shlex.join([*words, "--output", str(output)])


def _pairs(flag: str, kind: str, name: str, options: Mapping[str, Any]) -> list[str]:
    try:
        defaults = registry().options(kind, name, {}).model_dump(mode="json")
    except (KVBenchError, KeyError):  # the plugin is not installed here, or has no defaults
        defaults = {}
    parts = {key: value for key, value in options.items() if isinstance(value, Mapping)}
    defaults |= {f"{part}.{key}": value for part in parts for key, value in (defaults.get(part) or {}).items()}
    options = {key: value for key, value in options.items() if key not in parts} | {
        f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()
    }
    return [
        word
        for key, value in options.items() if value is not None and defaults.get(key) != value
        for word in (flag, f"{key}={_text(value)}")
    ]  # fmt: skip


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)
