"""A context that is saved and loaded goes on bit for bit as it would have without the detour, with every policy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_session import padded_batch
from tiny import shared_model, small_options, tiny_model, tokens

import kvbench
from kvbench.contract.errors import KVBenchError
from kvbench.engine.generation import step_inputs
from kvbench.plugins import registry

pytestmark = pytest.mark.transformers

POLICIES = sorted(registry().classes["policy"])
CACHED = [name for name in POLICIES if registry().find("policy", name).cached]


def go_on(model, cache, ids, mask, steps):
    """Greedy decoding hook by hook from a cache that holds all of `ids` but the last: logits and ids."""
    logits = []
    with torch.no_grad():
        for _ in range(steps):
            out = model(**step_inputs(model, ids, mask, cache))
            logits.append(out.logits[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(logits), ids


def read(session, ids, mask, steps=3):
    """Read a prompt and generate a few tokens, the last of which is yet to be read."""
    with torch.no_grad():
        out = session.model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    ids = torch.cat([ids, out.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    _, ids = go_on(session.model, session.cache, ids, mask, steps)
    return ids, None if mask is None else torch.cat([mask, mask.new_ones(len(mask), steps)], dim=1)


def settings(policy):
    cls = registry().find("policy", policy)
    return {"policy": policy, "options": small_options(cls), **({"budget": 24} if cls.takes_budget else {})}


def prompt_of(batch):
    return (tokens(1, 60), None) if batch == "one" else padded_batch()


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("policy", CACHED)
def test_a_loaded_context_goes_on_bit_for_bit(policy, batch, tmp_path):
    model = shared_model()
    with kvbench.attach(model, **settings(policy)) as session:
        ids, mask = read(session, *prompt_of(batch), steps=3 if batch == "one" else 25)
        session.save(tmp_path / "state")
        held = session.cache.bytes()
        expected, whole = go_on(model, session.cache, ids, mask, 20)
    with kvbench.attach(model, **settings(policy)) as session:
        cache = session.load(tmp_path / "state")
        assert torch.equal(session.ids, ids[:, :-1])
        assert mask is None or torch.equal(session.mask, mask[:, :-1])
        assert cache.bytes() == held
        ours, again = go_on(model, cache, ids, mask, 20)
        assert torch.equal(ours, expected)
        assert torch.equal(again, whole)
    with kvbench.resume(model, tmp_path / "state") as session:
        assert torch.equal(go_on(model, session.cache, ids, mask, 2)[0], expected[:2])


# Policies and budgets whose state takes other ways: ragged heads, budgets of each row, storages of others.
OTHERS = {
    "ragged": {"policy": "snapkv", "options": {"window": 8}, "budget": kvbench.Budget(tokens=24, allocator="ada")},
    "ragged and evicting": {"policy": "h2o", "budget": kvbench.Budget(tokens=24, allocator="ada")},
    "ragged selections": {
        "policy": "retrieval",
        "options": {"sinks": 2, "window": 8},
        "budget": kvbench.Budget(tokens=24, allocator="ada"),
    },
    "measured": {"policy": "streaming_llm", "budget": kvbench.Budget(tokens=24, allocator="squeeze")},
    "composed": {"policy": "quest+kivi", "options": {"page_size": 4, "kivi.group": 8, "residual": 8}, "budget": 24},
    "dense": {"policy": "infinigen", "budget": 24, "dense_layers": 1},
    "kivi with few late tokens": {"policy": "kivi", "options": {"group": 8, "residual": 8}},
}


@pytest.mark.parametrize("name", OTHERS)
def test_so_do_ragged_heads_rows_of_their_own_and_compositions(name, tmp_path):
    model, given = shared_model(), dict(OTHERS[name])
    with kvbench.attach(model, **given) as session:
        ids, mask = read(session, *padded_batch())
        session.save(tmp_path / "state")
        expected, _ = go_on(model, session.cache, ids, mask, 20)
    with kvbench.resume(model, tmp_path / "state") as session:
        assert torch.equal(go_on(model, session.cache, ids, mask, 20)[0], expected)
