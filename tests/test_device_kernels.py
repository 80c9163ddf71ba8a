"""Kernels that weigh, rebuild and rank on the device, Triton's and their torch twins, against float64 references."""

import itertools

import pytest
import torch
from kernel_references import DEVICE, ERROR, error, ints, randn

from kvbench import kernels
from kvbench.contract.errors import KVBenchError
from kvbench.kernels import LowRankKeys, support


@pytest.fixture(params=["torch", "triton"], autouse=True)
def implementation(request):
    if request.param == "triton" and support.triton is None:
        pytest.skip("triton is not installed")
    torch.manual_seed(5)
    with kernels.using(request.param):
        yield request.param


@pytest.mark.parametrize("reduce", ["sum", "max", "margin"])
@pytest.mark.parametrize(("groups", "share", "n"), [(2, 3, 1), (1, 1, 40), (2, 4, 2500), (1, 16, 1025)])
def test_group_weights(reduce, groups, share, n):
    logits = randn(2, groups * share, n, scale=3.0)
    counts = ints([n, n // 2])
    sizes = torch.randint(0, 3, (2, groups, n), dtype=torch.int32).to(DEVICE)
    ranks = torch.randint(-1, 4, (2, groups, n), dtype=torch.int32).to(DEVICE)
    below = ints([2, 0])
    place = torch.arange(n, device=DEVICE)
    every = torch.ones(2, groups, n, dtype=torch.bool, device=DEVICE)
    exists = every & (place < counts[:, None, None])
    first = (ranks >= 0) & (ranks < below[:, None, None])
    for options, there, part, forced in (
        ({}, every, every, ~every),
        ({"counts": counts}, exists, exists, ~every),
        ({"counts": counts, "sizes": sizes}, exists, exists & (sizes > 0), ~every),
        ({"counts": counts, "forced": (ranks, below)}, exists, exists & ~first, exists & first),
    ):
        grouped = logits.double().view(2, groups, share, n).masked_fill(~part[:, :, None], -torch.inf)
        weights = torch.nan_to_num(grouped.softmax(-1))
        if reduce == "margin":
            weights = grouped - torch.nan_to_num(grouped.amax(-1, keepdim=True), neginf=0.0)
        expected = weights.sum(2) if reduce == "sum" else weights.amax(2)
        expected = expected.masked_fill(~there, -torch.inf).masked_fill(forced, share + 1.0)
        found = kernels.group_weights(logits, groups, reduce, **options)
        assert torch.allclose(found.double(), expected, rtol=2e-5, atol=1e-9)


def test_group_weights_say_what_they_take():
    with pytest.raises(KVBenchError, match="multiple of 2"):
        kernels.group_weights(randn(1, 3, 4), 2, "sum")
    with pytest.raises(KVBenchError, match="not both"):
        kernels.group_weights(
            randn(1, 2, 4), 2, "sum", sizes=ints([[[1] * 4] * 2]), forced=(ints([[[1] * 4] * 2]), ints([1]))
        )
    with pytest.raises(KVBenchError, match="marks of slots"):
        kernels.group_weights(randn(1, 2, 4), 2, "sum", sizes=ints([[[1] * 4]]))


@pytest.mark.parametrize(
    ("dtype", "dim", "rank", "chunk"),
    [(torch.float32, 64, 40, 8), (torch.bfloat16, 80, 33, 4), (torch.float16, 128, 160, 6), (torch.float32, 8, 3, 4)],
)
def test_rebuild(dtype, dim, rank, chunk):
    batch, groups, chunks, kept = 2, 2, 9, 2
    n = chunks * chunk
    half = dim // 2
    angle = torch.randn(n, half).to(DEVICE)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([-angle.sin(), angle.sin()], 1)
    partner = torch.arange(dim, device=DEVICE, dtype=torch.int32).roll(half)
    ranks = torch.full((batch, groups, chunks), -1, dtype=torch.int32, device=DEVICE)
    for b, g in itertools.product(range(batch), range(groups)):
        for place, at in enumerate(torch.randperm(chunks)[:kept].tolist()):
            ranks[b, g, at] = place
    basis = randn(batch, groups, rank, dim, dtype=dtype, scale=rank**-0.5)
    held = LowRankKeys(
        randn(batch, n, rank, dtype=dtype), basis, basis[..., partner.long()].contiguous(), cos, sin, partner,
        ranks, randn(batch, groups, kept * chunk, dim, dtype=dtype), chunk,
    )  # fmt: skip
    values = randn(batch, groups, n, dim, dtype=dtype)
    ids = torch.stack([torch.randperm(chunks)[:5].sort().values for _ in range(4)]).view(2, 2, 5).int().to(DEVICE)
    ids[1, 0, 3:] = -1
    keys_out, values_out = (torch.full((batch, groups, 5 * chunk, dim), 7.0, dtype=dtype, device=DEVICE) for _ in "kv")
    kernels.rebuild(ids, held, values, keys_out, values_out)
    expected, fetched = torch.full(keys_out.shape, 7.0, dtype=torch.float64), torch.full(keys_out.shape, 7.0)
    for b, g, j, i in itertools.product(range(batch), range(groups), range(5), range(chunk)):
        block, slot = int(ids[b, g, j]), j * chunk + i
        if block < 0:
            continue
        token = block * chunk + i
        plain = held.coefficients[b, token].double() @ held.basis[b, g].double()
        row = plain * cos[token].double() + plain.roll(half) * sin[token].double()
        if ranks[b, g, block] >= 0:
            row = held.exact[b, g, int(ranks[b, g, block]) * chunk + i].double()
        expected[b, g, slot], fetched[b, g, slot] = row.cpu(), values[b, g, token].float().cpu()
    assert torch.equal(values_out.float().cpu(), fetched)
    assert error(keys_out.cpu(), expected) < 2 * ERROR[dtype]


def test_rebuild_says_what_it_takes():
    held = LowRankKeys(
        torch.zeros(1, 8, 2), *[torch.zeros(1, 1, 2, 4)] * 2, *[torch.zeros(8, 4)] * 3, *[torch.zeros(1)] * 2, 4
    )
    out = torch.zeros(1, 1, 8, 4)
    with pytest.raises(KVBenchError, match="rebuilt keys"):
        kernels.rebuild(torch.zeros(1, 1, 2, dtype=torch.int32), held, out, out[..., :2], out)


@pytest.mark.parametrize("count", [1, 7, 1300])
def test_take_clusters(count):
    batch, groups, most, most_next = 3, 2, 40, 9
    sizes = torch.randint(0, 6, (batch, groups, count), dtype=torch.int32)
    order = torch.stack([torch.randperm(count) for _ in range(batch * groups)]).view(batch, groups, count)
    starts = (sizes.cumsum(-1) - sizes).int()
    members = torch.stack([torch.randperm(6 * count) for _ in range(batch * groups)]).view(batch, groups, -1).int()
    left = torch.randint(0, most, (batch, groups), dtype=torch.int32)
    left[1] = 0
    zone, number = torch.tensor([6, 6, 2], dtype=torch.int32), torch.full((batch,), count, dtype=torch.int32)
    given = [part.to(DEVICE) for part in (order, sizes, starts, members, left, zone, number)]
    tokens, following, masses = (part.cpu() for part in kernels.take_clusters(*given, most, most_next))
    for b, g in itertools.product(range(batch), range(groups)):
        chosen, expected = order[b, g].tolist(), []
        while chosen and len(expected) + int(sizes[b, g, chosen[0]]) <= int(left[b, g]):
            i = chosen.pop(0)
            expected += members[b, g, starts[b, g, i] : starts[b, g, i] + sizes[b, g, i]].tolist()
        assert tokens[b, g].tolist() == expected + [-1] * (most - len(expected))
        near = chosen[: int(zone[b])] if int(left[b].max()) else []
        assert following[b, g].tolist() == near + [-1] * (most_next - len(near))
        for i, mass in zip(near, masses[b, g].tolist(), strict=False):
            assert mass == pytest.approx(float(sizes[b, g, i].float().log()))


def test_take_clusters_says_what_it_takes():
    six = torch.ones(1, 1, 6, dtype=torch.int32)
    with pytest.raises(KVBenchError, match="the zone"):
        kernels.take_clusters(six.long(), six, six, six, six[..., 0], six[0], six[0, 0, :1], 4, 4)


@pytest.mark.parametrize(("count", "dim", "batch", "groups"), [(1, 8, 2, 3), (40, 80, 2, 3), (2100, 16, 1, 2)])
def test_key_differences(count, dim, batch, groups):
    held = randn(batch, groups, count, dim + 8)[..., :dim]
    real = torch.rand(batch, groups, count).to(DEVICE) < 0.8
    real[0, 0] = False
    held[-1, 1, 0] = 0
    keys = randn(batch, groups, 1, dim)
    old = torch.nn.functional.normalize(held.double(), dim=-1) * real[..., None]
    new = torch.nn.functional.normalize(keys.double(), dim=-1)
    anchor = old.sum(2, keepdim=True) + new
    found, fresh = kernels.key_differences(held, real, keys)
    assert torch.allclose(found.double(), -torch.cosine_similarity(old, anchor, dim=-1), atol=2e-6)
    assert torch.allclose(fresh.double(), -torch.cosine_similarity(new, anchor, dim=-1), atol=2e-6)
    output = torch.empty(batch, groups, count, device=DEVICE)
    assert kernels.key_differences(held, real, keys, output=output)[0] is output
    with pytest.raises(KVBenchError, match="marks"):
        kernels.key_differences(held, real.int(), keys)


@pytest.mark.parametrize(("dtype", "groups", "share", "dim"), [(torch.float32, 2, 3, 80), (torch.float16, 1, 8, 16)])
def test_turn(dtype, groups, share, dim):
    queries = randn(2, groups * share, 1, dim + 8, dtype=dtype)[..., :dim]
    cos, sin = randn(2, dim), randn(2, dim)
    partner = torch.arange(dim, device=DEVICE, dtype=torch.int32).roll(dim // 2)
    plain = queries.double()
    expected = plain * cos.double()[:, None, None] + plain.roll(dim // 2, -1) * sin.double()[:, None, None]
    turned, asked, summed = kernels.turn(queries, cos, sin, partner, groups)
    assert error(turned, expected) < ERROR[dtype]
    assert error(asked, expected.view(2, groups, share, dim).sum(2)) < 2 * ERROR[dtype]
    assert error(summed, plain.reshape(2, groups, share, dim).sum(2)) < ERROR[dtype]
    with pytest.raises(KVBenchError, match="cosines"):
        kernels.turn(queries, cos[:1], sin, partner, groups)


def lowbias32(x):
    """The published function, in Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_lots():
    heads, steps, counts = ints([3, 2**33 + 5], torch.int64), ints([7, 123456]), ints([1100, 4])
    found = kernels.lots(heads, steps, counts, 1100).cpu()
    for b, h, slot in itertools.product(range(2), range(2), (0, 1, 3, 4, 1099)):
        if slot >= int(counts[b]):
            assert found[b, h, slot] == -torch.inf
            continue
        mixed = lowbias32(lowbias32(int(heads[h]) % 2**32) ^ lowbias32(int(steps[b])))
        bits = lowbias32(mixed ^ slot) % 0x7F800000
        assert found[b, h, slot].view(torch.int32).item() == bits


@pytest.mark.parametrize(("dtype", "dim", "share"), [(torch.float32, 80, 1), (torch.bfloat16, 64, 3)])
def test_fetch(dtype, dim, share):
    groups, n, k, room = 2, 50, 21, 25
    keys, values = randn(2, groups, n, dim, dtype=dtype), randn(2, groups, n, dim + 8, dtype=dtype)[..., 8:]
    sets = groups * share
    ids = torch.stack([torch.randperm(n)[:k] for _ in range(2 * sets)]).view(2, sets, k).int().to(DEVICE)
    ids[0, 1, 5:] = -1
    slots = torch.stack([torch.randperm(room)[:k] for _ in range(2 * sets)]).view(2, sets, k).int().to(DEVICE)
    slots[1, 0, 3] = -1  # with a token that is nowhere, either
    ids[1, 0, 3] = -1
    for where in (None, slots):
        outs = [torch.full((2, sets, room, dim), 7.0, dtype=dtype, device=DEVICE) for _ in "kv"]
        expected = [out.clone() for out in outs]
        places = kernels.fetch(ids, keys, values, *outs, where)
        for b, s, j in itertools.product(range(2), range(sets), range(k)):
            token, slot = int(ids[b, s, j]), j if where is None else int(slots[b, s, j])
            if token >= 0:
                for out, rows in zip(expected, (keys, values), strict=True):
                    out[b, s, slot] = rows[b, s // share, token]
            gone = token < 0 if where is None else slot < 0
            assert int(places[b, s, j]) == (-1 if gone else slot + s % share * room)
        assert torch.equal(outs[0], expected[0]) and torch.equal(outs[1], expected[1])
    with pytest.raises(KVBenchError, match="more than the 20 slots"):
        kernels.fetch(ids, keys, values, *[out[:, :, :20].contiguous() for out in outs])


def test_a_hot_set_holds_what_was_asked_for_last():
    sets, n, room, k = 3, 60, 17, 9
    hot = kernels.HotSlots.empty(2, sets, n, room, DEVICE)
    held = torch.full((2, sets, room), -1)  # the token whose row lies in each slot
    found = asked = 0
    for step in range(25):
        ids = torch.stack([torch.randperm(24)[:k] + step // 4 for _ in range(2 * sets)]).view(2, sets, k).int()
        ids[0, 0, step % k :] = -1
        slots, missing = (part.cpu() for part in kernels.hold_hot(ids.to(DEVICE), hot, ints([step, step + 7])))
        for b, s, j in itertools.product(range(2), range(sets), range(k)):
            token, slot = int(ids[b, s, j]), int(slots[b, s, j])
            if token < 0:
                assert slot == int(missing[b, s, j]) == -1
                continue
            hit = token in held[b, s].tolist() and int(missing[b, s, j]) < 0
            found, asked = found + hit, asked + 1
            assert hit or int(missing[b, s, j]) == token
        for b, s, j in itertools.product(range(2), range(sets), range(k)):
            if int(missing[b, s, j]) >= 0:
                held[b, s, int(slots[b, s, j])] = missing[b, s, j]
        for b, s, j in itertools.product(range(2), range(sets), range(k)):
            if int(ids[b, s, j]) >= 0:
                assert held[b, s, int(slots[b, s, j])] == ids[b, s, j]
        assert torch.equal(hot.token_in.cpu(), held.int())
    assert hot.turn[..., 1:].sum((0, 1)).tolist() == [found, asked] and 0 < found < asked
    with pytest.raises(KVBenchError, match="hot set"):
        kernels.hold_hot(ints([[[1] * 18] * 3] * 2), hot, ints([1, 1]))


@pytest.mark.parametrize(("dtype", "parts", "known", "sub"), [(torch.float32, 2, 64, 40), (torch.bfloat16, 4, 7, 16)])
def test_pq_encode(dtype, parts, known, sub):
    keys = randn(2, 3, 1, parts * sub, dtype=dtype)
    centroids = randn(2, 3, parts, known, sub)
    halves = centroids.square().sum(-1) / 2
    halves[1, :, :, known - 2 :] = torch.inf  # a row with fewer of them
    codes = torch.full((2, 3, parts, 20), 255, dtype=torch.uint8, device=DEVICE)
    kernels.pq_encode(keys, centroids, halves, codes, ints([9, 14]), 4)
    points = keys.double().view(2, 3, parts, 1, sub)
    distances = (points - centroids.double()).square().sum(-1)
    distances[1, :, :, known - 2 :] = torch.inf
    expected = torch.full_like(codes, 255)
    expected[0, :, :, 5], expected[1, :, :, 10] = distances[0].argmin(-1), distances[1].argmin(-1)
    assert torch.equal(codes, expected)
    with pytest.raises(KVBenchError, match="do not fit centroids"):
        kernels.pq_encode(keys, centroids, halves[:1], codes, ints([9, 14]), 4)


@pytest.mark.parametrize(("dtype", "dim", "bits", "tables"), [(torch.float32, 40, 10, 7), (torch.bfloat16, 8, 16, 40)])
def test_buckets_and_collisions(dtype, dim, bits, tables):
    groups, share, n = 2, 3, 9
    planes, mean = randn(dim, tables * bits), randn(2, groups, 1, dim)
    keys, queries = randn(2, groups, n, dim, dtype=dtype), randn(2, groups * share, 1, dim, dtype=dtype)
    codes = torch.full((2, groups, tables, n + 4), 7, dtype=torch.int16, device=DEVICE)
    for token in range(n):
        kernels.hash_buckets(keys[:, :, token : token + 1], planes, bits, codes, ints([token, token + 4]), mean)
    asked = torch.zeros(2, groups * share, tables, dtype=torch.int16, device=DEVICE)
    kernels.hash_buckets(queries, planes, bits, asked)

    def expected(vector, middle):
        signs = ((vector.double() - middle.double()) @ planes.double() > 0).view(tables, bits).tolist()
        return [sum(bit << i for i, bit in enumerate(row)) for row in signs]

    for b, g, token in itertools.product(range(2), range(groups), range(0, n, 7)):
        found = codes[b, g, :, token + 4 * b].int().tolist()
        assert [code % 2**16 for code in found] == expected(keys[b, g, token], mean[b, g, 0])
    for b, h in itertools.product(range(2), range(groups * share)):
        found = asked[b, h].int().tolist()
        assert [code % 2**16 for code in found] == expected(queries[b, h, 0], torch.zeros(dim, device=DEVICE))
    codes = torch.randint(0, 3, codes.shape, dtype=torch.int16).to(DEVICE)
    asked = torch.randint(0, 3, asked.shape, dtype=torch.int16).to(DEVICE)
    scores = randn(2, groups * share, n + 4)
    common = (codes.repeat_interleave(share, dim=1) == asked[..., None]).sum(2)
    kept = scores.masked_fill(common < tables // 3, -torch.inf)
    kernels.keep_collisions(scores, codes, asked, tables // 3)
    assert torch.equal(scores, kept)
    with pytest.raises(KVBenchError, match="do not fit scores"):
        kernels.keep_collisions(scores, codes[..., 1:], asked, 2)


def test_centred_cosines():
    queries, keys, mean = randn(2, 6, 1, 40), randn(2, 6, 35, 40), randn(2, 2, 1, 40)
    keys[0, 0, 0] = mean[0, 0, 0]
    centred = keys.double() - mean.double().repeat_interleave(3, dim=1)
    expected = torch.cosine_similarity(centred, queries.double(), dim=-1)
    assert error(kernels.centred_cosines(queries, keys, mean), expected) < 1e-6
