"""Saves contexts of a tiny model, or goes on from them, in a process of its own: `save|resume FOLDER POLICY...`.

`save` writes each policy's state and, beside it, the logits of going on; `resume` goes on from the file and compares.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import shared_model, small_options, tokens

import kvbench
from kvbench.contract.errors import KVBenchError
from kvbench.engine.generation import step_inputs
from kvbench.plugins import registry


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
    """How a policy is attached for contexts of tens of tokens."""
    cls = registry().find("policy", policy)
    return {"policy": policy, "options": small_options(cls), **({"budget": 24} if cls.takes_budget else {})}


def save(folder, policy):
    """Save a policy's state after a prompt and three tokens, and what it goes on with."""
    model = shared_model()
    with kvbench.attach(model, **settings(policy)) as session:
        ids, mask = read(session, tokens(1, 60), None)
        session.save(folder / f"{policy}.state")
        logits, _ = go_on(model, session.cache, ids, mask, 8)
    save_file({"ids": ids, "logits": logits}, folder / f"{policy}.expected")


def resume(folder, policy):
    """Go on from a state; whether bit for bit as before."""
    model, expected = shared_model(), load_file(folder / f"{policy}.expected")
    with kvbench.resume(model, folder / f"{policy}.state") as session:
        logits, _ = go_on(model, session.cache, expected["ids"], None, 8)
    return torch.equal(logits, expected["logits"])


if __name__ == "__main__":
    what, folder, *policies = sys.argv[1:]
    told = {}
    for policy in policies:
        try:
            told[policy] = (save if what == "save" else resume)(Path(folder), policy)
        except KVBenchError as error:
            told[policy] = str(error)
    print(json.dumps(told))
