"""Kernels that take tokens into stores of their own and that look over a whole prompt; torch twins and Triton's."""

from types import SimpleNamespace

import pytest
import torch
from kernel_references import DEVICE, randn

from kvbench import kernels
from kvbench.contract.errors import KVBenchError
from kvbench.kernels import support
from kvbench.strategies.compressing import kivi_storage as kivi


@pytest.fixture(params=["torch", "triton"], autouse=True)
def implementation(request):
    if request.param == "triton" and support.triton is None:
        pytest.skip("triton is not installed")
    torch.manual_seed(7)
    with kernels.using(request.param):
        yield request.param


def kivi_store(dim, bits, group, value_group, residual, dtype, tokens=48):
    def zeros(*shape, dtype):
        return torch.zeros(2, 2, *shape, dtype=dtype, device=DEVICE)

    return kernels.KIVICodes(
        zeros(tokens // group, dim * group * bits // 8, dtype=torch.uint8),
        zeros(tokens // group, 2 * dim, dtype=torch.float16),
        zeros(tokens, dim * bits // 8, dtype=torch.uint8),
        zeros(tokens, 2 * dim // value_group, dtype=torch.float16),
        *(zeros(residual + 1, dim, dtype=dtype) for _ in range(2)),
        *(torch.zeros(2, dtype=torch.int32, device=DEVICE) for _ in range(3)),
        bits, group, value_group,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dim", "bits", "group", "residual", "dtype"),
    [
        (64, 2, 32, 32, torch.bfloat16),
        (80, 4, 8, 16, torch.float32),
        (96, 2, 16, 16, torch.bfloat16),
        (8, 2, 8, 8, torch.float32),
        (64, 8, 16, 16, torch.bfloat16),
    ],
)
def test_settle_kivi_quantises_as_the_policy_does(dim, bits, group, residual, dtype):
    tokens, behind = max(residual + 9, 25), 7  # the second row is that many tokens shorter
    value_group = min(group, dim)
    store = kivi_store(dim, bits, group, value_group, residual, dtype)
    keys, values = randn(2, 2, tokens, dim, dtype=dtype), randn(2, 2, tokens, dim, dtype=dtype)
    for at in range(tokens):
        place = torch.tensor([at, max(at - behind, 0)], dtype=torch.int32, device=DEVICE)
        rows = (torch.arange(2, device=DEVICE), slice(None), place.long())
        kernels.settle_kivi(store, keys[rows][:, :, None], values[rows][:, :, None], place, residual)
    options = SimpleNamespace(bits=bits, group=group, residual=residual)
    for row, length in enumerate((tokens, tokens - behind)):
        known = kivi.KIVIBuffer(options, keys[row : row + 1, :, :1], values[row : row + 1, :, :1])
        for at in range(1, length):
            known.append(keys[row : row + 1, :, at : at + 1], values[row : row + 1, :, at : at + 1])
        assert int(store.lengths[row]) == length
        assert int(store.quantised_keys[row]) == length // residual * residual
        assert int(store.quantised_values[row]) == max(length - residual, 0)
        for own, codes, scales in (
            (known._key_groups, store.key_codes, store.key_scales),
            (known._value_rows, store.value_codes, store.value_scales),
        ):
            count = own.length
            assert count
            assert torch.equal(codes[row, :, :count], own.keys[0])
            assert torch.equal(scales[row, :, :count], own.values[0])
            assert not codes[row, :, count:].any() and not scales[row, :, count:].any()


def test_settle_kivi_wants_a_ring_longer_than_the_residual():
    store = kivi_store(64, 2, 16, 16, 15, torch.float32)
    new = randn(2, 2, 1, 64)
    with pytest.raises(KVBenchError, match=r"16 and 16 slots .* more than the residual of 16 tokens"):
        kernels.settle_kivi(store, new, new, torch.zeros(2, dtype=torch.int32, device=DEVICE), 16)


def test_insert_writes_to_a_flat_store_that_rows_and_heads_share():
    flat = [torch.zeros(20, 8, device=DEVICE) for _ in range(2)]
    keys, values = randn(2, 3, 1, 8), randn(2, 3, 1, 8)
    places = torch.tensor([[0, 7, 19], [3, 20, -1]], dtype=torch.int32, device=DEVICE)
    kernels.insert(*(part[None, None].expand(2, 3, -1, -1) for part in flat), keys, values, places)
    for part, new in zip(flat, (keys, values), strict=True):
        expected = torch.zeros_like(part)
        expected[[0, 7, 19, 3]] = new[[0, 0, 0, 1], [0, 1, 2, 0], 0]
        assert torch.equal(part, expected)


@pytest.mark.parametrize(
    ("dtype", "dim", "groups", "share", "tokens"),
    [
        (torch.float32, 64, 2, 2, 1),
        (torch.float32, 80, 1, 3, 67),
        (torch.float16, 128, 2, 1, 130),
        (torch.bfloat16, 96, 1, 4, 129),
        (torch.bfloat16, 256, 1, 1, 64),
    ],
)
def test_column_sums_against_float64(dtype, dim, groups, share, tokens):
    heads = groups * share
    # queries laid out [B, n, H, d], as projections leave them, and scores that reach far beyond exp's range
    queries = randn(2, tokens, heads, dim, dtype=dtype, scale=6.0).transpose(1, 2)
    keys = randn(2, groups, tokens, dim, dtype=dtype)
    found = kernels.column_sums(queries, keys, 0.2)
    logits = queries.double() @ keys.double().repeat_interleave(share, dim=1).transpose(-1, -2) * 0.2
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE).triu(1)
    weights = logits.masked_fill(future, -torch.inf).softmax(-1)
    expected = weights.view(2, groups, share, tokens, tokens).sum((2, 3))
    assert found.dtype == torch.float32
    limit = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert ((found - expected).norm() / expected.norm()) < limit
    rows = torch.full((2, groups), float(share * tokens), device=DEVICE)
    assert torch.allclose(found.sum(-1), rows, rtol=1e-4)


def test_column_sums_says_what_does_not_fit():
    with pytest.raises(KVBenchError, match="5 queries and 6 keys"):
        kernels.column_sums(randn(1, 2, 5, 16), randn(1, 1, 6, 16), 1.0)
    with pytest.raises(KVBenchError, match=r"queries \[1, 3, 5, 16\] and keys \[1, 2, 5, 16\] are not"):
        kernels.column_sums(randn(1, 3, 5, 16), randn(1, 2, 5, 16), 1.0)


def test_attention_beside_a_segment_without_tokens_is_that_of_the_other():
    queries, keys, values = randn(2, 6, 1, 64), randn(2, 2, 9, 64), randn(2, 2, 9, 64)
    empty = kernels.Segment(keys, values, torch.zeros(2, dtype=torch.int32, device=DEVICE))
    expected = kernels.decode(queries, keys, values, None)
    for parts in ((empty, kernels.Segment(keys, values)), (kernels.Segment(keys, values), empty)):
        for found, known in zip(kernels.attend(queries, *parts), expected, strict=True):
            assert torch.allclose(found, known, atol=1e-6)
