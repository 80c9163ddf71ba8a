"""Times steps with a search on the CPU, between CUDA graphs: `python tests/bench/gpu/partial.py --policies ivf`.

Random keys in the 8B shape: good for time, never for accuracy. One layer's index is built and copied for the others,
since only the time of a step is asked for. Before that a tiny model proves that captured steps equal the hooks.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from decode import llama_shaped
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.contract.budget import Budget
from kvbench.engine.generation import generate_batch
from kvbench.engine.prompt import Attends, Prefill, PrefilledLayer
from kvbench.engine.session import Session
from kvbench.indexes.storage import KeyStore
from kvbench.plugins import registry


def check(policies: list[str]) -> None:
    """Captured steps against the hooks, on a tiny model of random weights."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in (61, 40, 61)]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, initializer_range=0.4, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().cuda()
    model.generation_config.eos_token_id = None
    for name in policies:
        for where in ("host", "device"):
            for batch in (prompts[:1], prompts):
                options = {"sinks": 2, "window": 8, "attention": where}
                policy = registry().make("policy", name, options)
                with Session(model, policy, Budget(tokens=24)) as session:
                    hooks = generate_batch(session, batch, max_new_tokens=[20] * len(batch), decoding="eager")
                    ours = generate_batch(session, batch, max_new_tokens=[20] * len(batch))
                same = [one.tokens for one in hooks] == [one.tokens for one in ours]
                print(f"check {name} {where} {len(batch)} rows: {ours[0].mode}, {'equal' if same else 'DIFFERENT'}")


def prompt_of(model: Any, tokens: int) -> Prefill:
    """The same random keys, values and queries in every layer."""
    config, device = model.config, model.device
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    keys, values = (torch.randn(shape, device=device, dtype=model.dtype) for _ in range(2))
    queries = torch.randn(1, config.num_attention_heads, tokens, config.head_dim, device=device, dtype=model.dtype)
    layers = {
        number: PrefilledLayer(
            keys, values, queries, Attends(layer.self_attn, config.num_attention_heads, config.head_dim**-0.5)
        )
        for number, layer in enumerate(model.model.layers)
    }
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    return Prefill(ids, None, tokens, layers, {}, torch.zeros(1, config.vocab_size, device=device), 0.0)


def copied(first: Any) -> Any:
    """The index with arrays of its own, so that what is inserted into one is in no other."""
    index = copy.copy(first)
    for name, value in vars(first).items():
        if isinstance(value, np.ndarray):
            setattr(index, name, value.copy())
        elif isinstance(value, list):
            setattr(index, name, [faiss.clone_index(one) if isinstance(one, faiss.Index) else one for one in value])
    return index


def building_once(policy: Any, known: dict[str, Any]) -> None:
    """Let the policy build its first index and copy it for the further layers."""
    build = policy.build

    def once(layer: Any, queries: Any, keys: Any, values: Any) -> None:
        if policy.name not in known:
            began = time.perf_counter()
            build(layer, queries, keys, values)
            known[policy.name] = copied(layer.state["index"])
            print(f"{policy.name}: a layer's index built in {time.perf_counter() - began:.1f} s", flush=True)
            return
        index = copied(known[policy.name])
        index.keys = KeyStore(layer.store.aside_keys.flatten(0, 1))
        layer.state["index"] = index
        layer.store.index_bytes = index.nbytes

    policy.build = once


@torch.inference_mode()
def measure(
    model: Any, prompt: Prefill, name: str, options: dict[str, Any], budget: int, steps: int, known: Any
) -> Any:
    """One policy's steps."""
    policy = registry().make("policy", name, options)
    building_once(policy, known)
    gc.collect()
    with Session(model, policy, Budget(tokens=budget)) as session:
        session.resume(prompt)
        began = time.perf_counter()
        decoder = session.fixed(torch.zeros(1), steps + 8, graph=True)
        assert not isinstance(decoder, str), decoder
        capture = time.perf_counter() - began
        seconds = []
        for _ in range(steps + 5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            decoder.step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        seconds = seconds[5:]
        parts = decoder.parts[5:]
        layers = len(model.model.layers)
        means = {
            part: 1e6 * statistics.mean(step.get(part, 0.0) for step in parts) / layers
            for part in ("search", "attention", "insertion", "wait")
        }
    row = {
        "policy": name, "options": options, "budget": budget, "mode": decoder.mode, "layers": layers,
        "tokens": prompt.ids.shape[1], "capture_s": capture, "mean_ms": 1e3 * statistics.mean(seconds),
        "p50_ms": 1e3 * statistics.median(seconds), "p95_ms": 1e3 * sorted(seconds)[int(0.95 * len(seconds))],
        "us_a_layer": means,
    }  # fmt: skip
    told = " ".join(f"{part} {value:.0f}" for part, value in means.items())
    a_layer = 1e3 * row["p50_ms"] / layers
    print(
        f"{name:10} {options.get('attention', ''):6} {budget:5} every {options['insert_every']} {row['mode']} mean "
        f"{row['mean_ms']:.2f} p50 {row['p50_ms']:.2f} p95 {row['p95_ms']:.2f} ms, "
        f"{a_layer:.0f} us a layer: {told} (capture {capture:.1f} s)", flush=True,
    )  # fmt: skip
    return row


def main() -> None:
    """Check, measure, print a line each and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", default="ivf,retrieval")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--budgets", default="740")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--attention", default="host,device")
    parser.add_argument("--insert-every", default="16", help="0 inserts nothing: what the insertion adds is the rest")
    parser.add_argument("--iterations", type=int, default=1, help="k-means rounds")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if not arguments.no_check:
        try:
            check(arguments.policies.split(","))
        except Exception as error:  # times are worth having all the same
            print(f"check failed: {type(error).__name__}: {error}"[:600], flush=True)
    model = llama_shaped(arguments.layers)
    prompt, rows, known = prompt_of(model, arguments.tokens), [], {}
    for name in arguments.policies.split(","):
        for budget in map(int, arguments.budgets.split(",")):
            for where, every in itertools.product(arguments.attention.split(","), arguments.insert_every.split(",")):
                options: dict[str, Any] = {"preset": "published", "attention": where, "insert_every": int(every)}
                if name in ("ivf", "ivfpq"):
                    options["iterations"] = arguments.iterations
                try:
                    rows.append(measure(model, prompt, name, options, budget, arguments.steps, known))
                except Exception as error:  # one policy must not lose the others
                    print(f"{name} {where} {budget} failed: {type(error).__name__}: {error}"[:400], flush=True)
                if arguments.output:
                    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
