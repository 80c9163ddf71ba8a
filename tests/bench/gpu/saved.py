"""Contexts saved and gone on from on a GPU: bit for bit, in graphs too, and the seconds that it takes.

`python tests/bench/gpu/saved.py [TOKENS]` makes a random Llama of 8 layers (4,096 wide, grouped queries) in bfloat16.
"""

import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvbench
from kvbench.plugins import registry

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 32768
POLICIES = [
    "full", "quest", "flat", "ivf", "pqcache", "retroinfer", "infllm", "shadowkv", "magicpig", "snapkv", "h2o", "kivi",
    "think", "duo_attention",
]  # fmt: skip


def now():
    """Seconds, once the device is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def made():
    """The model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=4096, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, pad_token_id=None, initializer_range=0.03,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


def steps(model, cache, token, count):
    """Logits of greedy steps, hook by hook."""
    found = []
    with torch.inference_mode():
        for _ in range(count):
            found.append(model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1])
            token = found[-1].argmax(-1, keepdim=True)
    return torch.stack(found)


def one(model, policy, ids, path):
    """A line of the table."""
    budget = 2048 if registry().find("policy", policy).takes_budget else None
    with kvbench.attach(model, policy=policy, budget=budget) as session:
        start = now()
        with torch.inference_mode():
            token = model(ids, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        read, held = now() - start, sum(session.cache.bytes().values())
        start = now()
        session.save(path)
        saved = now() - start
        expected = steps(model, session.cache, token, 24)
        session.cache = None
    torch.cuda.empty_cache()
    with kvbench.resume(model, path) as session:
        start = now()
        session.load(path)
        loaded = now() - start
        same = torch.equal(steps(model, session.cache, token, 24), expected)
        session.load(path)
        with torch.inference_mode():
            decoder = session.fixed(token[:, 0], 23, graph=True)
            if isinstance(decoder, str):
                graph = decoder[:40]
            else:
                tokens = []
                for _ in range(23):
                    decoder.step()
                    tokens.append(int(decoder.tokens[0, 0]))
                wanted = expected.argmax(-1)[:23, 0].tolist()
                graph = f"{sum(a == b for a, b in zip(tokens, wanted, strict=True))} of 23 tokens"
        session._end_fixed()
    size = path.stat().st_size
    print(f"{policy:14} {read:7.2f} {held / 1e9:7.2f} {size / 1e9:7.2f} {saved:7.2f} {loaded:7.2f}  {same!s:6} {graph}")


def main():
    """The table."""
    model = made()
    ids = torch.randint(3, 1000, (1, TOKENS), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    with kvbench.attach(model, policy="quest", budget=256):  # compile kernels, map the libraries
        model(ids[:, :2048])
    print(f"{TOKENS} tokens   read s  held GB file GB  save s  load s  equal  in a graph")
    with tempfile.TemporaryDirectory() as folder:
        for policy in POLICIES:
            try:
                one(model, policy, ids, Path(folder) / "state")
            except Exception:
                print(f"{policy:14} {traceback.format_exc().strip().splitlines()[-1][:160]}")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
