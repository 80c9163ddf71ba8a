"""Policies against slow, obvious float64 references of their papers, and the promises that all of them keep."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tokens

import kvbench
from kvbench.plugins import registry

SMALL = {"sinks": 2, "window": 8}
CHOOSING = {
    "streaming_llm": {}, "snapkv": {"window": 8}, "quest": {"page_size": 4}, "flat": SMALL, "retrieval": SMALL,
}  # fmt: skip
MODEL = tiny_model()


class Watch(kvbench.Probe):
    """Keeps, per step and layer, the queries, all keys, the static ids and the selected ids."""

    name, summary = "watch", "Watches."

    def __init__(self):
        super().__init__()
        self.keys, self.prompt_queries, self.steps = {}, {}, []

    def prefill(self, layer, queries, keys, values):
        self.keys[layer.index], self.prompt_queries[layer.index] = keys.clone(), queries.clone()
        return (yield)

    def insert(self, layer, keys, values):
        self.keys[layer.index] = torch.cat([self.keys[layer.index], keys], dim=2)
        return (yield)

    def select(self, layer, queries, budget):
        chosen = selection = yield
        if selection.everything:
            store = layer.store
            ids = torch.arange(store.aside_start, store.aside_stop).expand(layer.rows, layer.heads, -1)
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


@pytest.mark.parametrize("allocator", ["uniform", "pyramid"])
@pytest.mark.parametrize("policy", CHOOSING)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_static_and_selected_tokens_are_disjoint_and_within_budget(policy, allocator, data):
    length = data.draw(st.integers(30, 150), label="length")
    size = data.draw(st.integers(24, length), label="budget")
    batch = data.draw(st.integers(1, 2), label="batch")
    budget = kvbench.Budget(tokens=size, allocator=allocator)
    probe, _ = watch(policy, budget, tokens(batch, length, seed=length), steps=10, options=CHOOSING[policy])
    page = 4 if policy == "quest" else 0
    for layer, _, static, selection, share, now in probe.steps:
        generated = now - layer.prompt_tokens if policy == "snapkv" else 0
        for ids in attended(layer, static, selection):
            assert len(ids) == len(set(ids)), "a token is attended twice"
            assert max(ids) == now - 1, "the newest token is attended"
            if not share.covers_all:
                assert len(ids) <= share.tokens + generated
                assert len(ids) >= share.tokens - page
            else:
                assert len(ids) == now


def test_streaming_llm_attends_to_the_sinks_and_the_most_recent_tokens():
    probe, _ = watch("streaming_llm", 20, tokens(1, 60), options={"sinks": 3})
    for _, _, static, _, _, now in probe.steps:
        assert sorted(static.tolist()) == [0, 1, 2, *range(now - 17, now)]


def test_snapkv_keeps_the_tokens_of_its_formula():
    window, kernel, budget = 8, 5, 30
    probe, session = watch("snapkv", budget, tokens(2, 100), options={"window": window, "kernel": kernel})
    for layer in [cached.groups[0] for cached in session.cache.governed]:
        keys = probe.keys[layer.index][:, :, :100].double()
        queries = probe.prompt_queries[layer.index].double()[:, :, -window:]
        kept = layer.store.static_ids
        for row in range(2):
            for group in range(layer.kv_heads):
                votes = []
                for head in range(group * 3, group * 3 + 3):
                    weights = torch.zeros(100, dtype=torch.float64)
                    for i in range(window):
                        visible = 100 - window + i + 1
                        logits = keys[row, group, :visible] @ queries[row, head, i] * layer.scaling
                        weights[:visible] += logits.softmax(0)
                    weights = weights[: 100 - window]
                    padded = torch.nn.functional.pad(weights, (kernel // 2, kernel // 2))
                    votes.append(torch.stack([padded[t : t + kernel].mean() for t in range(100 - window)]))
                top = torch.stack(votes).mean(0).topk(budget - window).indices.tolist()
                expected = sorted(top) + list(range(100 - window, 100))
                assert kept[row, group, :budget].tolist() == expected


def test_quest_selects_the_pages_of_its_formula_in_every_step():
    size, budget = 4, 24
    probe, _ = watch("quest", budget, tokens(2, 90), steps=20, options={"page_size": size})
    for layer, queries, static, selection, _, now in probe.steps:
        keys = probe.keys[layer.index][:, :, :now].double()
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
    probe, _ = watch("flat", 30, tokens(2, 90), steps=20, options=SMALL)
    for layer, queries, static, selection, budget, now in probe.steps:
        keys = probe.keys[layer.index][:, :, :now].double()
        aside = sorted(set(range(now)) - set(static.tolist()))
        for row in range(2):
            for head in range(layer.heads):
                scores = keys[row, head // 3, aside] @ queries[row, head, 0].double()
                best = {aside[i] for i in scores.topk(budget.tokens - len(static)).indices.tolist()}
                assert set(selection.ids[row, head].tolist()) == best


@pytest.mark.parametrize("every", [0, 1, 5])
def test_retrieval_moves_tokens_out_of_the_window_as_its_option_says(every):
    _, session = watch("flat", 40, tokens(1, 90), steps=25, options={**SMALL, "insert_every": every})
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
