"""Times decoding steps on a GPU: policies beside exact attention, captured, each against the floor of its bytes.

`python tests/bench/gpu/decode.py --output decode.json` on a machine with a GPU. The model has Llama-3-8B's shape and
random weights, and the prompt's keys and values are random: good for time and memory, never for accuracy.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.contract.budget import Budget
from kvbench.engine.bandwidth import bandwidth
from kvbench.engine.prompt import Attends, Prefill, PrefilledLayer
from kvbench.engine.session import Session
from kvbench.plugins import registry

POLICIES = "full,streaming_llm,snapkv,h2o,tova,keydiff,knorm,expected_attention,quest"
WINDOW = 64
"""The prompt's last queries that are made up."""


def llama_shaped(layers: int) -> Any:
    """A model of Llama-3-8B's shape with random weights in bfloat16, with so many layers, on the GPU."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=2**20,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model


def made_up(model: Any, batch: int, tokens: int, whole: bool = False, unequal: bool = False) -> Prefill:
    """A prompt as if it had passed through the model; with `whole`, there are queries of all tokens.

    With `unequal`, the rows are `tokens` long and shorter, in equal steps, the last about half as long.
    """
    config, device = model.config, model.device
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    layers = {}
    for number, layer in enumerate(model.model.layers):
        keys, values = (torch.randn(shape, device=device, dtype=model.dtype) for _ in range(2))
        queries = torch.randn(
            batch, config.num_attention_heads, WINDOW, config.head_dim, device=device, dtype=model.dtype
        )
        if whole:  # the same queries for every token, which takes no memory
            queries = queries[:, :, :1].expand(-1, -1, tokens, -1)
        layers[number] = PrefilledLayer(
            keys, values, queries, Attends(layer.self_attn, config.num_attention_heads, config.head_dim**-0.5)
        )
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    logits = torch.zeros(batch, config.vocab_size, device=device)
    mask = None
    if unequal:
        padding = torch.arange(batch, device=device) * (tokens // (2 * batch))
        mask = (torch.arange(tokens, device=device) >= padding[:, None]).long()
    return Prefill(ids, mask, tokens, layers, {}, logits, 0.0)


def timed(decoder: Any, steps: int) -> dict[str, float]:
    """A decoder's steps by device events and by wall clock, the first few apart."""
    for _ in range(5):
        decoder.step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        decoder.step()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - began) / steps
    each = sorted(decoder.device_s()[-steps:])
    return {"p50_s": statistics.median(each), "p95_s": each[int(0.95 * len(each))], "wall_s": wall}


def profiled(decoder: Any, steps: int = 5) -> list[dict[str, Any]]:
    """The kernels of a step, most time first: milliseconds and launches a step."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            decoder.step()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda each: -each.self_device_time_total)
    return [
        {"name": each.key[:120], "ms": each.self_device_time_total / steps / 1e3, "launches": each.count / steps}
        for each in found
        if each.self_device_time_total
    ]


def eager(session: Session, model: Any, batch: int, steps: int) -> float:
    """The median step hook by hook, synchronised."""
    token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    found = []
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        model(token, past_key_values=session.cache, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])


@torch.inference_mode()
def measure(model: Any, prompt: Prefill, name: str, budget: int, steps: int, arguments: Any) -> dict[str, Any]:
    """One policy on one prompt."""
    kind, *chosen = name.split(":")
    policy = registry().make("policy", kind, dict(option.split("=", 1) for option in chosen))
    given = Budget(tokens=budget) if policy.takes_budget else None
    batch, tokens = prompt.ids.shape
    row: dict[str, Any] = {"policy": name, "batch": batch, "tokens": tokens, "budget": budget if given else None}
    if prompt.mask is not None:
        row["mean_tokens"] = tokens = int(prompt.mask.sum()) // batch
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with Session(model, policy, given) as session:
        session.resume(prompt)
        assert session.cache is not None
        row["construction_s"] = session.cache.index_s
        row["construction_peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        if arguments.eager:
            row["eager_s"] = eager(session, model, batch, 12)
            session.resume(prompt)
        began = time.perf_counter()
        decoder = session.fixed(torch.zeros(batch), steps + 16, graph=True, compiled=arguments.compile)
        if isinstance(decoder, str):
            return {**row, "mode": "eager", "reason": decoder}
        row |= {"mode": decoder.mode, "capture_s": time.perf_counter() - began}
        row |= timed(decoder, steps) | {f"read_{tier}": size for tier, size in decoder.reads(tokens).items()}
        row |= {f"{tier}_bytes": size for tier, size in decoder.bytes().items()}
        rate = decoder.hot_hit_rate()
        row |= {} if rate is None else {"hot_hit_rate": rate}
        if arguments.profile:
            row["kernels"] = profiled(decoder)
    return row


def main() -> None:
    """Measure every policy at every length and batch, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", default=POLICIES, help="names, with options behind colons: pqcache:hot=4096")
    parser.add_argument("--contexts", default="8192,32768,131072")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--most-tokens", type=int, default=300_000, help="of all rows together")
    parser.add_argument("--unequal", action="store_true", help="rows of a batch from half as long to as long")
    parser.add_argument("--compile", action="store_true", help="compile the model's own code, too")
    parser.add_argument("--eager", action="store_true", help="time the steps hook by hook, too")
    parser.add_argument("--profile", action="store_true", help="the kernels of a step and their times, too")
    parser.add_argument("--commit", help="where there is no checkout")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda")
    model = llama_shaped(arguments.layers)
    rate = bandwidth(device)
    assert rate is not None, "too little free memory on the GPU"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": arguments.commit or commit(),
        "layers": arguments.layers,
        "compiled": arguments.compile,
        "bandwidth": asdict(rate),
        "rows": [],
    }
    print(f"{found['device']}: {rate.device / 1e12:.2f} TB/s, host {rate.host / 1e9:.0f} GB/s", flush=True)
    print(f"{'tokens':>7} {'batch':>5} {'policy':20} {'step ms':>8} {'p95':>7} {'wall':>7} {'floor':>6} {'x':>5} "
          f"{'eager':>7} {'constr s':>8} {'capture':>7} {'GiB':>6}")  # fmt: skip
    for tokens in map(int, arguments.contexts.split(",")):
        for batch in map(int, arguments.batches.split(",")):
            if tokens * batch > arguments.most_tokens:
                continue
            prompt = made_up(model, batch, tokens, whole=True, unequal=arguments.unequal and batch > 1)
            for name in arguments.policies.split(","):
                try:
                    row = measure(model, prompt, name, arguments.budget, arguments.steps, arguments)
                except Exception as error:  # one policy must not lose the others
                    row = {
                        "policy": name,
                        "batch": batch,
                        "tokens": tokens,
                        "error": f"{type(error).__name__}: {error}",
                    }
                if "p50_s" in row:
                    row["floor_s"] = rate.floor_s({tier: row[f"read_{tier}"] for tier in ("weights", "device", "host")})
                    row["floor_ratio"] = row["p50_s"] / row["floor_s"]
                found["rows"].append(row)
                show(row)
                if arguments.output:
                    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
            del prompt


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    head = f"{row['tokens']:7} {row['batch']:5} {row['policy']:20} "
    if "p50_s" not in row:
        print(head + str(row.get("error") or row.get("reason"))[:200], flush=True)
        return
    ms = {key: 1e3 * row.get(key, float("nan")) for key in ("p50_s", "p95_s", "wall_s", "floor_s", "eager_s")}
    print(head + f"{ms['p50_s']:8.2f} {ms['p95_s']:7.2f} {ms['wall_s']:7.2f} {ms['floor_s']:6.2f} "
          f"{row['floor_ratio']:5.2f} {ms['eager_s']:7.1f} {row['construction_s']:8.2f} {row['capture_s']:7.1f} "
          f"{row['construction_peak_gib']:6.1f}", flush=True)  # fmt: skip
    for kernel in row.get("kernels", [])[:8]:
        print(f"    {kernel['ms']:8.3f} ms {kernel['launches']:6.0f} x {kernel['name'][:90]}", flush=True)


def commit() -> str:
    """The commit that is measured; unknown outside a checkout."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], check=False, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
