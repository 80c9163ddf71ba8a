"""Times the construction of policies' structures on a GPU beside the prefill they follow, its parts and its memory.

`python tests/bench/gpu/construct.py --output construct.json` on a machine with a GPU. The model has Llama-3-8B's shape
and random weights; the prompt's keys and values are random: good for time and memory, never for accuracy.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode import llama_shaped

from kvbench.contract.budget import Budget
from kvbench.engine.session import Session
from kvbench.plugins import registry

POLICIES = "streaming_llm,snapkv,h2o,quest,pqcache,retroinfer,squeezed_attention,shadowkv,infllm,retrieval,ivf"


def median_ms(work: Callable[[], Any], rounds: int = 3) -> float:
    """The median time of a call in milliseconds, after one that warms up."""
    found = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return 1e3 * sorted(found[1:])[rounds // 2]


def show(name: str, work: Callable[[], Any], rounds: int = 3) -> float | None:
    """Print a part's time; its error instead, so that one part does not lose the others."""
    try:
        found = median_ms(work, rounds)
    except Exception:
        print(f"{name:44} {traceback.format_exc().splitlines()[-1][:150]}", flush=True)
        return None
    print(f"{name:44} {found:9.2f} ms", flush=True)
    return found


def parts(tokens: int, heads: int, groups: int, dim: int) -> dict[str, float | None]:
    """Times of the kernels that construction is made of, for one layer."""
    from kvbench.indexes.kmeans import cluster_sums, kmeans, nearest
    from kvbench.kernels import column_sums, top_keys

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    keys, queries = randn(groups, tokens, dim), randn(heads, 4096, dim)
    halves = keys.float().view(groups, tokens, 2, dim // 2).transpose(1, 2).reshape(2 * groups, tokens, dim // 2)
    whole = keys.float()
    found = {
        "pqcache": show("k-means, 64 clusters, 10 rounds", lambda: kmeans(halves, 64, 10)),
        "ivf": show(
            "k-means, n / 64 clusters, 10 rounds", lambda: kmeans(whole, max(tokens // 64, 1), 10)
        ),
    }  # fmt: skip
    for clusters in (64, tokens // 64, tokens // 16):
        centroids = whole[:, :clusters].contiguous()
        assigned = nearest(whole, centroids)
        found[f"nearest, {clusters}"] = show(f"nearest of {clusters}", lambda c=centroids: nearest(whole, c))
        found[f"sums, {clusters}"] = show(
            f"sums of {clusters}", lambda a=assigned, c=clusters: cluster_sums(whole, a, c)
        )  # fmt: skip
    for way in ("fused", "unfused"):
        found[f"knn, {way}"] = show(
            f"nearest 128 keys of 4096 queries a head, {way}", lambda w=way: top_keys(queries, keys, 128, way=w)
        )  # fmt: skip
    few = queries.view(groups, -1, 4096, dim)[:, 0].contiguous()
    found["knn, one sample a group"] = show("the same, 4096 queries a group", lambda: top_keys(few, keys, 128))
    prompt = randn(1, heads, tokens, dim)
    found["h2o"] = show("column sums of attention", lambda: column_sums(prompt, keys[None], dim**-0.5), rounds=1)
    found["attention"] = show(
        "the attention itself (SDPA)",
        lambda: torch.nn.functional.scaled_dot_product_attention(
            prompt, keys[None], keys[None], is_causal=True, enable_gqa=True
        ),
        rounds=1,
    )
    return found


def graph_parts(tokens: int, groups: int, dim: int, queries: int = 4096) -> dict[str, float | None]:
    """Times of the steps that the graphs of `retrieval` and `cagra` are made in, for one layer."""
    from kvbench.contract.host import host_empty
    from kvbench.indexes import cagra
    from kvbench.indexes import device_graph as graphs
    from kvbench.indexes.roargraph import RoarGraph
    from kvbench.kernels.cooccur import candidates, lists_of
    from kvbench.kernels.detours import by_detours
    from kvbench.kernels.occlude import occlude
    from kvbench.kernels.top_keys import top_keys

    options = RoarGraph.Options()
    keys, asked = (torch.randn(groups, n, dim, device="cuda", dtype=torch.bfloat16) for n in (tokens, queries))
    knn = top_keys(asked, keys, options.neighbors)
    lists = lists_of(knn, tokens)
    ids, scores = candidates(lists, graphs.LISTS, graphs.CANDIDATES)
    unlisted = lists.frequency == 0
    most = torch.where(unlisted, -graphs.FEW, options.degree).int()
    links, lengths = occlude(keys, ids, scores, most, options.degree)
    graph = graphs.Graph(links, lengths, ids.new_zeros(groups, 1))
    packed, _ = graphs.packed(graph, 4)
    names: dict[str, Callable[[], Any]] = {
        "lists of each key": lambda: lists_of(knn, tokens),
        "candidates": lambda: candidates(lists, graphs.LISTS, graphs.CANDIDATES),
        "cells": lambda: graphs._cells(keys, graphs.CELL),
        "occlusion": lambda: occlude(keys, ids, scores, most, options.degree),
        "links back": lambda: graphs._link_back(graphs.Graph(*(x.clone() for x in graph)), unlisted),
        "repair": lambda: graphs._repair(graphs.Graph(*(x.clone() for x in graph)), options.eager),
        "packing": lambda: graphs.packed(graph, 4),
        "links to pinned memory": lambda: host_empty(packed.shape, torch.int32, packed.device).copy_(packed),
        "all of retrieval's graphs": lambda: graphs.build(
            keys, knn, degree=options.degree, eager=options.eager, entries=options.entries
        ),
    }  # fmt: skip
    found = {f"graph, {name}": show(f"retrieval: {name}", work, rounds=1) for name, work in names.items()}
    near = torch.randint(tokens, (groups, tokens, 64), device="cuda", dtype=torch.int32)
    chosen = by_detours(near, 32)
    found["cagra, detours"] = show("cagra: detours", lambda: by_detours(near, 32), rounds=1)
    found["cagra, links back"] = show(
        "cagra: links back", lambda: [cagra._with_links_back(graph, 32) for graph in chosen], rounds=1
    )
    found["cagra, neighbours"] = show("cagra: nearest others", lambda: cagra.nearest_others(keys, 64), rounds=1)
    return found


def read(model: Any, ids: torch.Tensor, chunk: int | None) -> Any:
    """The cache after a prompt, in one call or in chunks; the prompt's own tensors are free then."""
    past = None
    for first in range(0, ids.shape[1], chunk or ids.shape[1]):
        part = ids[:, first : first + (chunk or ids.shape[1])]
        past = model(part, past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
    return past


@torch.inference_mode()
def plain_peak(model: Any, tokens: int, chunk: int | None) -> int:
    """The most bytes that plain transformers holds while it reads a prompt."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    read(model, torch.randint(model.config.vocab_size, (1, tokens), device=model.device), chunk)
    return torch.cuda.max_memory_allocated()


@torch.inference_mode()
def construct(model: Any, name: str, tokens: int, chunk: int | None) -> dict[str, Any]:
    """Prefill and construction of one policy."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    policy = registry().make("policy", name)
    budget = Budget(tokens=2048) if policy.takes_budget else None
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)
    with Session(model, policy, budget, prompt_tokens=tokens) as session:
        torch.cuda.synchronize()
        began = time.perf_counter()
        read(model, ids, chunk)
        torch.cuda.synchronize()
        whole = time.perf_counter() - began
        assert session.cache is not None
        index = session.cache.index_s
        held = [group.store for layer in session.cache.governed for group in layer.by_lane]
        sizes = {
            "index": sum(store.index_bytes for store in held),
            "held": sum(store.resident_bytes + store.offloaded_bytes for store in held),
        }
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"policy": name, "tokens": tokens, "prefill_s": whole - index, "construction_s": index, "peak_gib": peak} | {
        f"{key}_bytes": size for key, size in sizes.items()
    }


def main() -> None:
    """Measure the parts and every policy, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--parts", action="store_true", help="time the kernels alone, too")
    parser.add_argument("--graph-parts", action="store_true", help="time the steps of building graphs alone, too")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "layers": arguments.layers, "rows": []}
    if arguments.parts:
        found["parts"] = parts(arguments.tokens, 32, 8, 128)
    if arguments.graph_parts:
        found["graph_parts"] = graph_parts(arguments.tokens, 8, 128)
    model = llama_shaped(arguments.layers)
    plain = plain_peak(model, arguments.tokens, arguments.chunk)
    found["plain_peak_gib"] = plain / 2**30
    heads = 2 * model.config.num_key_value_heads * model.config.head_dim
    layer = heads * arguments.tokens * torch.finfo(model.dtype).bits // 8
    print(f"plain transformers' peak: {plain / 2**30:.1f} GiB; one layer's keys and values: {layer / 2**30:.2f} GiB")
    print(f"{'policy':20} {'prefill s':>9} {'constr s':>9} {'ratio':>6} {'peak GiB':>9} {'+ layers':>8} {'index':>6}",
          flush=True)  # fmt: skip
    for name in ("streaming_llm", *arguments.policies.split(",")):  # the first pass warms up
        try:
            row = construct(model, name, arguments.tokens, arguments.chunk)
        except Exception as error:  # one policy must not lose the others
            print(f"{name:20} {type(error).__name__}: {str(error)[:120]}", flush=True)
            traceback.clear_frames(error.__traceback__)
            found["rows"].append({"policy": name, "error": f"{type(error).__name__}: {error}"})
            continue
        # beyond what plain transformers holds at most, what of the index lies on the device included
        row["layers_above_plain"] = (row["peak_gib"] * 2**30 - plain) / layer
        found["rows"].append(row)
        ratio = row["construction_s"] / row["prefill_s"]
        index = row["index_bytes"] / row["held_bytes"]
        print(f"{name:20} {row['prefill_s']:9.2f} {row['construction_s']:9.2f} {ratio:6.2f} {row['peak_gib']:9.1f} "
              f"{row['layers_above_plain']:8.2f} {index:6.3f}", flush=True)  # fmt: skip
        if arguments.output:
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
