"""Time to first token with a saved prefix and without, of the embedded model: `prefix.py PREFIX NEW,NEW [POLICIES]`.

Seconds of processor time of one thread (OMP_NUM_THREADS=1), which others on the machine change little. Each exact pass
over a prompt is computed once and taken over by every policy, and its seconds count for each.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

import kvbench
from kvbench.engine.generation import generate
from kvbench.engine.prefill import prefill
from kvbench.models import load_model
from kvbench.plugins import registry
from kvbench.tasks.prompts import encode

PREFIX = int(sys.argv[1]) if len(sys.argv) > 1 else 8192
NEW = [int(text) for text in (sys.argv[2] if len(sys.argv) > 2 else "1024,4096").split(",")]
POLICIES = (sys.argv[3] if len(sys.argv) > 3 else "full,quest,retrieval,pqcache,retroinfer,snapkv").split(",")
BUDGET = PREFIX // 10


def attached(model, policy):
    """A session of the policy."""
    budget = max(BUDGET, 200) if registry().find("policy", policy).takes_budget else None
    return kvbench.attach(model, policy=policy, budget=budget)


def main():
    """The table, a line at a time."""
    longest = PREFIX + max(NEW)
    loaded = load_model("smollm2-135m", context_length=longest + 512, rope_scaling="yarn")
    task = registry().make("task", "shared_needles", {})
    example = next(iter(task.examples(loaded.tokenizer, context_length=longest + 512, count=1, seed=1)))
    ids = encode(loaded.tokenizer, example).input_ids[:longest]
    assert len(ids) == longest
    now, model = time.process_time, loaded.model
    with attached(model, "retrieval") as session:  # compiles
        generate(session, ids[: min(1024, longest)], max_new_tokens=0)
    hits, misses = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        start = now()
        exact = prefill(model, [ids[:PREFIX]], query_window=None)
        prefix_s = now() - start
        print(f"exact prefill of {PREFIX}: {prefix_s:.1f} s", flush=True)
        for policy in POLICIES:
            path = Path(folder) / "context.kv"
            with attached(model, policy) as session:
                start = now()
                generate(session, ids[:PREFIX], max_new_tokens=0, prefilled=exact)
                built = now() - start
                start = now()
                session.save(path)
                saved = now() - start
            for new in NEW:
                with attached(model, policy) as session, torch.inference_mode():
                    start = now()
                    session.load(path)
                    load = now() - start
                    start = now()
                    more = torch.tensor([ids[PREFIX : PREFIX + new]])
                    model(more, past_key_values=session.cache, logits_to_keep=1)
                    extend = now() - start
                hits[policy, new] = load + extend
                print(
                    f"{policy:12} construct {built:6.1f} save {saved:5.1f} ({path.stat().st_size / 2**20:.0f} MiB) "
                    f"load {load:5.1f} extend {new}: {extend:6.1f}", flush=True,
                )  # fmt: skip
    del exact
    for new in NEW:
        start = now()
        exact = prefill(model, [ids[: PREFIX + new]], query_window=None)
        whole_s = now() - start
        for policy in POLICIES:
            with attached(model, policy) as session:
                start = now()
                generate(session, ids[: PREFIX + new], max_new_tokens=0, prefilled=exact)
                misses[policy, new] = whole_s + now() - start
            hit, miss = hits[policy, new], misses[policy, new]
            print(
                f"{policy:12} {PREFIX} + {new}: hit {hit:6.1f} miss {miss:6.1f} hit/miss {hit / miss:5.2f}", flush=True
            )
        del exact


if __name__ == "__main__":
    main()
