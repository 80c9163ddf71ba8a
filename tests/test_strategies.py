"""Policies against slow, obvious float64 references of their papers, and the promises that all of them keep."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DATA_DEPENDENT, matrix_policies, shared_model, small_options, tokens

import kvbench
from kvbench.plugins import registry

MODEL = shared_model()


class Watch(kvbench.Probe):
    """Keeps, per step and layer, the queries, all keys, the static ids and the selected ids."""

    name, summary = "watch", "Watches."

    def __init__(self):
        super().__init__()
        self.keys, self.prompt_queries, self.steps = {}, {}, []

    def prefill(self, layer, queries, keys, values):
        self.keys[layer.ordinal], self.prompt_queries[layer.ordinal] = keys.clone(), queries.clone()
        return (yield)

    def insert(self, layer, keys, values):
        self.keys[layer.ordinal] = torch.cat([self.keys[layer.ordinal], keys], dim=2)
        return (yield)

    def select(self, layer, queries, budget):
        chosen = selection = yield
        if selection.everything:
            store = layer.store
            ids = torch.arange(store.aside_start, store.aside_stop).expand(layer.rows, layer.heads, -1)
            if selection.heads is not None:
                ids = ids.where(selection.heads.repeat_interleave(layer.heads // layer.kv_heads, dim=1)[..., None], -1)
            selection = dataclasses.replace(selection, ids=ids)
        self.steps.append((layer, queries, layer.store.static_ids.clone(), selection, budget, layer.tokens))
        return chosen


def watch(policy, budget, ids, steps=12, options=None, model=MODEL):
    probe = Watch()
    with kvbench.attach(model, policy=policy, budget=budget, options=options, probes=[probe]) as session:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False)
    return probe, session


def attended(layer, static, selection):
    """The token ids that each row and head attends to, as lists."""
    found = []
    for row in range(layer.rows):
        for head in range(layer.heads):
            group = head * layer.kv_heads // layer.heads
            mine = (static if static.dim() == 1 else static[row, group]).tolist()
            if selection.ids is not None:
                mine += selection.ids[row, head if selection.ids.shape[1] == layer.heads else group].tolist()
            found.append([token for token in mine if token >= 0])
    return found


@pytest.mark.parametrize("policy", matrix_policies())
@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_static_and_selected_tokens_are_disjoint_and_within_budget(policy, data):
    cls, options = registry().find("policy", policy), small_options(registry().find("policy", policy))
    least = sum(registry().make("policy", policy, options).static_tokens(30)) + 2
    length = data.draw(st.integers(max(30, least), 150), label="length")
    size = data.draw(st.integers(max(24, least), length), label="budget")
    batch = data.draw(st.integers(1, 2), label="batch")
    allocator = data.draw(st.sampled_from(["uniform", "pyramid"]), label="allocator")
    budget = kvbench.Budget(tokens=size, allocator=allocator)
    probe, session = watch(policy, budget, tokens(batch, length, seed=length), steps=10, options=options)
    page = max(options.get(name, 0) for name in ("page_size", "block_size", "chunk_size"))
    for layer, _, static, selection, share, now in probe.steps:
        generated = now - layer.prompt_tokens if cls.grows else 0
        found = attended(layer, static, selection)
        for ids in found:
            assert len(ids) == len(set(ids)), "a token is attended twice"
            assert max(ids) == now - 1, "the newest token is attended"
            if share.covers_all and not cls.across_layers:
                assert len(ids) == now
        if not share.covers_all and not cls.across_layers:
            for row in range(layer.rows):
                sizes = [len(ids) for ids in found[row * layer.heads : (row + 1) * layer.heads]]
                mean = sum(sizes) / len(sizes)
                declared = static.shape[-1] if cls.most_attended is not kvbench.KVCachePolicy.most_attended else 0
                assert mean <= max(share.tokens + generated, declared)  # generated tokens may stay
                assert policy in DATA_DEPENDENT or mean >= share.tokens - page
    for store in session.cache.stores():
        bytes_each = batch * 2 * 2 * 8 * 4  # keys and values, 2 heads, 8 channels, float32
        if store.aside_stop == store.aside_start:  # what is not attended was evicted, and its memory freed
            assert store.resident_bytes <= (store.static_tokens * 17 / 16 + 65) * bytes_each


@functools.cache
def first_layer(policy, budget):
    """What a policy attends to in the first layer, and its keys; of the oracle once for all policies of a size."""
    probe, ids = Watch(), tokens(1, 130, seed=5)
    options = {} if policy == "oracle_topk" else small_options(registry().find("policy", policy))
    with (
        kvbench.attach(MODEL, policy=policy, budget=budget, options=options, probes=[probe], prompt_tokens=110),
        torch.no_grad(),
    ):
        out = MODEL(ids[:, :110])
        MODEL(ids[:, 110:], past_key_values=out.past_key_values)
    return [step for step in probe.steps if step[0].ordinal == 0], probe.keys[0].double()


@pytest.mark.parametrize("policy", [name for name in matrix_policies() if name != "oracle_topk"])
def test_the_oracle_recovers_at_least_the_mass_of_every_policy_at_the_same_size(policy):
    """In the first layer, whose queries and keys are the same whatever the policy, on the same tokens."""
    steps, keys = first_layer(policy, 40)
    sizes = [
        len(tokens) for layer, _, static, selection, _, _ in steps for tokens in attended(layer, static, selection)
    ]
    best, _ = first_layer("oracle_topk", max(sizes))
    for (layer, queries, static, selection, _, now), (_, same, newest, top, _, _) in zip(steps, best, strict=True):
        assert torch.equal(queries, same)
        for head, (mine, its) in enumerate(
            zip(attended(layer, static, selection), attended(layer, newest, top), strict=True)
        ):
            weights = (keys[0, head // 3, :now] @ queries[0, head, 0].double() * layer.scaling).softmax(0)
            assert float(weights[mine].sum()) <= float(weights[its].sum()) + 1e-6


def test_quest_selects_the_pages_of_its_formula_in_every_step():
    size, budget = 4, 24
    probe, _ = watch("quest", budget, tokens(2, 90), steps=20, options={"page_size": size})
    for layer, queries, static, selection, _, now in probe.steps:
        keys = probe.keys[layer.ordinal][:, :, :now].double()
        pages = (now - 1) // size
        assert static.tolist() == list(range(pages * size, now)) or sorted(static.tolist()) == list(
            range(pages * size, now)
        )
        for row in range(2):
            for head in range(layer.heads):
                query = queries[row, head, 0].double()
                bounds = []
                for page in range(pages):
                    chunk = keys[row, head // 3, page * size : page * size + size]
                    bounds.append(torch.maximum(query * chunk.amin(0), query * chunk.amax(0)).sum())
                chosen = torch.stack(bounds).topk((budget - len(static)) // size).indices
                expected = {int(page) * size + offset for page in chosen for offset in range(size)}
                assert set(selection.ids[row, head].tolist()) == expected


def test_flat_selects_the_exact_top_of_the_offloaded_keys_in_every_step():
    probe, _ = watch("flat", 30, tokens(2, 90), steps=20, options={"sinks": 2, "window": 8})
    for layer, queries, static, selection, budget, now in probe.steps:
        keys = probe.keys[layer.ordinal][:, :, :now].double()
        aside = sorted(set(range(now)) - set(static.tolist()))
        for row in range(2):
            for head in range(layer.heads):
                scores = keys[row, head // 3, aside] @ queries[row, head, 0].double()
                best = {aside[i] for i in scores.topk(budget.tokens - len(static)).indices.tolist()}
                assert set(selection.ids[row, head].tolist()) == best


@pytest.mark.parametrize("every", [0, 1, 5])
def test_retrieval_moves_tokens_out_of_the_window_as_its_option_says(every):
    _, session = watch("flat", 40, tokens(1, 90), steps=25, options={"sinks": 2, "window": 8, "insert_every": every})
    store = session.cache.stores()[0]
    assert store.tokens == 90 + 24
    assert (store.aside_stop - store.aside_start) + store.static_tokens == store.tokens
    if every == 0:
        assert store.static_tokens == 10 + 24
    else:
        assert 10 <= store.static_tokens < 10 + every
    assert store.offloaded_bytes > 0


def test_every_policy_has_what_its_page_shows():
    for kind, classes in registry().classes.items():
        for name, cls in classes.items():
            assert cls.name == name
            assert cls.summary.endswith(".") or kind in ("index", "task")
            assert "\n" not in cls.summary
            for option in cls.Options.model_fields.values():
                assert option.description, (name, option)
