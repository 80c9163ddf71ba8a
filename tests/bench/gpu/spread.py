"""Runs every policy on a 70B-shaped random model spread over GPUs: memory and steps, and the answers of one GPU.

`python tests/bench/gpu/spread.py --layers 8 --output spread.json` on a machine with two GPUs or more. Llama-3-70B's
shape: hidden 8,192, 64 query and 8 key/value heads of dimension 128. Every device gets `layers` / devices layers; where
the model fits one GPU, the logits are compared with those of one. Weights are random: good for time, memory and
equality, never for accuracy.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from pathlib import Path
from typing import Any

import accelerate
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvbench
from kvbench.engine.generation import force
from kvbench.models.places import placed
from kvbench.plugins import registry
from kvbench.runs.commit import commit

SHAPE: dict[str, Any] = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 128256,
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 97,
}  # fmt: skip


def shaped(layers: int, shape: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A random model of a shape with so many layers on a device; the same weights each time."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(
                LlamaConfig(**shape, num_hidden_layers=layers, max_position_embeddings=2**20, initializer_range=0.05)
            ).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model


def by_layer(layers: int, devices: list[Any]) -> dict[str, Any]:
    """Modules of a Llama by device: as many layers on each, the embedding on the first and the head on the last."""
    share = -(-layers // len(devices))
    places = {f"model.layers.{number}": devices[number // share] for number in range(layers)}
    return {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0], **places, "model.norm": devices[-1],
            "lm_head": devices[-1]}  # fmt: skip


def measure(model: Any, policy: str, ids: list[int], tokens: int, budget: int) -> tuple[dict[str, Any], torch.Tensor]:
    """A policy's forced steps on a model: what it took and held, and the logits [m, V]."""
    kind = registry().find("policy", policy)
    gpus = range(torch.cuda.device_count())
    gc.collect()
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    given = kvbench.Budget(tokens=budget) if kind.takes_budget else None
    with kvbench.attach(model, policy=policy, budget=given) as session:
        made = force(session, ids, prompt_tokens=tokens)
        held = {} if session.cache is None else session.cache.device_bytes()
        sizes = made.bytes
    row = {
        "policy": policy, "prefill_s": made.prefill_s, "index_s": made.index_s,
        "tpot_s": statistics.median(made.step_s[1:]), "bytes": sizes, "device_bytes": held,
        "device_peak_bytes": {str(gpu): torch.cuda.max_memory_allocated(gpu) for gpu in gpus},
    }  # fmt: skip
    return row, made.logits.float().cpu()


def main() -> None:
    """Measure every policy on the spread model, and on one device where the model fits it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--policies", default="", help="names separated by commas; all that keep a cache by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script, on the CPU too")
    parser.add_argument("--spread-only", action="store_true", help="the model does not fit one GPU")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    count = torch.cuda.device_count()
    devices: list[Any] = list(range(count)) or ["cpu"]
    first = "cuda:0" if count else "cpu"
    shape, dtype = (TINY, torch.float32) if arguments.tiny else (SHAPE, torch.bfloat16)
    names = [name for name in arguments.policies.split(",") if name]
    names = names or sorted(name for name, policy in registry().classes["policy"].items() if policy.cached)
    generator = torch.Generator().manual_seed(1)
    size = arguments.context + arguments.steps + 1
    ids = torch.randint(3, shape["vocab_size"], (size,), generator=generator).tolist()
    found: dict[str, Any] = {"devices": [torch.cuda.get_device_name(gpu) for gpu in range(count)], "commit": commit(),
                             "layers": arguments.layers, "context": arguments.context, "rows": []}  # fmt: skip
    alone: dict[str, torch.Tensor] = {}

    def each(model: Any, told: str) -> None:
        for name in names:
            try:
                row, logits = measure(model, name, ids, arguments.context, arguments.budget)
            except Exception as error:  # one policy must not lose the others
                row, logits = {"policy": name, "error": f"{type(error).__name__}: {error}"[:300]}, None
            if logits is not None and told == "one":
                alone[name] = logits
            if logits is not None and name in alone and told == "spread":
                row["largest_difference"] = float((logits - alone[name]).abs().max() / alone[name].abs().max())
                row["same_tokens"] = float((logits.argmax(-1) == alone[name].argmax(-1)).float().mean())
            row["on"] = told
            found["rows"].append(row)
            print(json.dumps(row), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(found, indent=1) + "\n")

    with torch.inference_mode():
        if not arguments.spread_only:
            model = shaped(arguments.layers, shape, first, dtype)
            each(model, "one")
            model.to("cpu")
            if count:
                torch.cuda.empty_cache()
        else:
            model = shaped(arguments.layers, shape, "cpu", dtype)
        if count > 1:
            model = accelerate.dispatch_model(model, by_layer(arguments.layers, devices))
            found["device_map"] = placed(model)
            each(model, "spread")


if __name__ == "__main__":
    main()
