"""Time to first token with a saved prefix and without on a GPU: `prefix.py [PREFIX] [NEW] [POLICIES]`.

A random Llama of 8 layers as in `saved.py`; the new tokens pass through the policy as further turns do.
"""

import sys
import tempfile
import traceback
from pathlib import Path

import torch
from saved import made, now

import kvbench
from kvbench.engine.generation import generate
from kvbench.plugins import registry

PREFIX = int(sys.argv[1]) if len(sys.argv) > 1 else 32768
NEW = int(sys.argv[2]) if len(sys.argv) > 2 else 1024
POLICIES = (sys.argv[3] if len(sys.argv) > 3 else "full,quest,pqcache,retroinfer,snapkv,retrieval").split(",")


def one(model, policy, ids, folder):
    """A line of the table."""
    given = {"policy": policy}
    if registry().find("policy", policy).takes_budget:
        given["budget"] = 2048
    store = kvbench.PrefixStore(folder)
    with kvbench.attach(model, **given) as session:
        prefix = generate(session, ids[:PREFIX], max_new_tokens=0)
        start = now()
        saved = store.save(session)
        once = now() - start
        session.cache = None
    torch.cuda.empty_cache()
    whole = torch.tensor([ids], device=model.device)
    with kvbench.attach(model, **given) as session, torch.inference_mode():
        start = now()
        store.load(session, whole)
        load = now() - start
        start = now()
        model(whole[:, PREFIX:], past_key_values=session.cache, logits_to_keep=1)
        extend = now() - start
        session.cache = None
    torch.cuda.empty_cache()
    with kvbench.attach(model, **given) as session:
        miss = generate(session, ids, max_new_tokens=0)
    saved.path.unlink()
    print(
        f"{policy:14} {prefix.prefill_s:7.2f} {prefix.index_s:7.2f} {once:7.2f} {saved.bytes / 1e9:7.2f}  {load:7.2f} "
        f"{extend:8.2f} {load + extend:8.2f}  {miss.prefill_s:7.2f} {miss.index_s:7.2f} "
        f"{miss.prefill_s + miss.index_s:8.2f}",
        flush=True,
    )


def main():
    """The table."""
    model = made()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 1000, (PREFIX + NEW,), generator=generator).tolist()
    with kvbench.attach(model, policy="quest", budget=256) as session:
        generate(session, ids[:2048], max_new_tokens=0)
    print(f"{PREFIX} + {NEW}   prefill   index    save   GB     load   extend TTFT hit  prefill  index TTFT miss")
    with tempfile.TemporaryDirectory() as folder:
        for policy in POLICIES:
            try:
                one(model, policy, ids, Path(folder))
            except Exception:
                print(f"{policy:14} {traceback.format_exc().strip().splitlines()[-1][:160]}", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
