"""New tokens of one call are inserted and answered in blocks, as one by one."""

import pytest
import torch
from tiny import shared_model, tokens

import kvbench

pytestmark = pytest.mark.transformers

SETTINGS = {
    "quest": {"options": {"page_size": 8}, "budget": 40},
    "quest+kivi": {"options": {"page_size": 32}, "budget": 96},
    "flat": {"options": {"sinks": 2, "window": 8, "insert_every": 12}, "budget": 40},
    "ivf": {"options": {"sinks": 2, "window": 8, "insert_every": 7, "nprobe": 1000}, "budget": 40},
    "pqcache": {"options": {"sinks": 2, "window": 8}, "budget": 40},
    "retroinfer": {"options": {"sinks": 2, "window": 8, "cluster_size": 4, "update_every": 10}, "budget": 60},
}


class Counting(kvbench.Probe):
    """Counts insertions and the tokens in each."""

    name, summary = "counting", "Counts."
    blocks = True

    def __init__(self, options=None):
        super().__init__(options)
        self.sizes = []

    def insert(self, layer, keys, values):
        if layer.ordinal == 0:
            self.sizes.append(keys.shape[2])
        yield


@pytest.mark.parametrize(("policy", "budget"), [*((name, None) for name in SETTINGS), ("flat", 100), ("quest", 100)])
def test_a_block_of_new_tokens_is_what_they_are_one_by_one(policy, budget):
    """Budget 100 covers the prompt and is left no choice."""
    prompt, new = 100, 40
    model, ids, given = shared_model(), tokens(2, prompt + new), dict(SETTINGS[policy])
    given["budget"] = budget or given["budget"]
    found = []
    for at_once in (new, 1):
        counting = Counting()
        with kvbench.attach(model, policy=policy, probes=[counting], **given) as session, torch.no_grad():
            model(ids[:, :prompt])
            logits = [
                model(ids[:, first : first + at_once], past_key_values=session.cache).logits
                for first in range(prompt, prompt + new, at_once)
            ]
            stores = [(store.aside_start, store.aside_stop, store.tokens) for store in session.cache.stores()]
            found.append((torch.cat(logits, dim=1), stores, session.cache.bytes(), counting.sizes))
    (ours, stores, held, sizes), (alone, alone_stores, alone_held, ones) = found
    assert stores == alone_stores
    assert held["index"] == alone_held["index"]
    assert sum(sizes) == sum(ones) == new
    assert len(sizes) < 15 < len(ones) == new
    assert torch.allclose(ours, alone, atol=2e-4), (ours - alone).abs().max()
