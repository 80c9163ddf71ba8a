"""Attention over a part of KIVI's tokens: whole tiles of codes, and any tokens, coded or late."""

from __future__ import annotations

from kvbench.kernels.segments import capped
from kvbench.kernels.support import jit

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def any_tokens(
    begin: tl.tensor, stop: tl.tensor, coded_keys: tl.tensor, coded_values: tl.tensor, q: tl.tensor, qh: int,
    scale: float, cap: float, first_head: tl.tensor,
    key_codes: tl.tensor, key_scales: tl.tensor, value_codes: tl.tensor, value_scales: tl.tensor,
    late_keys: tl.tensor, late_values: tl.tensor, kct: int, kst: int, vct: int, vst: int, kt: int, vt: int,
    late_k: int, late_v: int,
    R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_SPAN: tl.constexpr, GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, TOKENS: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Peak, total and weighted values of a head's tokens from `begin` to `stop`, coded or late.

    A row's bytes hold SPAN channels (of SPAN·GROUP numbers for keys) a plane, padded to BLOCK_SPAN; channels come in
    the order in which planes unpack.
    """
    r = tl.arange(0, ROWS)
    s = tl.arange(0, BLOCK_SPAN)
    i = tl.arange(0, PLANES * BLOCK_SPAN)
    c = i // BLOCK_SPAN * SPAN + i % BLOCK_SPAN
    real = i % BLOCK_SPAN < SPAN
    shifts = tl.arange(0, PLANES) * BITS
    head = first_head + r
    own = r < R
    queries = tl.load(q + head[:, None] * qh + c[None, :], mask=own[:, None] & real[None, :], other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, PLANES * BLOCK_SPAN), tl.float32)
    for at in range(begin, stop, TOKENS):
        t = at + tl.arange(0, TOKENS)
        valid = t < stop
        coded = valid & (t < coded_keys)
        group_of = (t // GROUP).to(tl.int64)
        packed = tl.load(
            key_codes + (group_of * kct + t % GROUP)[None, :] + (s * GROUP)[:, None],
            mask=coded[None, :] & (s < SPAN)[:, None], other=0,
        )  # fmt: skip
        codes = (packed[None, :, :].to(tl.int32) >> shifts[:, None, None]) & (2**BITS - 1)
        codes = tl.reshape(codes, (PLANES * BLOCK_SPAN, TOKENS)).to(tl.float32)
        if GROUP % TOKENS == 0:  # the tile lies in one group, since `begin` is a multiple of a tile
            first = key_scales + tl.cast(at // GROUP, tl.int64) * kst
            steps = tl.load(first + c, mask=real & (at + 0 * i < coded_keys), other=0.0)[:, None].to(tl.float32)
            lows = tl.load(first + D + c, mask=real & (at + 0 * i < coded_keys), other=0.0)[:, None].to(tl.float32)
        else:
            place = key_scales + (group_of * kst)[None, :] + c[:, None]
            steps = tl.load(place, mask=coded[None, :] & real[:, None], other=0.0).to(tl.float32)
            lows = tl.load(place + D, mask=coded[None, :] & real[:, None], other=0.0).to(tl.float32)
        late = tl.load(
            late_keys + ((t % late_k).to(tl.int64) * kt)[None, :] + c[:, None],
            mask=(valid & (t >= coded_keys))[None, :] & real[:, None], other=0.0,
        )  # fmt: skip
        rows = tl.where(coded[None, :], lows + steps * codes, late.to(tl.float32)).to(queries.dtype)
        logits = tl.dot(queries, rows, input_precision="ieee") * scale
        if CAPPED:
            logits = capped(logits, cap)
        logits = tl.where(valid[None, :], logits * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(peak - shift)
        peak = higher
        total = total * fade + tl.sum(weights, 1)
        coded = valid & (t < coded_values)
        packed = tl.load(
            value_codes + (t.to(tl.int64) * vct)[:, None] + s[None, :],
            mask=coded[:, None] & (s < SPAN)[None, :], other=0,
        )  # fmt: skip
        codes = (packed[:, None, :].to(tl.int32) >> shifts[None, :, None]) & (2**BITS - 1)
        if VALUE_GROUP % SPAN == 0:  # a plane's channels share a scale
            place = value_scales + (t.to(tl.int64) * vst)[:, None] + (shifts // BITS * SPAN // VALUE_GROUP)[None, :]
            steps = tl.load(place, mask=coded[:, None] & (shifts >= 0)[None, :], other=0.0).to(tl.float32)
            lows = tl.load(place + D // VALUE_GROUP, mask=coded[:, None] & (shifts >= 0)[None, :], other=0.0)
            rows = lows.to(tl.float32)[:, :, None] + steps[:, :, None] * codes.to(tl.float32)
            rows = tl.reshape(rows, (TOKENS, PLANES * BLOCK_SPAN))
        else:
            place = value_scales + (t.to(tl.int64) * vst)[:, None] + (c // VALUE_GROUP)[None, :]
            steps = tl.load(place, mask=coded[:, None] & real[None, :], other=0.0).to(tl.float32)
            lows = tl.load(place + D // VALUE_GROUP, mask=coded[:, None] & real[None, :], other=0.0).to(tl.float32)
            rows = lows + steps * tl.reshape(codes, (TOKENS, PLANES * BLOCK_SPAN)).to(tl.float32)
        late = tl.load(
            late_values + ((t % late_v).to(tl.int64) * vt)[:, None] + c[None, :],
            mask=(valid & (t >= coded_values))[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        rows = tl.where(coded[:, None], rows, late.to(tl.float32)).to(queries.dtype)
        sums = sums * fade[:, None] + tl.dot(weights.to(queries.dtype), rows, input_precision="ieee")
    return peak, total, sums


@jit
def _codes(packed: tl.tensor, shift: int, BITS: tl.constexpr, LIKE: tl.constexpr) -> tl.tensor:
    """A plane's codes as numbers; of 16 bits with an offset that a mantissa holds (OFFSET), to save conversion."""
    codes = (packed.to(tl.int32 if LIKE == 0 else tl.int16) >> shift) & (2**BITS - 1)
    if LIKE == 0:
        numbers = codes.to(tl.float32)
    elif LIKE == 1:
        numbers = (codes | 0x6400).to(tl.float16, bitcast=True)
    elif BITS > 4:
        numbers = codes.to(tl.float32).to(tl.bfloat16)
    else:
        numbers = (codes | 0x4300).to(tl.bfloat16, bitcast=True)
    return numbers


@jit
def coded_tiles(
    begin: tl.tensor, stop: tl.tensor, q: tl.tensor, qh: int, scale: float, cap: float, first_head: tl.tensor,
    key_codes: tl.tensor, key_scales: tl.tensor, value_codes: tl.tensor, value_scales: tl.tensor,
    kct: int, kst: int, vct: int, vst: int,
    R: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, NUMBER: tl.constexpr, WIDTH: tl.constexpr,
    CAPPED: tl.constexpr, LIKE: tl.constexpr, OFFSET: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Peak, total and weighted values, in four pieces of channels, of whole tiles of NUMBER groups of coded tokens.

    Scales are folded into queries and weights, so that the codes themselves are the operands of the products. A row
    stands for one query head and one group of the tile, whose tokens alone it weighs.
    """
    ROWS: tl.constexpr = BLOCK_R * NUMBER
    TOKENS: tl.constexpr = NUMBER * GROUP
    i = tl.arange(0, ROWS)
    r = i % BLOCK_R
    part = i // BLOCK_R
    t = tl.arange(0, TOKENS)
    w = tl.arange(0, WIDTH)
    own = r < R
    mine = part[:, None] == (t // GROUP)[None, :]
    query = q + (first_head + r)[:, None] * qh + w[None, :]
    scales_of = key_scales + part[:, None] * kst + w[None, :]
    key_place = key_codes + (t // GROUP * kct + t % GROUP)[None, :]
    value_place = value_codes + (t * vct)[:, None]
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums0 = tl.zeros((ROWS, WIDTH), tl.float32)
    sums1 = tl.zeros((ROWS, WIDTH), tl.float32)
    sums2 = tl.zeros((ROWS, WIDTH), tl.float32)
    sums3 = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in range(begin, stop):
        group = tl.cast(tile, tl.int64) * NUMBER
        token = tl.cast(tile, tl.int64) * TOKENS
        logits = tl.zeros((ROWS, TOKENS), tl.float32)
        rest = tl.zeros((ROWS,), tl.float32)
        for piece in tl.static_range(D // WIDTH):
            numbers = tl.load(query + piece * WIDTH, mask=own[:, None], other=0.0).to(tl.float32)
            steps = tl.load(scales_of + group * kst + piece * WIDTH).to(tl.float32)
            lows = tl.load(scales_of + group * kst + D + piece * WIDTH).to(tl.float32)
            packed = tl.load(key_place + group * kct + ((piece * WIDTH % SPAN + w) * GROUP)[:, None])
            codes = _codes(packed, piece * WIDTH // SPAN * BITS, BITS, LIKE)
            folded = (numbers * steps).to(codes.dtype)
            rest += tl.sum(numbers * lows - OFFSET * folded.to(tl.float32), 1)
            logits += tl.dot(folded, codes, input_precision="ieee")
        logits = (logits + rest[:, None]) * scale
        if CAPPED:
            logits = capped(logits, cap)
        logits = tl.where(mine, logits * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        fade = tl.exp2(peak - higher)
        peak = higher
        total = total * fade + tl.sum(weights, 1)
        for piece in tl.static_range(D // WIDTH):
            place = value_scales + (token + t) * vst + piece * WIDTH // VALUE_GROUP
            steps = tl.load(place).to(tl.float32)
            lows = tl.load(place + D // VALUE_GROUP).to(tl.float32)
            packed = tl.load(value_place + token * vct + (piece * WIDTH % SPAN + w)[None, :])
            codes = _codes(packed, piece * WIDTH // SPAN * BITS, BITS, LIKE)
            folded = (weights * steps[None, :]).to(codes.dtype)
            found = tl.dot(folded, codes, input_precision="ieee")
            found += tl.sum(weights * lows[None, :] - OFFSET * folded.to(tl.float32), 1)[:, None]
            if piece == 0:
                sums0 = sums0 * fade[:, None] + found
            elif piece == 1:
                sums1 = sums1 * fade[:, None] + found
            elif piece == 2:
                sums2 = sums2 * fade[:, None] + found
            else:
                sums3 = sums3 * fade[:, None] + found
    return peak, total, sums0, sums1, sums2, sums3


@jit
def joined(sums: tl.tensor, scale: tl.tensor, BLOCK_R: tl.constexpr, NUMBER: tl.constexpr) -> tl.tensor:
    """The rows of each query head added up."""
    return tl.sum(tl.reshape(sums * scale[:, None], (NUMBER, BLOCK_R, sums.shape[1])), 0)
