"""Writes valid runs without a model, as many as asked: `python tests/bench/synthetic_runs.py DIR --runs 300`."""

from __future__ import annotations

import argparse
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvbench.contract.budget import Budget
from kvbench.runs.config import RunConfig
from kvbench.runs.results import Run
from kvbench.runs.traces import write_trace

POLICIES = (
    "cagra", "duo_attention", "expected_attention", "flat", "h2o", "hnsw", "infinigen", "infllm", "ivf", "ivfpq",
    "keydiff", "kivi", "knorm", "kvzip", "magicpig", "oracle_topk", "oracle_topp", "pqcache", "quest", "random",
    "retrieval", "retroinfer", "robust_vamana", "shadowkv", "snapkv", "squeezed_attention", "streaming_llm", "think",
    "tova", "vamana",
)  # fmt: skip
TASKS = ("niah_single_1", "niah_multikey_1", "vt", "qa_1")
ENVIRONMENT = {
    "packages": {"kvbench": "0.2.0", "torch": "2.13.0"}, "device_name": "synthetic", "device": "cpu", "threads": 2,
}  # fmt: skip
RATIOS = (0.05, 0.1, 0.25)
TOKEN_BYTES = 46080


def configs(runs: int, examples: int) -> Iterator[RunConfig]:
    """Configurations, exact attention first in each setting, until there are enough."""
    made = 0
    for length in (4096, 8192, 16384, 32768, 65536):
        for task in TASKS:
            budgets = [("full", None), *((policy, ratio) for policy in POLICIES for ratio in RATIOS)]
            for policy, ratio in budgets:
                if made == runs:
                    return
                made += 1
                yield RunConfig(
                    model="smollm2-135m", model_fingerprint="synthetic", device="cpu", dtype="float32", policy=policy,
                    policy_options={}, budget=None if ratio is None else Budget(ratio=ratio), task=task,
                    task_options={}, task_data={}, context_length=length, examples=examples, seed=42,
                    question="aware", prefill_chunk=None, recall_k=100, probe_examples=1, probes=("latency",),
                )  # fmt: skip


def row(config: RunConfig, index: int) -> dict[str, Any]:
    """An example whose score grows with the budget, and more for some policies than for others."""
    ratio = config.budget.ratio if config.budget and config.budget.ratio else 1.0
    skill = 1.0 if ratio == 1 else 1 - 0.9 * (1 - ratio) ** 4 * POLICIES.index(config.policy) / len(POLICIES)
    draw = random.Random(f"{config.task} {config.context_length} {index}").random()
    name = f"{config.task}/{config.context_length}/{config.seed}/{index}"
    noise = random.Random(f"{config.policy} {name}")
    score = float(draw < skill) if config.task != "qa_1" else round(max(0.0, skill - 0.5 * draw), 3)
    held = config.context_length * TOKEN_BYTES
    selecting = config.policy in ("quest", "ivf", "hnsw", "retrieval", "flat", "pqcache", "infllm", "shadowkv")
    step = 0.02 + 0.1 * ratio * config.context_length / 32768 * noise.uniform(0.95, 1.1)
    return {
        "id": name, "score": score, "references": [str(7_000_000 + index)],
        "prediction": str(7_000_000 + index) if score else "I cannot find the number.",
        "prompt_tokens": config.context_length - 128, "generated_tokens": 16,
        "budget_tokens": None if ratio == 1 else int(ratio * config.context_length), "token_bytes": TOKEN_BYTES,
        "prefill_s": config.context_length / 4000, "index_s": 0.5 * selecting, "step_s": [step] * 16,
        "probed_step_s": [1.5 * step] * 16, "peak_memory_bytes": held * 3,
        "bytes": {
            "resident": held * ratio, "offloaded": held * (1 - ratio) * selecting, "index": held / 16 * selecting,
        },
        "info": {"depth": round(100 * draw, 2), "needle": f"One of the special magic numbers is: {7_000_000 + index}."},
        "probes": {
            "recall_at_k": min(1.0, skill), "recovered_mass": min(1.0, math.sqrt(skill)), "density": ratio,
            "scanned_fraction": 0.1, "retrieval_s": step / 4, "attention_s": step / 4, "insertion_s": step / 8,
        } if index == 0 else None,
    }  # fmt: skip


def write(root: Path, config: RunConfig) -> None:
    """One finished run with a trace of its probed example."""
    run = Run(root, config, ENVIRONMENT)
    with run.writing():
        for index in range(config.examples):
            made = row(config, index)
            if made["probes"]:
                recall = made["probes"]["recall_at_k"]
                positions, layers = range(config.context_length, config.context_length + 16), range(30)
                trace = {"recall_at_k": {(p, layer): [recall] * 9 for p in positions for layer in layers}}
                made["trace"] = "traces/000000.safetensors"
                write_trace(run.path / made["trace"], trace, example=made["id"], prompt_tokens=made["prompt_tokens"])
            run.append(made)


def main() -> None:
    """Write the runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--examples", type=int, default=100)
    asked = parser.parse_args()
    os.fsync = lambda _: None  # nothing here is worth the wait for a disk
    for config in configs(asked.runs, asked.examples):
        write(asked.folder, config)


if __name__ == "__main__":
    main()
