"""A target recall sets the effort of a search, on queries that trained no index."""

import numpy as np
import pytest
import torch
from test_fixed import PROMPTS
from tiny import small_options, tiny_model, tokens

import kvbench
from kvbench.contract.errors import KVBenchError
from kvbench.engine.generation import generate
from kvbench.indexes.tuning import effort_of, least_effort, recall_at
from kvbench.plugins import registry


def vectors(name, n=1500, seed=3, **options):
    generator = np.random.default_rng(seed)
    keys = generator.standard_normal((2, n, 16)).astype(np.float32)
    queries = generator.standard_normal((4, 200, 16)).astype(np.float32)
    cls = registry().find("index", name)
    index = cls(cls.Options(**options))
    index.build(keys, queries[:, 30:], heads=4)
    products = np.einsum("hqd,hnd->hqn", queries[:, :30], keys.repeat(2, axis=0))
    return index, queries[:, :30], np.argsort(-products, axis=2)[:, :, :20]


@pytest.mark.parametrize("name", ["ivf", "vamana"])
@pytest.mark.parametrize("target", [0.3, 0.8, 0.95])
def test_the_effort_found_reaches_the_recall_and_the_one_before_does_not(name, target):
    index, queries, best = vectors(name)
    effort = least_effort(index, queries, best, 20, target)
    found = recall_at(index, queries, best, 20, effort)
    assert found >= target
    less = max((effort_of(power) for power in range(60) if effort_of(power) < effort), default=0)
    # a graph's candidate list holds the 20 keys in any case
    assert effort <= (1 if name == "ivf" else 20) or recall_at(index, queries, best, 20, less) < target
    ids = index.search(queries, 20, effort=effort).ids
    expected = np.mean(
        [[len(set(a) & set(b)) / 20 for a, b in zip(*pair, strict=True)] for pair in zip(ids, best, strict=True)]
    )
    assert found == pytest.approx(expected)


def test_what_is_out_of_reach_gets_all_and_an_exact_index_needs_nothing():
    index, queries, best = vectors("ivfpq", refine=1)
    assert least_effort(index, queries, best, 20, 1.0) >= 1500
    flat, queries, best = vectors("flat")
    assert least_effort(flat, queries, best, 20, 0.9) is None


@torch.inference_mode()
@pytest.mark.parametrize("policy", ["ivf", "retrieval", "flat"])
def test_a_run_takes_each_layers_effort_from_its_prompt(policy):
    model, prompt = tiny_model(pad_token_id=None), tokens(1, 300, seed=1)[0].tolist()
    cls, found = registry().find("policy", policy), {}
    fast = {"ivf": {"nprobe": 1, "lists": 40}, "retrieval": {"ef": 1}}.get(policy, {})
    for recall in (None, 0.5, 1.0):
        options = cls.Options(**{**small_options(cls), **fast, "recall": recall})
        with kvbench.attach(model, policy=cls(options), budget=24, probes=["recall"]) as session:
            generate(session, prompt, max_new_tokens=12, decoding="eager")
            layers = [layer for cached in session.cache.governed for layer in cached.by_lane]
            found[recall] = session.probes[0].result(), [layer.state.get("effort") for layer in layers]
        if recall:
            with kvbench.attach(model, policy=cls(options), budget=24) as session:
                eager = generate(session, prompt, max_new_tokens=12, decoding="eager")
                assert generate(session, prompt, max_new_tokens=12, decoding="fixed").tokens == eager.tokens
    if policy == "flat":
        assert all(efforts == [None] * 3 for _, efforts in found.values())
        return
    assert found[None][1] == [None] * 3
    assert min(found[1.0][1]) >= max(1, min(found[0.5][1])) and sum(found[1.0][1]) > sum(found[0.5][1])
    assert found[1.0][0]["recall_at_k"] > 0.9
    assert found[1.0][0]["scanned_fraction"] > found[0.5][0]["scanned_fraction"]


def test_a_recall_is_a_share():
    with pytest.raises(KVBenchError, match="recall"):
        kvbench.attach(tiny_model(), policy="ivf", budget=24, options={"recall": 1.5})


def test_a_short_prompt_keeps_the_default_effort():
    cls = registry().find("policy", "ivf")
    with kvbench.attach(tiny_model(), policy=cls(cls.Options(sinks=1, window=2, recall=0.9)), budget=5) as session:
        generate(session, PROMPTS[0][:7], max_new_tokens=3, decoding="eager")
        assert session.cache.governed[0].by_lane[0].state.get("effort") is None
