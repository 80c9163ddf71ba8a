"""A decoding step of each selecting policy against cached exact attention, on the CPU, as ratios inside one run.

One layer of the embedded model's shape (9 query and 3 key/value heads of dimension 64, float32, one thread) over
synthetic vectors with what real ones have: keys with a common mean, neighbours alike, some topics; queries far from the
keys. 1,024 tokens are attended. A step appends a token, inserts, selects and attends; exact attention appends and
attends, as transformers does (SDPA). InfiniGen is measured without the projection of the previous layer's input.
"""

import sys
from pathlib import Path

import faiss
import numba
import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.contract.storage import TokenBuffer
from kvbench.engine.rotary import Rotary
from kvbench.plugins import registry

sys.path.insert(0, str(Path(__file__).parent.parent))
from drive import Driven, Vectors

pytestmark = pytest.mark.bench

HEADS, GROUPS, D, BUDGET, STEPS = 9, 3, 64, 1024, 12
SELECTING = sorted(
    name for name, policy in registry().classes["policy"].items() if policy.takes_budget and hasattr(policy, "select")
)
SLOW_TO_BUILD = ("vamana", "robust_vamana", "ivfpq", "retrieval")
"""Indexes left out at 32K: their builds take long, and `test_index_bench` compares their searches."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = numba.get_num_threads(), faiss.omp_get_max_threads(), torch.get_num_threads()
    numba.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    yield
    numba.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])
    torch.set_num_threads(before[2])


@pytest.fixture(scope="module", params=[8192, 32768], ids=["8K", "32K"])
def vectors(request):
    """Keys drift through topics around a mean; a query points to some topic, away from the mean."""
    random, n = torch.Generator().manual_seed(0), request.param + 400

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    topics = normal(1, GROUPS, 64, D) * 2
    which = torch.arange(n) // 512 * 7 % 64
    keys = 3 * normal(1, GROUPS, 1, D) + topics[:, :, which] + normal(1, GROUPS, n, D)
    aims = topics.repeat_interleave(HEADS // GROUPS, dim=1)[:, :, torch.arange(n) * 11 % 64]
    queries = aims + 2 * normal(1, HEADS, 1, D) + normal(1, HEADS, n, D)
    return Vectors(queries, keys, normal(1, GROUPS, n, D), prompt=request.param)


@pytest.fixture(scope="module")
def rotary():
    config = LlamaConfig(
        vocab_size=8, hidden_size=HEADS * D, intermediate_size=8, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, max_position_embeddings=65536,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return Rotary(model, config, model.model.layers[0].self_attn, 0)


class Exact:
    """Cached exact attention."""

    def __init__(self, vectors):
        self.vectors = vectors
        prompt = slice(0, vectors.prompt)
        self.buffer = TokenBuffer(vectors.keys[:, :, prompt].clone(), vectors.values[:, :, prompt].clone())

    def step(self):
        now = slice(self.buffer.length, self.buffer.length + 1)
        self.buffer.append(self.vectors.keys[:, :, now], self.vectors.values[:, :, now])
        return functional.scaled_dot_product_attention(
            self.vectors.queries[:, :, now], self.buffer.keys, self.buffer.values, enable_gqa=True
        )


@pytest.mark.parametrize("policy", SELECTING)
@torch.inference_mode()
def test_a_decoding_step_against_cached_exact_attention(policy, vectors, rotary, ratio_gate):
    if vectors.prompt > 8192 and policy in SLOW_TO_BUILD:
        pytest.skip("its build takes long")
    driven, exact = Driven(policy, vectors, BUDGET, rotary=rotary), Exact(vectors)

    def steps(of):
        for _ in range(STEPS):
            of.step()

    ratio_gate.time(
        f"{policy} / cached exact attention, time of a step at {vectors.prompt // 1024}K",
        lambda: steps(driven),
        lambda: steps(exact),
        rounds=9,
    )
