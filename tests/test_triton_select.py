"""Kernels that choose: the best of each row, and the worst token of each head; Triton's and their torch twins."""

import itertools

import pytest
import torch
from kernel_references import DEVICE

from kvbench import kernels
from kvbench.contract.errors import KVBenchError
from kvbench.kernels import support


@pytest.fixture(params=["torch", "triton"], autouse=True)
def implementation(request):
    if request.param == "triton" and support.triton is None:
        pytest.skip("triton is not installed")
    torch.manual_seed(11)
    with kernels.using(request.param):
        yield request.param


@pytest.mark.parametrize("n", [1, 5, 33, 200, 40_000])
def test_select_top_takes_the_best_as_many_as_the_device_says(n):
    scores = torch.randn(2, 3, n).round(decimals=1)
    scores[0, 0, n // 2 :] = -torch.inf
    scores[1, 2] = torch.randn(n) * 1e-3 - 5
    counts = torch.tensor([[0, 4, 7], [2, min(n, 9), 9]], dtype=torch.int32)
    also, k = torch.tensor([77, 78], dtype=torch.int32), 9
    found = kernels.select_top(scores.to(DEVICE), counts.to(DEVICE), k, also=also.to(DEVICE)).cpu()
    for b, h in itertools.product(range(2), range(3)):
        row = scores[b, h].tolist()
        order = sorted((i for i in range(n) if row[i] > -torch.inf), key=lambda i, row=row: (-row[i], i))
        expected = sorted(order[: min(int(counts[b, h]), k)])
        assert found[b, h].tolist() == expected + [-1] * (k - len(expected)) + [77 + b]


@pytest.mark.parametrize("kind", ["equal", "two", "outlier", "infinite", "few", "heavy", "zeros"])
def test_select_top_finds_the_threshold_whatever_the_scores_are(kind):
    n, k = 600, 150
    scores = {
        "equal": torch.full((n,), -3.5),
        "two": torch.where(torch.rand(n) < 0.5, 1e30, -1e-30),
        "outlier": torch.randn(n).index_fill_(0, torch.tensor([17]), 3e38),
        "infinite": torch.randn(n).index_fill_(0, torch.arange(5, n, 9), torch.inf),
        "few": torch.randint(-3, 3, (n,)).float(),
        "heavy": torch.randn(n) / torch.randn(n) ** 3,
        "zeros": torch.where(torch.rand(n) < 0.5, 0.0, torch.rand(n) * 1e-40),
    }[kind]
    for count in (1, 2, 64, 149, 150):
        found = kernels.select_top(scores[None, None].to(DEVICE), torch.tensor([count], device=DEVICE), k).cpu()
        order = sorted(range(n), key=lambda i: (-float(scores[i]), i))
        assert found[0, 0].tolist() == sorted(order[:count]) + [-1] * (k - count)


def test_select_top_says_what_it_takes():
    with pytest.raises(KVBenchError, match="float32"):
        kernels.select_top(torch.zeros(1, 1, 4, dtype=torch.float64), torch.ones(1, dtype=torch.int32), 2)
    with pytest.raises(KVBenchError, match="k is 0"):
        kernels.select_top(torch.zeros(1, 1, 4), torch.ones(1, dtype=torch.int32), 0)


@pytest.mark.parametrize("held", [1, 7, 64, 9000])
def test_replace_worst_puts_the_new_token_in_the_worst_ones_place(held):
    batch, groups, dim = 2, 3, 16
    scores = torch.randn(batch, groups, held).round(decimals=1)
    ids = torch.stack([torch.randperm(held + 5)[:held] for _ in range(batch * groups)]).view(batch, groups, held).int()
    positions = torch.tensor([held + 5, held + 9], dtype=torch.int32)
    spared = torch.randint(1, 5, (batch, groups), dtype=torch.int32)
    stores = [torch.randn(batch, groups, held, dim) for _ in range(2)]
    keys, values = (torch.randn(batch, groups, 1, dim) for _ in range(2))
    fresh = torch.randn(batch, groups, 1)
    expected = [tensor.clone() for tensor in (scores, ids, *stores)]
    for b, g in itertools.product(range(batch), range(groups)):
        free = [i for i in range(held) if ids[b, g, i] < positions[b] + 1 - spared[b, g]]
        worst = min(free, key=lambda i: (float(scores[b, g, i]), i), default=0)
        expected[0][b, g, worst], expected[1][b, g, worst] = fresh[b, g, 0], positions[b]
        expected[2][b, g, worst], expected[3][b, g, worst] = keys[b, g, 0], values[b, g, 0]
    there = [tensor.to(DEVICE) for tensor in (scores, fresh, ids, positions, spared, *stores, keys, values)]
    kernels.replace_worst(*there)
    for found, wanted in zip((there[0], there[2], there[5], there[6]), expected, strict=True):
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize(("groups", "share", "dim", "held"), [(1, 1, 64, 5), (2, 4, 80, 70), (3, 7, 128, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_weights_are_those_of_a_float64_softmax(groups, share, dim, held, dtype):
    queries, keys = torch.randn(2, groups * share, 1, dim).to(dtype), torch.randn(2, groups, held, dim).to(dtype)
    lengths = torch.randint(1, held + 1, (2, groups), dtype=torch.int32)
    logits = (queries.double().view(2, groups, share, dim) @ keys.double().transpose(-1, -2)) * 0.2
    valid = torch.arange(held) < lengths[..., None]
    logits = logits.masked_fill(~valid[:, :, None], -torch.inf)
    lse = logits.logsumexp(-1).flatten(1, 2).float()
    found = kernels.attention_weights(*(x.to(DEVICE) for x in (queries, keys, lse, lengths)), 0.2)
    torch.testing.assert_close(found.cpu().double(), logits.softmax(-1).flatten(1, 2), rtol=1e-4, atol=1e-6)
