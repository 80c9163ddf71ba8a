"""Attention to codes of single vectors, by torch twins and Triton's kernels, against float64 sums over their bits."""

import math

import pytest
import torch
from kernel_references import DEVICE, randn

from kvbench import kernels
from kvbench.contract.errors import KVBenchError
from kvbench.kernels import support


@pytest.fixture(params=["torch", "triton"], autouse=True)
def implementation(request):
    if request.param == "triton" and support.triton is None:
        pytest.skip("triton is not installed")
    torch.manual_seed(7)
    with kernels.using(request.param):
        yield request.param


def number(code, kind):
    """What a byte means, by its bits."""
    if kind == "int8":
        return code - 256 if code > 127 else code
    mantissa, bias = (3, 7) if kind == "e4m3" else (2, 15)
    exponent, rest = (code & 127) >> mantissa, (code & (2**mantissa - 1)) / 2**mantissa
    found = math.ldexp(rest, 1 - bias) if exponent == 0 else math.ldexp(1 + rest, exponent - bias)
    return -found if code & 128 else found


def vectors(codes, scales, layout, size):
    """Float64 vectors [..., size] of codes [..., w]."""
    if layout.kind != "levels":
        largest = {"int8": 256, "e4m3": 127, "e5m2": 124}[layout.kind]
        table = [number(code, layout.kind) if code & 127 < largest else 0 for code in range(256)]
        found = torch.tensor(table, dtype=torch.float64)[codes.cpu().long()]
    else:
        bits, rows = layout.bits, codes.cpu().long()
        pieces = [(rows[..., : size // 4], 2, 0), (rows[..., size // 4 :], 1, 2)] if bits == 3 else [(rows, bits, 0)]
        numbers = torch.zeros(*codes.shape[:-1], size, dtype=torch.long)
        for part, width, shift in pieces:
            for i in range(size):
                byte = part[..., i % part.shape[-1]]
                numbers[..., i] |= ((byte >> (width * (i // part.shape[-1]))) % 2**width) << shift
        found = layout.levels.cpu().double()[numbers]
    return found * scales.cpu().double() if scales.shape[-1] else found


def finite_bytes(shape, kind):
    """Random codes of finite numbers below 2 in an 8-bit float."""
    made = torch.randint(0, 256, shape, dtype=torch.uint8)
    if kind in ("e4m3", "e5m2"):
        made = made & 0b10111111
    return made.to(DEVICE)


@pytest.mark.parametrize(
    ("kind", "bits", "scaled", "sizes", "dtype"),
    [
        ("int8", 8, True, (16, 16), torch.float32), ("int8", 8, True, (24, 40), torch.float16),
        ("e4m3", 8, False, (16, 16), torch.float32), ("e4m3", 8, True, (8, 24), torch.float16),
        ("e5m2", 8, False, (16, 16), torch.bfloat16), ("levels", 1, True, (16, 16), torch.float32),
        ("levels", 2, True, (8, 8), torch.float32), ("levels", 3, True, (16, 24), torch.float32),
        ("levels", 4, True, (16, 32), torch.float16),
    ],
)  # fmt: skip
def test_codes_are_attended_to_as_the_numbers_that_they_stand_for(kind, bits, scaled, sizes, dtype):
    batch, groups, heads, room = 3, 2, 6, 150
    layout = kernels.Layout(kind, bits, torch.randn(2**bits).to(DEVICE) if kind == "levels" else None)
    lengths = torch.tensor([150, 1, 83], dtype=torch.int32, device=DEVICE)
    held = []
    for size in sizes:
        held.append(finite_bytes((batch, groups, room, layout.width(size)), kind))
        step = 0.02 if kind == "int8" else 1.0
        held.append((torch.rand(batch, groups, room, int(scaled)) * step).to(DEVICE, torch.float16))
    queries = randn(batch, heads, 1, sizes[0], dtype=dtype)
    store = kernels.CodedStore(*held, lengths, layout, sizes)
    output, lse = kernels.attend_codes(queries, store, scaling=0.3, splits=2)
    keys, values = vectors(*held[:2], layout, sizes[0]), vectors(*held[2:], layout, sizes[1])
    near = 1e-5 if dtype == torch.float32 else 2e-3
    for row in range(batch):
        for head in range(heads):
            count, group = int(lengths[row]), head // 3
            logits = 0.3 * (keys[row, group, :count] @ queries[row, head, 0].cpu().double())
            expected = logits.softmax(0) @ values[row, group, :count]
            torch.testing.assert_close(output[row, head, 0].cpu().double(), expected, rtol=near, atol=near)
            assert float(lse[row, head]) == pytest.approx(float(logits.logsumexp(0)), rel=near, abs=near)


def test_stores_that_do_not_fit_are_refused():
    codes, scales = torch.zeros(1, 1, 4, 8, dtype=torch.uint8), torch.zeros(1, 1, 4, 1)
    lengths, queries = torch.ones(1, dtype=torch.int32), torch.zeros(1, 2, 1, 8)
    for store, told in (
        (kernels.CodedStore(codes, scales, codes, scales, lengths, kernels.Layout("int8"), (16, 8)), "don't fit"),
        (
            kernels.CodedStore(codes, scales, codes, scales, lengths, kernels.Layout("levels", 4), (8, 8)),
            "with a table",
        ),
        (kernels.CodedStore(codes, scales, codes, scales[..., :0], lengths, kernels.Layout("int8"), (8, 8)), "scales"),
        (kernels.CodedStore(codes.char(), scales, codes, scales, lengths, kernels.Layout("int8"), (8, 8)), "uint8"),
        (
            kernels.CodedStore(codes[..., :4], scales, codes, scales, lengths, kernels.Layout("int8"), (8, 8)),
            "codes of",
        ),
    ):
        with pytest.raises(KVBenchError, match=told):
            kernels.attend_codes(queries, store)
