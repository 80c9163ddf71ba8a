"""Kernels of the decoding step, Triton's (interpreted where there is no GPU) and their torch twins, against float64."""

import itertools
import math
import random

import faiss
import pytest
import torch
from kernel_references import DEVICE, ERROR, attention64, error, gathered, ints, randn

from kvbench import kernels
from kvbench.contract.errors import KVBenchError
from kvbench.kernels import Segment, support
from kvbench.strategies.compressing import kivi_storage as kivi
from kvbench.strategies.compressing.kivi import KIVI

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def on_gpu(*options, rounds=1):
    """Cases for the compiled kernels: every type and head dimension with one of each of the other `options`.

    Without a GPU one that is skipped stands for them.
    """
    chosen = random.Random(rounds)
    cases = [(dtype, dim, *(chosen.choice(option) for option in options))
             for _ in range(rounds) for dtype in (FULL, HALF, BRAIN) for dim in DIMS]  # fmt: skip
    return [pytest.param(*case, marks=GPU) for case in (cases if torch.cuda.is_available() else cases[:1])]


@pytest.fixture(params=["torch", "triton"], autouse=True)
def implementation(request):
    if request.param == "triton" and support.triton is None:
        pytest.skip("triton is not installed")
    torch.manual_seed(7)
    with kernels.using(request.param):
        yield request.param


def check(found, expected, dtype):
    """Compare output and log-sum-exp; heads without a token have 0 and −∞ exactly."""
    output, lse = found
    empty = expected[1] == -torch.inf
    assert (output[empty] == 0).all()
    assert (lse[empty] == -torch.inf).all()
    assert torch.allclose(lse[~empty].double(), expected[1][~empty], atol=2e-5, rtol=2e-6)
    assert error(output[:, :, 0], expected[0]) < ERROR[dtype]


def prefix(keys, values, lengths):
    valid = torch.arange(keys.shape[2], device=DEVICE) < lengths.reshape(len(lengths), -1, 1)
    return keys, values, valid.expand(keys.shape[:3]), None


DIMS = (64, 80, 96, 128, 256)
DECODE = [
    (FULL, 64, 2, 4, [37, 64]),
    (BRAIN, 80, 1, 1, [0, 1]),
    (HALF, 96, 1, 16, [150, 149]),
    (FULL, 128, 1, 2, [0, 131]),
    (BRAIN, 256, 1, 3, [33, 150]),
]


@pytest.mark.parametrize(
    ("dtype", "dim", "groups", "share", "lengths"),
    DECODE + on_gpu([1, 2, 8], range(1, 17), [[0, 4097], [1, 5000], [999, 64]], rounds=2),
)
def test_decode(dtype, dim, groups, share, lengths):
    capacity = max(150, *lengths)
    queries = randn(2, groups * share, 1, dim, dtype=dtype)
    # a store laid out [B, t, G, d], and values wider apart than they are long
    keys = randn(2, capacity, groups, dim, dtype=dtype).transpose(1, 2)
    values = randn(2, groups, capacity, dim + 16, dtype=dtype)[..., :dim]
    lengths = ints(lengths)
    output = torch.full((2, groups * share, 1, dim), torch.nan, device=DEVICE)
    lse = torch.full((2, groups * share), torch.nan, device=DEVICE)
    found = kernels.decode(queries, keys, values, lengths, output=output, lse=lse)
    assert found[0] is output
    assert found[1] is lse
    check(found, attention64(queries, [prefix(keys, values, lengths)]), dtype)


def test_decode_takes_lengths_of_heads_scaling_softcap_bias_and_types(implementation):
    queries, keys, values = randn(1, 6, 1, 64, scale=8), randn(1, 2, 70, 64), randn(1, 2, 70, 32)
    lengths = ints([[70, 9]])
    for heads in (2, 6):
        bias = randn(1, heads, 70)
        bias[:, :, 5] = -torch.inf
        found = kernels.attend(queries, Segment(keys, values, lengths, bias=bias), scaling=0.3, softcap=4.0)
        keys_, values_, valid, _ = prefix(keys, values, lengths)
        check(found, attention64(queries, [(keys_, values_, valid, bias)], scaling=0.3, softcap=4.0), FULL)
    mixed = kernels.decode(queries.half(), keys, values.bfloat16(), None, dtype=HALF)
    assert mixed[0].dtype == HALF
    everything = prefix(keys, values.bfloat16(), ints([70]))
    assert error(mixed[0][:, :, 0], attention64(queries.half(), [everything])[0]) < 1e-3


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_parts_of_a_head_merge_exactly(splits):
    queries, keys, values = randn(1, 2, 1, 64), randn(1, 1, 150, 64), randn(1, 1, 150, 64)
    found = kernels.decode(queries, keys, values, ints([97]), splits=splits)
    check(found, attention64(queries, [prefix(keys, values, ints([97]))]), FULL)


GATHER = [
    (FULL, 64, 2, 3, False, 1),
    (BRAIN, 80, 2, 2, True, 1),
    (HALF, 128, 1, 2, False, 16),
    (FULL, 96, 1, 3, True, 6),
]


@pytest.mark.parametrize(
    ("dtype", "dim", "groups", "share", "per_head", "unit"),
    GATHER + on_gpu([1, 2, 8], range(1, 17), [False, True], [1, 16, 24], rounds=2),
)
def test_gather(dtype, dim, groups, share, per_head, unit):
    heads, tokens = groups * share, 150
    queries = randn(2, heads, 1, dim, dtype=dtype)
    keys, values = randn(2, groups, tokens, dim, dtype=dtype), randn(2, groups, tokens, dim, dtype=dtype)
    sets, blocks = heads if per_head else groups, -(-tokens // unit)
    k = min(21, blocks - 1)
    ids = torch.stack([torch.randperm(blocks)[:k] for _ in range(2 * sets)]).view(2, sets, k).to(DEVICE, torch.int32)
    ids[:, :, 2] = -1
    ids[0, 0] = -1  # nothing is selected at all
    lengths = ints([149, 77])
    bias = randn(2, heads, k * unit)
    parts = gathered(keys, values, ids, unit, lengths)
    expected = attention64(queries, [(*parts, bias)])
    check(kernels.gather(queries, keys, values, ids, unit=unit, lengths=lengths, bias=bias), expected, dtype)
    if unit == 1:
        expected = attention64(queries, [(*gathered(keys, values, ids, 1), None)])
        check(kernels.gather(queries, keys, values, ids.long()), expected, dtype)


@pytest.mark.parametrize("per_head", [False, True])
def test_static_and_selected_tokens_attend_as_one(per_head):
    queries, keys, values = randn(2, 4, 1, 64), randn(2, 2, 90, 64), randn(2, 2, 90, 64)
    ids = torch.randint(20, 90, (2, 4 if per_head else 2, 9)).to(DEVICE, torch.int32)
    ids[1] = -1
    static = randn(2, 2, 40, 64), randn(2, 2, 40, 64)
    lengths = ints([20, 0])
    window = ints([[3, 1], [0, 0]])
    expected = [prefix(*static, lengths), (*gathered(keys, values, ids, 1), None)]
    found = kernels.attend(queries, Segment(*static, lengths), Segment(keys, values, ids=ids))
    check(found, attention64(queries, expected), FULL)
    found = kernels.attend(
        queries, Segment(*static, lengths), Segment(keys, values, ids=ids), Segment(keys, values, window)
    )
    check(found, attention64(queries, [*expected, prefix(keys, values, window)]), FULL)


def test_ragged():
    queries, keys, values = randn(2, 6, 1, 80), randn(200, 80), randn(200, 80)
    lengths, offsets = ints([[70, 0], [1, 129]]), ints([[0, 70], [70, 71]], torch.int64)
    dense = torch.zeros(2, 2, 2, 200, 80, device=DEVICE)
    for b in range(2):
        for g in range(2):
            n, at = int(lengths[b, g]), int(offsets[b, g])
            dense[0, b, g, :n], dense[1, b, g, :n] = keys[at : at + n], values[at : at + n]
    expected = attention64(queries, [prefix(*dense, lengths)])
    for at in (offsets, offsets.int()):
        check(kernels.ragged(queries, keys, values, at, lengths), expected, FULL)


def test_merge():
    queries, keys, values = randn(1, 3, 1, 64), randn(1, 1, 90, 64), randn(1, 1, 90, 64)
    parts = torch.full((5, 1, 3, 1, 64), torch.nan, device=DEVICE)
    lses = torch.full((5, 1, 3), -torch.inf, device=DEVICE)  # a fifth part that is empty and holds no number
    for part in range(3):
        rows = slice(part * 30, part * 30 + 30)
        kernels.decode(queries, keys[:, :, rows], values[:, :, rows], None, output=parts[part], lse=lses[part])
    expected = attention64(queries, [prefix(keys, values, ints([90]))])
    check(kernels.merge(parts, lses), expected, FULL)
    assert kernels.merge(parts, lses, dtype=BRAIN)[0].dtype == BRAIN
    output, lse = kernels.merge(parts[3:], lses[3:])
    assert (output == 0).all()
    assert (lse == -torch.inf).all()


BOUNDS = [(FULL, 64, 16, 50), (BRAIN, 80, 7, 28), (HALF, 96, 1, 3)]


@pytest.mark.parametrize(
    ("dtype", "dim", "size", "tokens"),
    BOUNDS + on_gpu([1, 16, 48], [1, 64, 333]),
)
def test_page_bounds(dtype, dim, size, tokens):
    keys = randn(2, 2, tokens, dim, dtype=dtype)
    pages = -(-tokens // size) + 1
    low, high = (torch.full((2, 2, pages, dim), 7.0, device=DEVICE, dtype=dtype) for _ in range(2))
    lengths = ints([tokens, max(tokens - size - 1, 0)])
    kernels.page_bounds(keys, lengths, size, low, high)
    # the same bounds, token by token at a position on the device
    grown_low, grown_high = torch.full_like(low, 7.0), torch.full_like(high, 7.0)
    position = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    while int(position[0]) < tokens:
        at = int(position[0])
        m = min(3, tokens - at)
        positions = torch.where(position + m <= lengths, position, -99)  # rows that have ended
        kernels.update_bounds(keys[:, :, at : at + m], positions, size, grown_low, grown_high)
        if at < int(lengths[1]) < at + m:
            rest = int(lengths[1]) - at
            kernels.update_bounds(keys[1:, :, at : at + rest], position[1:], size, grown_low[1:], grown_high[1:])
        position += m
    for row, length in enumerate(lengths.tolist()):
        for page in range(pages):
            part = keys[row, :, page * size : min((page + 1) * size, length)]
            seen = page * size < length
            for bounds, extreme in ((low, part.amin if seen else None), (high, part.amax if seen else None)):
                expected = extreme(1) if seen else torch.full_like(bounds[row, :, page], 7.0)
                assert torch.equal(bounds[row, :, page], expected)
    assert torch.equal(grown_low, low)
    assert torch.equal(grown_high, high)


SCORES = [(FULL, 64, 2, 3, 70), (BRAIN, 80, 1, 2, 1), (HALF, 128, 1, 16, 65)]


@pytest.mark.parametrize(
    ("dtype", "dim", "groups", "share", "count"),
    SCORES + on_gpu([1, 2, 8], range(1, 17), [1, 333, 4096]),
)
def test_scores(dtype, dim, groups, share, count):
    queries = randn(2, groups * share, 1, dim, dtype=dtype)
    low = randn(2, groups, count, dim, dtype=dtype)
    high = low + randn(2, groups, count, dim, dtype=dtype).abs()
    counts = ints([count, count // 3])
    beyond = torch.arange(count, device=DEVICE) >= counts[:, None, None]
    q = queries.double().view(2, groups, share, 1, dim)
    products = (q * low.double()[:, :, None]).sum(-1) * 0.5
    bounds = torch.maximum(q * low.double()[:, :, None], q * high.double()[:, :, None]).sum(-1)
    tolerance = {"atol": 3e-5 * math.sqrt(dim), "rtol": 3e-6}
    for reduce, reduced in (("none", None), ("max", torch.amax), ("sum", torch.sum)):
        for found, full in (
            (kernels.scores(queries, low, counts, scaling=0.5, reduce=reduce), products),
            (kernels.page_scores(queries, low, high, counts, reduce=reduce), bounds),
        ):
            expected = full.flatten(1, 2) if reduced is None else reduced(full, 2)
            expected = expected.masked_fill(beyond.expand_as(expected), -torch.inf)
            assert torch.allclose(found.double(), expected, **tolerance)
    output = torch.full((2, groups * share, count), torch.nan, device=DEVICE)
    assert kernels.scores(queries, low, output=output) is output
    assert torch.allclose(output.double(), 2 * products.flatten(1, 2), **tolerance)


def test_insert_at_positions_on_the_device():
    store = randn(2, 12, 3, 20).transpose(1, 2), randn(2, 3, 12, 8, dtype=HALF)
    expected = [part.clone() for part in store]
    keys, values = randn(2, 3, 2, 20), randn(2, 3, 2, 8)
    positions = ints([[0, 5, 11], [-1, -2, 12]])
    kernels.insert(*store, keys, values, positions)
    for b in range(2):
        for g in range(3):
            for i in range(2):
                slot = int(positions[b, g]) + i
                if 0 <= slot < 12:
                    expected[0][b, g, slot], expected[1][b, g, slot] = keys[b, g, i], values[b, g, i].half()
    assert torch.equal(store[0], expected[0])
    assert torch.equal(store[1], expected[1])


def test_insert_into_a_ring_behind_the_sinks():
    store = randn(2, 1, 9, 16), randn(2, 1, 9, 16)
    tokens = randn(2, 1, 30, 16)
    position = ints([0, 0])
    for at in range(0, 30, 2):
        kernels.insert(*store, tokens[:, :, at : at + 2], -tokens[:, :, at : at + 2], position, sinks=3, window=5)
        position += 2
    kept = [0, 1, 2] + [next(p for p in range(25, 30) if (p - 3) % 5 == slot) for slot in range(5)]
    assert torch.equal(store[0][:, :, :8], tokens[:, :, kept])
    assert torch.equal(store[1][:, :, :8], -tokens[:, :, kept])


PQ = [(FULL, 64, 2, 3, 2, 5, 70), (BRAIN, 96, 1, 16, 4, 256, 33), (HALF, 80, 1, 1, 5, 16, 1)]


@pytest.mark.parametrize(
    ("dtype", "dim", "groups", "share", "parts", "known", "count"),
    PQ + on_gpu([1, 2, 8], range(1, 17), [2, 4, 16], [16, 64, 256], [1, 3000]),
)
def test_pq_scores(dtype, dim, groups, share, parts, known, count):
    queries = randn(2, groups * share, 1, dim, dtype=dtype)
    centroids = randn(2, groups, parts, known, dim // parts)
    codes = torch.randint(0, known, (2, groups, parts, count + 3), dtype=torch.uint8).to(DEVICE)[..., :count]
    index = codes.long()[..., None].expand(-1, -1, -1, -1, dim // parts)
    keys = centroids.double().gather(3, index).transpose(2, 3).flatten(3)
    expected = torch.einsum("bgrd,bgnd->bgrn", queries.double().view(2, groups, share, dim), keys).flatten(1, 2) * 0.25
    tolerance = {"atol": 1e-5 * math.sqrt(dim), "rtol": 3e-6}
    assert torch.allclose(kernels.pq_scores(queries, centroids, codes, scaling=0.25).double(), expected, **tolerance)
    counts = ints([[count] * groups, [count // 2] * groups])
    output = torch.full((2, groups * share, count), torch.nan, device=DEVICE)
    kernels.pq_scores(queries, centroids, codes, counts, scaling=0.25, output=output)
    expected[1, :, count // 2 :] = -torch.inf
    assert torch.allclose(output.double(), expected, **tolerance)


def unpacked(row, scales, bits, size):
    """The numbers of a row of P bytes in float64: code i in byte i mod P, from bit bits · ⌊i / P⌋ on."""
    row, (steps, lows) = row.tolist(), scales.double().chunk(2)
    numbers = [(row[i % len(row)] >> i // len(row) * bits) % 2**bits for i in range(len(row) * 8 // bits)]
    codes = torch.tensor(numbers, dtype=torch.float64).view(-1, size)
    return codes * steps[:, None] + lows[:, None]


KIVI_CASES = [
    (FULL, 64, 1, 3, 2, 32, 32, [100, 64]),
    (BRAIN, 80, 1, 1, 2, 8, 16, [41, 0]),
    (HALF, 96, 1, 2, 4, 32, 32, [64, 1]),
    (FULL, 64, 1, 1, 8, 40, 8, [81, 97]),
    (FULL, 128, 1, 4, 2, 32, 32, [530, 300]),
    (FULL, 64, 2, 3, 4, 16, 16, [210, 130]),
    (HALF, 64, 1, 16, 8, 32, 32, [130, 40]),
    (BRAIN, 64, 1, 1, 2, 16, 32, [600, 333]),
]


@pytest.mark.parametrize(
    ("dtype", "dim", "groups", "share", "bits", "group", "value_group", "lengths"),
    KIVI_CASES
    + on_gpu([1, 2], range(1, 17), [2, 4, 8], [8, 32, 40], [8, 16], [[310, 257], [1, 64], [0, 320]], rounds=2),
)
def test_kivi(dtype, dim, groups, share, bits, group, value_group, lengths):
    tokens = -(-max(lengths) // group) * group
    late = 2 * group
    keys = [max((n - 5) // group * group, 0) for n in lengths]
    values = [max(n - late + 3, 0) for n in lengths]
    at = (2, groups)

    def scales(*shape):
        """Steps and minima of numbers around 0 whose size does not depend on the bits."""
        steps, lows = randn(*shape).chunk(2, -1)
        return torch.cat([steps / (2**bits - 1), lows * 0.3], -1).half()

    store = kernels.KIVICodes(
        torch.randint(0, 256, (*at, tokens // group, dim * group * bits // 8), dtype=torch.uint8).to(DEVICE),
        scales(*at, tokens // group, 2 * dim),
        torch.randint(0, 256, (*at, tokens, dim * bits // 8), dtype=torch.uint8).to(DEVICE),
        scales(*at, tokens, 2 * dim // value_group),
        randn(*at, late, dim, dtype=dtype), randn(*at, late, dim, dtype=dtype), ints(lengths), ints(keys), ints(values),
        bits, group, value_group,
    )  # fmt: skip
    rows = torch.zeros(2, *at, max(lengths), dim, dtype=torch.float64, device=DEVICE)
    packed = [part.cpu() for part in (store.key_codes, store.key_scales, store.value_codes, store.value_scales)]
    for b, n in enumerate(lengths):
        for g in range(groups):
            for part, (old, kept) in enumerate(((keys[b], store.late_keys), (values[b], store.late_values))):
                for t in range(old, n):
                    rows[part, b, g, t] = kept[b, g, t % late].double()
            for first in range(0, keys[b], group):
                place = b, g, first // group
                rows[0, b, g, first : first + group] = unpacked(packed[0][place], packed[1][place], bits, group).T
            for t in range(values[b]):
                rows[1, b, g, t] = unpacked(packed[2][b, g, t], packed[3][b, g, t], bits, value_group).flatten()
    queries = randn(2, groups * share, 1, dim, dtype=dtype)
    expected = attention64(queries, [prefix(*rows, ints(lengths))])
    found = kernels.attend_kivi(queries, store)
    # decoded keys are rounded to the queries' type
    rounding = {FULL: 2e-5, HALF: 5e-3, BRAIN: 4e-2}[dtype]
    filled = expected[1] > -torch.inf
    assert torch.equal(found[1] > -torch.inf, filled)
    assert (found[1][filled] - expected[1][filled]).abs().max() < rounding
    assert error(found[0][:, :, 0], expected[0]) < 5 * ERROR[dtype]
    expected = attention64(queries, [prefix(*rows, ints(lengths))], scaling=0.1, softcap=2.0)
    assert (
        error(kernels.attend_kivi(queries, store, scaling=0.1, softcap=2.0)[0][:, :, 0], expected[0]) < 5 * ERROR[dtype]
    )


@pytest.mark.parametrize("sets", ["each head", "each group"])
@pytest.mark.parametrize(("bits", "unit", "softcap"), [(2, 16, None), (4, 5, 3.0), (8, 1, None)])
def test_kivi_blocks(bits, unit, softcap, sets):
    options = KIVI.Options(bits=bits, group=16, residual=32)
    keys, values = torch.randn(2, 2, 75, 32), torch.randn(2, 2, 75, 32)
    buffer = kivi.KIVIBuffer(options, keys, values)
    held = kivi.KIVITokens(options, buffer, ints([75, 75]).cpu(), 80).codes
    buffer.hand_over(held, range(2))
    moved = {name: getattr(held, name).to(DEVICE) for name in vars(held) if torch.is_tensor(getattr(held, name))}
    store = kernels.KIVICodes(**moved, bits=bits, group=16, value_group=16)
    queries, blocks = randn(2, 6, 1, 32), -(-75 // unit)
    ids = torch.stack([torch.randperm(blocks) for _ in range(2 * (6 if sets == "each head" else 2))])
    ids = ids.view(2, -1, blocks)[..., : max(blocks // 2, 1)].contiguous()
    ids[:, :, -1] = -1
    ids[1, 0] = -1  # a head without a token
    rows = gathered(buffer.keys, buffer.values, ids, unit, torch.tensor([75, 75]))
    expected = attention64(queries, [(*rows, None)], softcap=softcap)
    found = kernels.attend_kivi_blocks(queries, store, ids.int().to(DEVICE), unit=unit, softcap=softcap)
    check(found, expected, FULL)
    with pytest.raises(KVBenchError, match=r"ids .* are not"):
        kernels.attend_kivi_blocks(queries, store, ids[:1].int().to(DEVICE), unit=unit)


def test_kivi_reads_what_its_policy_writes():
    options = KIVI.Options(bits=2, group=16, residual=32)
    keys, values = torch.randn(1, 2, 75, 64), torch.randn(1, 2, 75, 64)
    buffer = kivi.KIVIBuffer(options, keys, values)
    late_keys, late_values = torch.zeros(1, 2, 32, 64), torch.zeros(1, 2, 32, 64)
    late_keys[:, :, torch.arange(64, 75) % 32] = buffer._late_keys
    late_values[:, :, torch.arange(43, 75) % 32] = buffer._late_values
    groups, rows = buffer._key_groups, buffer._value_rows
    store = kernels.KIVICodes(
        *(part.to(DEVICE) for part in (groups.keys, groups.values, rows.keys, rows.values, late_keys, late_values)),
        ints([75]), ints([64]), ints([43]), bits=2, group=16, value_group=16,
    )  # fmt: skip
    queries = randn(1, 4, 1, 64)
    expected = attention64(queries, [prefix(buffer.keys.to(DEVICE), buffer.values.to(DEVICE), ints([75]))])
    check(kernels.attend_kivi(queries, store), expected, FULL)


def sq8(rows):
    """faiss' codes of rows [B, G, n, d], what it decodes them to, and its minima and ranges."""
    codes, back, ranges = torch.empty(rows.shape, dtype=torch.uint8), torch.empty(rows.shape), []
    for b, g in itertools.product(*map(range, rows.shape[:2])):
        index = faiss.IndexScalarQuantizer(rows.shape[3], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        index.train(rows[b, g].numpy())
        codes[b, g] = torch.from_numpy(index.sa_encode(rows[b, g].numpy()))
        back[b, g] = torch.from_numpy(index.sa_decode(codes[b, g].numpy()))
        ranges.append(torch.from_numpy(faiss.vector_to_array(index.sq.trained)))
    return codes.to(DEVICE), back.to(DEVICE), torch.stack(ranges).view(*rows.shape[:2], 2, -1).to(DEVICE)


SQ8 = [(FULL, 64, 2, 3), (BRAIN, 80, 1, 1), (HALF, 128, 1, 16)]


@pytest.mark.parametrize(
    ("dtype", "dim", "groups", "share"),
    SQ8 + on_gpu([1, 2], range(1, 17)),
)
def test_attention_and_scores_of_8_bit_codes(dtype, dim, groups, share):
    queries = randn(2, groups * share, 1, dim, dtype=dtype)
    codes, keys, key_range = sq8(torch.randn(2, groups, 70, dim) + torch.randn(dim) * 3)
    value_codes, values, value_range = sq8(torch.randn(2, groups, 70, dim) + 1)
    lengths = ints([70, 31])
    segment = Segment(codes, value_codes, lengths, key_range=key_range, value_range=value_range)
    close = FULL if dtype == FULL else BRAIN  # weights are rounded to bfloat16 beside codes
    loose = {"atol": 1e-3, "rtol": 1e-5}  # in bfloat16 queries keep 16 bits
    output, lse = kernels.attend(queries, segment)
    expected = attention64(queries, [prefix(keys, values, lengths)])
    assert error(output[:, :, 0], expected[0]) < ERROR[close]
    assert torch.allclose(lse.double(), expected[1], **loose)
    full = randn(2, groups, 70, dim, dtype=dtype)
    ids = torch.stack([torch.randperm(70)[:9] for _ in range(2 * groups)]).view(2, groups, 9).to(DEVICE)
    ids[:, :, 4] = -1
    output, lse = kernels.attend(queries, Segment(codes, full, ids=ids, key_range=key_range))
    expected = attention64(queries, [(*gathered(keys, full, ids, 1), None)])
    assert error(output[:, :, 0], expected[0]) < ERROR[dtype]
    assert torch.allclose(lse.double(), expected[1], **loose)
    found = kernels.scores(queries, codes, lengths, scaling=0.5, row_range=key_range)
    products = torch.einsum("bgrd,bgnd->bgrn", queries.double().view(2, groups, share, dim), keys.double()) * 0.5
    beyond = torch.arange(70, device=DEVICE) >= lengths[:, None, None]
    assert torch.allclose(found.double(), products.flatten(1, 2).masked_fill(beyond, -torch.inf), atol=4e-3, rtol=1e-4)


def test_misfits_are_named():
    queries, keys, values = randn(1, 4, 1, 64), randn(1, 2, 9, 64), randn(1, 2, 9, 64)
    for call, words in (
        (
            lambda: kernels.decode(queries, keys[..., :32], values, None),
            r"keys \[1, 2, 9, 32\] are not \[1, 2, t, 64\]",
        ),
        (lambda: kernels.decode(queries[:, :3], keys, values, None), "H a multiple of 2"),
        (lambda: kernels.decode(queries, keys, values, ints([1, 2])), r"lengths \[2\] fit neither"),
        (
            lambda: kernels.decode(queries, keys.transpose(2, 3).contiguous().transpose(2, 3), values, None),
            "contiguous",
        ),
        (lambda: kernels.gather(queries, keys, values, ints([[[1]] * 3])), r"ids \[1, 3, 1\] are not \[1, 2 or 4, k\]"),
        (lambda: kernels.insert(keys, values, keys, values, ints([0]), window=4), "do not fit a store of 9"),
        (lambda: kernels.scores(queries, keys, output=keys), "the preallocated"),
        (lambda: kernels.decode(queries, keys.byte(), values, None), "codes need the channels' minima"),
        (lambda: kernels.attend(queries), "at least one segment"),
    ):
        with pytest.raises(KVBenchError, match=words):
            call()


@pytest.mark.parametrize("case", [pytest.param("pinned", marks=GPU)])
def test_host_memory_is_read_in_place(case, implementation):
    queries = randn(1, 8, 1, 128, dtype=BRAIN)
    keys, values = (torch.randn(1, 2, 3000, 128).bfloat16().pin_memory() for _ in range(2))
    ids = torch.randint(0, 3000, (1, 2, 200), device=DEVICE)
    expected = attention64(queries, [(*gathered(keys, values, ids, 1), None)])
    check(kernels.gather(queries, keys, values, ids), expected, BRAIN)


@pytest.mark.parametrize("case", [pytest.param("graph", marks=GPU)])
def test_a_step_is_captured_and_follows_the_device(case, implementation):
    """One graph of insert, bounds, scores, top-k and attention, replayed while positions move on the device."""
    queries, size = randn(1, 8, 1, 128, dtype=BRAIN), 16
    store = [randn(1, 2, 512, 128, dtype=BRAIN) for _ in range(2)]
    low, high = (torch.zeros(1, 2, 32, 128, device=DEVICE, dtype=BRAIN) for _ in range(2))
    position = ints([300])
    kernels.page_bounds(store[0], position, size, low, high)
    new = [randn(1, 2, 1, 128, dtype=BRAIN) for _ in range(2)]

    def step():
        kernels.insert(*store, *new, position)
        kernels.update_bounds(new[0], position, size, low, high)
        position.add_(1)
        best = kernels.page_scores(queries, low, high, position // size).topk(4).indices.int()
        recent = (position - 1) // size
        ids = torch.cat([best, recent.view(1, 1, 1).expand(1, 8, 1)], 2)
        return kernels.gather(queries, *store, ids, unit=size, lengths=position)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for replay in range(20):
        for part in new:
            part.normal_()
        graph.replay()
        length = 302 + replay
        assert int(position) == length
        full = length // size
        pages = store[0][:, :, : full * size].view(1, 2, full, size, 128).double()
        q = queries.double().view(1, 2, 4, 1, 128)
        bounds = torch.maximum(q * pages.amin(3)[:, :, None], q * pages.amax(3)[:, :, None]).sum(-1).view(1, 8, full)
        ids = torch.cat([bounds.topk(4).indices, torch.full((1, 8, 1), (length - 1) // size, device=DEVICE)], 2)
        expected = attention64(queries, [(*gathered(*store, ids, size, ints([length])), None)])
        check(found, expected, BRAIN)


@pytest.mark.parametrize("dtype", [FULL, HALF, BRAIN])
@pytest.mark.parametrize(("n", "clusters", "dim"), [(1, 1, 16), (150, 7, 64), (70, 33, 80), (131, 20, 8)])
def test_points_find_the_nearest_centroid_and_are_added_up(n, clusters, dim, dtype):
    points, centroids = randn(3, n + 2, dim, dtype=dtype)[:, 1:-1], randn(3, clusters, dim, scale=0.5)
    found = kernels.nearest(points, centroids)
    distances = torch.cdist(points.double(), centroids.double())
    chosen = distances.gather(-1, found[..., None])[..., 0]
    slack = 1e-3 if DEVICE.type == "cuda" else 1e-5
    assert found.dtype == torch.int64
    assert (chosen <= distances.amin(-1) * (1 + slack)).all()
    assert (kernels.nearest(points, points.new_zeros(3, clusters, dim)) == 0).all()
    sums, sizes = kernels.cluster_sums(points, found, clusters)
    ones = torch.nn.functional.one_hot(found, clusters).double()
    assert torch.equal(sizes, ones.sum(1).long())
    assert error(sums, ones.transpose(1, 2) @ points.double()) < 1e-6
    again, _ = kernels.cluster_sums(points, found, clusters)
    assert torch.equal(sums, again)


COLUMNS = [
    (1, (32, 32), FULL),
    (31, (16, 64), HALF),
    (64, (64, 16), BRAIN),
    (97, (32, 32), HALF),
    (97, (16, 64), BRAIN),
    (97, (64, 16), FULL),
    (150, (32, 32), BRAIN),
]


@pytest.mark.parametrize(("tokens", "tiles", "dtype"), COLUMNS)
def test_columns_of_causal_attention_are_summed(tokens, tiles, dtype, monkeypatch):
    from kvbench.kernels import columns

    if DEVICE.type == "cpu":
        for sizes in (columns.TILES, columns.FULL):
            monkeypatch.setitem(sizes, "rows", (*tiles, 4, 2))
            monkeypatch.setitem(sizes, "columns", (*tiles, 4, 2))
    queries, keys = randn(2, 6, tokens, 24, dtype=dtype), randn(2, 2, tokens, 24, dtype=dtype)
    weights = queries.double() @ keys.double().repeat_interleave(3, 1).transpose(2, 3) * 0.3
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE).triu(1)
    expected = weights.masked_fill(future, -torch.inf).softmax(-1).sum(2).view(2, 2, 3, tokens).sum(2)
    assert error(columns.column_sums(queries, keys, 0.3), expected) < ERROR[dtype]


@pytest.mark.parametrize(
    ("m", "n", "k", "dim", "dtype"),
    [(1, 1, 3, 16, HALF), (3, 700, 9, 24, BRAIN), (2, 333, 1, 80, FULL), (3, 130, 9, 24, HALF)],
)
@pytest.mark.parametrize("ties", [False, True])
def test_nearest_keys_are_exact_and_equal_ones_come_by_id(m, n, k, dim, dtype, ties, monkeypatch):
    # small whole numbers: every product is exact, and many are equal
    scale = 3.0 if ties else 300.0
    queries = randn(4, m, dim, scale=scale).round().to(dtype)
    keys = randn(2, n, dim, scale=scale / 3).round().to(dtype)
    if ties:
        keys[:, 1::2] = keys[:, ::2][:, : keys[:, 1::2].shape[1]]
    scores = queries.double() @ keys.double().repeat_interleave(2, 0).transpose(1, 2)
    if not ties:
        scores = (queries.float() @ keys.float().repeat_interleave(2, 0).transpose(1, 2)).double()
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].int()
    for way in ("auto", "unfused"):
        found = kernels.top_keys(queries, keys, k, way=way)
        if ties:
            assert torch.equal(found, expected)
        else:  # scores that differ by rounding may change places
            got, best = scores.gather(-1, found.long()), scores.gather(-1, expected.long())
            torch.testing.assert_close(got, best, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("n", "m", "width", "most", "count"), [(16, 12, 8, 4, 16), (12, 30, 5, 8, 32), (9, 3, 4, 2, 16)]
)
def test_candidates_are_the_keys_most_often_in_the_same_lists(n, m, width, most, count):
    from kvbench.kernels.cooccur import FEW, NEARER, candidates, lists_of

    knn = torch.stack([torch.stack([torch.randperm(n)[:width] for _ in range(m)]) for _ in range(2)]).int().to(DEVICE)
    ids, scores = candidates(lists_of(knn, n), most, count)
    block = support.next_power_of_2(width)
    for graph in range(2):
        lists = knn[graph].tolist()
        frequency = [sum(key in row for row in lists) for key in range(n)]
        for node in range(n):
            entries = [query for query in range(m) if node in lists[query]]
            taken = min(len(entries), most)
            mine = [entries[j * len(entries) // taken] for j in range(taken)]
            found = {}
            for other in {key for query in mine for key in lists[query]} - {node}:
                times = sum(other in lists[query] for query in mine)
                rank = min(lists[query].index(other) for query in mine if other in lists[query])
                found[other] = times * frequency[other] ** -0.25 * (1 - rank * NEARER / block)
            got = dict(zip(ids[graph, node].tolist(), scores[graph, node].tolist(), strict=True))
            got.pop(-1, None)
            allowed = count if len(entries) > FEW else count // 2
            assert len(got) == min(len(found), allowed)
            assert sorted(got.values()) == pytest.approx(sorted(found.values())[-allowed:], rel=1e-5)
            assert all(found[key] == pytest.approx(score, rel=1e-5) for key, score in got.items())


@pytest.mark.parametrize(("dtype", "c"), [(FULL, 16), (BRAIN, 16), (BRAIN, 64)])
def test_candidates_near_a_kept_one_are_passed_over(dtype, c):
    from kvbench.kernels.occlude import occlude

    n, d, degree = 12 if c == 16 else 40, 16, 5
    keys = randn(2, n, d, dtype=dtype)
    ids = torch.stack([torch.randperm(n) for _ in range(2 * n)]).view(2, n, n)
    ids = torch.nn.functional.pad(torch.where(ids == torch.arange(n)[None, :, None], -1, ids), (0, c - n), value=-1)
    ids[:, ::2, c // 2 :] = -1
    scores = torch.randint(1, 6, (2, n, c)).float()
    most = torch.where(torch.arange(2 * n).view(2, n) % 3 == 0, -2, 4).int()
    links, lengths = occlude(keys, ids.int().to(DEVICE), scores.to(DEVICE), most.to(DEVICE), degree)
    points = keys.double().cpu()
    for graph, node in itertools.product(range(2), range(n)):
        limit = int(most[graph, node])
        real = [i for i in range(c) if ids[graph, node, i] >= 0]

        def distance(a, b, graph=graph):
            return float((points[graph, a] - points[graph, b]).square().sum())

        chosen = [int(ids[graph, node, i]) for i in real]
        order = sorted(
            range(len(real)),
            key=lambda i: distance(chosen[i], node) if limit < 0 else -float(scores[graph, node, real[i]]),
        )
        kept = []
        for i in order:
            if all(distance(chosen[i], other) >= distance(chosen[i], node) for other in kept):
                kept.append(chosen[i])
        kept = kept[: min(abs(limit), degree)]
        assert links[graph, node].tolist() == kept + [-1] * (degree - len(kept))
        assert lengths[graph, node] == len(kept)


@pytest.mark.parametrize(("n", "c", "degree"), [(20, 6, 4), (40, 16, 16), (9, 3, 5)])
def test_links_come_by_their_detours(n, c, degree):
    from kvbench.kernels.detours import by_detours

    near = torch.stack([
        torch.stack([torch.tensor([j for j in torch.randperm(n).tolist() if j != node][:c]) for node in range(n)])
        for _ in range(2)
    ])  # fmt: skip
    found = by_detours(near.int().to(DEVICE), degree)
    for graph, node in itertools.product(range(2), range(n)):
        lists = near[graph].tolist()
        mine = lists[node]
        detours = [
            sum(mine[place] in lists[mine[middle]][:place] for middle in range(place)) for place in range(c)
        ]  # fmt: skip
        expected = sorted(range(c), key=lambda place: (detours[place], place))[:degree]
        assert found[graph, node].tolist() == [mine[place] for place in expected]
