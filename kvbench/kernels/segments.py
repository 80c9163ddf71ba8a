"""The Triton kernels behind `attention`: one part of one head's attention over a segment, for one to three segments."""

from __future__ import annotations

from kvbench.kernels.sq8 import fold, unfold
from kvbench.kernels.support import jit

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def capped(logits: tl.tensor, cap: tl.tensor) -> tl.tensor:
    """The logits as cap · tanh(x / cap)."""
    small = tl.exp(tl.abs(logits) * (-2.0 / cap))
    return tl.where(logits < 0, -cap, cap) * ((1.0 - small) / (1.0 + small))


@jit
def _segment(
    program: tl.tensor, q: tl.tensor, parts: tl.tensor, part_lses: tl.tensor, qb: int, qh: int, scale: float,
    cap: float, batch: int, first: int,
    k: tl.tensor, v: tl.tensor, kr: tl.tensor, vr: tl.tensor, lengths: tl.tensor, offsets: tl.tensor, ids: tl.tensor,
    bias: tl.tensor,
    kb: int, kg: int, kt: int, vb: int, vg: int, vt: int, lb: int, lg: int, ib: int, ih: int,
    bb: int, bg: int, br: int, count: int, splits: int,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, PER_HEAD: tl.constexpr, LIMITED: tl.constexpr, RAGGED: tl.constexpr,
    BIASED: tl.constexpr, CODED_K: tl.constexpr, CODED_V: tl.constexpr,
) -> None:  # fmt: skip
    """One part of one head: partial output and log-sum-exp. UNIT 0 is dense; PER_HEAD serves one query head."""
    split = program % splits
    program = program // splits
    if PER_HEAD:
        row = program // (G * R)
        list_head = program % (G * R)
        group = list_head // R
        start = list_head % R
    else:
        row = program // G
        group = program % G
        list_head = group
        start = 0
    tokens = count
    limit = count
    if LIMITED:
        limit = tl.load(lengths + row * lb + group * lg)
        if UNIT == 0:
            tokens = tl.minimum(limit, count)
    k += row.to(tl.int64) * kb + group * kg
    v += row.to(tl.int64) * vb + group * vg
    if RAGGED:
        base = tl.load(offsets + row * G + group).to(tl.int64)
        k += base * kt
        v += base * vt
    r = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_D)
    cv = tl.arange(0, BLOCK_DV)
    t = tl.arange(0, TOKENS)
    own = r < (1 if PER_HEAD else R)
    head = group * R + start + r
    queries = tl.load(
        q + row.to(tl.int64) * qb + head[:, None] * qh + c[None, :],
        mask=own[:, None] & (c < D)[None, :], other=0.0,
    )  # fmt: skip
    if UPCAST:
        queries = queries.to(tl.float32)
    if CODED_K:
        scaled, shared = fold(queries.to(tl.float32), kr + (row.to(tl.int64) * G + group) * (2 * D), c, D)
        queries = scaled if UPCAST else scaled.to(tl.bfloat16)
        rest = (scaled - queries.to(tl.float32)).to(tl.bfloat16)  # what bfloat16 leaves out
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    each = tl.cdiv(tl.cdiv(tokens, TOKENS), splits) * TOKENS
    stop = tl.minimum(split * each + each, tokens)
    for at in range(split * each, stop, TOKENS):
        slot = at + t
        valid = slot < stop
        if UNIT == 0:
            token = slot.to(tl.int64)
        else:
            token = tl.load(ids + row.to(tl.int64) * ib + list_head * ih + slot // UNIT, mask=valid, other=-1)
            valid = token >= 0
            token = token.to(tl.int64) * UNIT + slot % UNIT
            if LIMITED:
                valid = valid & (token < limit)
        rows = tl.load(
            k + token[:, None] * kt + c[None, :],
            mask=valid[:, None] if D == BLOCK_D else valid[:, None] & (c < D)[None, :], other=0.0,
        )  # fmt: skip
        if CODED_K:
            rows = (rows.to(tl.float32) - 128.0).to(queries.dtype)
            logits = tl.dot(queries, tl.trans(rows), input_precision="tf32x3") + shared[:, None]
            if not UPCAST:
                logits += tl.dot(rest, tl.trans(rows))
            logits *= scale
        else:
            rows = rows.to(queries.dtype)
            logits = tl.dot(queries, tl.trans(rows), input_precision="tf32x3") * scale
        if CAPPED:
            logits = capped(logits, cap)
        logits = logits * 1.4426950408889634
        if BIASED:
            added = tl.load(
                bias + row.to(tl.int64) * bb + group * bg + (start + r)[:, None] * br + slot[None, :],
                mask=own[:, None] & valid[None, :], other=0.0,
            )  # fmt: skip
            logits += added.to(tl.float32) * 1.4426950408889634
        logits = tl.where(valid[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(peak - shift)
        peak = higher
        total = total * fade + tl.sum(weights, 1)
        rows = tl.load(
            v + token[:, None] * vt + cv[None, :],
            mask=valid[:, None] if DV == BLOCK_DV else valid[:, None] & (cv < DV)[None, :], other=0.0,
        )  # fmt: skip
        if CODED_V:
            rows = (rows.to(tl.float32) - 128.0).to(tl.float32 if UPCAST else tl.bfloat16)
        elif UPCAST:
            rows = rows.to(tl.float32)
        sums = sums * fade[:, None] + tl.dot(weights.to(rows.dtype), rows, input_precision="tf32x3")
    filled = total > 0
    total = tl.where(filled, total, 1.0)
    place = ((first + split) * batch + row).to(tl.int64) * (G * R) + head
    tl.store(part_lses + place, tl.where(filled, (peak + tl.log2(total)) * 0.6931471805599453, float("-inf")), mask=own)
    sums = sums / total[:, None]
    if CODED_V:
        sums = unfold(sums, vr + (row.to(tl.int64) * G + group) * (2 * DV), cv, DV)
    tl.store(
        parts + place[:, None] * DV + cv[None, :], sums,
        mask=(own & filled)[:, None] & (cv < DV)[None, :],
    )  # fmt: skip


@jit
def one_segment(
    q: tl.tensor, parts: tl.tensor, part_lses: tl.tensor, qb: int, qh: int, scale: float, cap: float, batch: int,
    first: int,
    k: tl.tensor, v: tl.tensor, kr: tl.tensor, vr: tl.tensor, lengths: tl.tensor, offsets: tl.tensor, ids: tl.tensor,
    bias: tl.tensor,
    kb: int, kg: int, kt: int, vb: int, vg: int, vt: int, lb: int, lg: int, ib: int, ih: int,
    bb: int, bg: int, br: int, count: int, splits: int,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, PER_HEAD: tl.constexpr, LIMITED: tl.constexpr, RAGGED: tl.constexpr,
    BIASED: tl.constexpr, CODED_K: tl.constexpr, CODED_V: tl.constexpr,
) -> None:  # fmt: skip
    """One segment; its parts are numbered from `first` on."""
    _segment(
        tl.program_id(0), q, parts, part_lses, qb, qh, scale, cap, batch, first,
        k, v, kr, vr, lengths, offsets, ids, bias, kb, kg, kt, vb, vg, vt, lb, lg, ib, ih, bb, bg, br,
        count, splits, G, R, D, DV, BLOCK_D, BLOCK_DV, ROWS, CAPPED, UPCAST, TOKENS,
        UNIT, PER_HEAD, LIMITED, RAGGED, BIASED, CODED_K, CODED_V,
    )  # fmt: skip


@jit
def two_segments(
    q: tl.tensor, parts: tl.tensor, part_lses: tl.tensor, qb: int, qh: int, scale: float, cap: float, batch: int,
    programs: int,
    k: tl.tensor, v: tl.tensor, kr: tl.tensor, vr: tl.tensor, lengths: tl.tensor, offsets: tl.tensor, ids: tl.tensor,
    bias: tl.tensor,
    kb: int, kg: int, kt: int, vb: int, vg: int, vt: int, lb: int, lg: int, ib: int, ih: int,
    bb: int, bg: int, br: int, count: int, splits: int,
    k2: tl.tensor, v2: tl.tensor, kr2: tl.tensor, vr2: tl.tensor, lengths2: tl.tensor, offsets2: tl.tensor,
    ids2: tl.tensor, bias2: tl.tensor,
    kb2: int, kg2: int, kt2: int, vb2: int, vg2: int, vt2: int, lb2: int, lg2: int, ib2: int, ih2: int,
    bb2: int, bg2: int, br2: int, count2: int, splits2: int,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, TOKENS: tl.constexpr,
    UNIT: tl.constexpr, PER_HEAD: tl.constexpr, LIMITED: tl.constexpr, RAGGED: tl.constexpr, BIASED: tl.constexpr,
    CODED_K: tl.constexpr, CODED_V: tl.constexpr, UPCAST2: tl.constexpr, TOKENS2: tl.constexpr,
    UNIT2: tl.constexpr, PER_HEAD2: tl.constexpr, LIMITED2: tl.constexpr, RAGGED2: tl.constexpr, BIASED2: tl.constexpr,
    CODED_K2: tl.constexpr, CODED_V2: tl.constexpr,
) -> None:  # fmt: skip
    """Two segments in one launch: the first `programs` programs serve the first."""
    program = tl.program_id(0)
    if program < programs:
        _segment(
            program, q, parts, part_lses, qb, qh, scale, cap, batch, 0,
            k, v, kr, vr, lengths, offsets, ids, bias, kb, kg, kt, vb, vg, vt, lb, lg, ib, ih, bb, bg, br,
            count, splits, G, R, D, DV, BLOCK_D, BLOCK_DV, ROWS, CAPPED, UPCAST, TOKENS,
            UNIT, PER_HEAD, LIMITED, RAGGED, BIASED, CODED_K, CODED_V,
        )  # fmt: skip
    else:
        _segment(
            program - programs, q, parts, part_lses, qb, qh, scale, cap, batch, splits,
            k2, v2, kr2, vr2, lengths2, offsets2, ids2, bias2, kb2, kg2, kt2, vb2, vg2, vt2, lb2, lg2, ib2, ih2,
            bb2, bg2, br2, count2, splits2, G, R, D, DV, BLOCK_D, BLOCK_DV, ROWS, CAPPED, UPCAST2, TOKENS2,
            UNIT2, PER_HEAD2, LIMITED2, RAGGED2, BIASED2, CODED_K2, CODED_V2,
        )  # fmt: skip


@jit
def three_segments(
    q: tl.tensor, parts: tl.tensor, part_lses: tl.tensor, qb: int, qh: int, scale: float, cap: float, batch: int,
    programs: int, more: int,
    k: tl.tensor, v: tl.tensor, kr: tl.tensor, vr: tl.tensor, lengths: tl.tensor, offsets: tl.tensor,
    ids: tl.tensor, bias: tl.tensor,
    kb: int, kg: int, kt: int, vb: int, vg: int, vt: int, lb: int, lg: int, ib: int, ih: int,
    bb: int, bg: int, br: int, count: int, splits: int,
    k2: tl.tensor, v2: tl.tensor, kr2: tl.tensor, vr2: tl.tensor, lengths2: tl.tensor, offsets2: tl.tensor,
    ids2: tl.tensor, bias2: tl.tensor,
    kb2: int, kg2: int, kt2: int, vb2: int, vg2: int, vt2: int, lb2: int, lg2: int, ib2: int, ih2: int,
    bb2: int, bg2: int, br2: int, count2: int, splits2: int,
    k3: tl.tensor, v3: tl.tensor, kr3: tl.tensor, vr3: tl.tensor, lengths3: tl.tensor, offsets3: tl.tensor,
    ids3: tl.tensor, bias3: tl.tensor,
    kb3: int, kg3: int, kt3: int, vb3: int, vg3: int, vt3: int, lb3: int, lg3: int, ib3: int, ih3: int,
    bb3: int, bg3: int, br3: int, count3: int, splits3: int,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, CAPPED: tl.constexpr,
    UPCAST: tl.constexpr, TOKENS: tl.constexpr, UNIT: tl.constexpr, PER_HEAD: tl.constexpr,
    LIMITED: tl.constexpr, RAGGED: tl.constexpr, BIASED: tl.constexpr, CODED_K: tl.constexpr,
    CODED_V: tl.constexpr,
    UPCAST2: tl.constexpr, TOKENS2: tl.constexpr, UNIT2: tl.constexpr, PER_HEAD2: tl.constexpr,
    LIMITED2: tl.constexpr, RAGGED2: tl.constexpr, BIASED2: tl.constexpr, CODED_K2: tl.constexpr,
    CODED_V2: tl.constexpr,
    UPCAST3: tl.constexpr, TOKENS3: tl.constexpr, UNIT3: tl.constexpr, PER_HEAD3: tl.constexpr,
    LIMITED3: tl.constexpr, RAGGED3: tl.constexpr, BIASED3: tl.constexpr, CODED_K3: tl.constexpr,
    CODED_V3: tl.constexpr,
) -> None:  # fmt: skip
    """Three segments in one launch: the first `programs` programs serve the first, `more` the second."""
    program = tl.program_id(0)
    if program < programs:
        _segment(
            program, q, parts, part_lses, qb, qh, scale, cap, batch, 0,
            k, v, kr, vr, lengths, offsets, ids, bias, kb, kg, kt, vb, vg, vt,
            lb, lg, ib, ih, bb, bg, br, count, splits,
            G, R, D, DV, BLOCK_D, BLOCK_DV, ROWS, CAPPED, UPCAST, TOKENS,
            UNIT, PER_HEAD, LIMITED, RAGGED, BIASED, CODED_K, CODED_V,
        )  # fmt: skip
    elif program < programs + more:
        _segment(
            program - programs, q, parts, part_lses, qb, qh, scale, cap, batch, splits,
            k2, v2, kr2, vr2, lengths2, offsets2, ids2, bias2, kb2, kg2, kt2, vb2, vg2, vt2,
            lb2, lg2, ib2, ih2, bb2, bg2, br2, count2, splits2,
            G, R, D, DV, BLOCK_D, BLOCK_DV, ROWS, CAPPED, UPCAST2, TOKENS2,
            UNIT2, PER_HEAD2, LIMITED2, RAGGED2, BIASED2, CODED_K2, CODED_V2,
        )  # fmt: skip
    else:
        _segment(
            program - programs - more, q, parts, part_lses, qb, qh, scale, cap, batch, splits + splits2,
            k3, v3, kr3, vr3, lengths3, offsets3, ids3, bias3, kb3, kg3, kt3, vb3, vg3, vt3,
            lb3, lg3, ib3, ih3, bb3, bg3, br3, count3, splits3,
            G, R, D, DV, BLOCK_D, BLOCK_DV, ROWS, CAPPED, UPCAST3, TOKENS3,
            UNIT3, PER_HEAD3, LIMITED3, RAGGED3, BIASED3, CODED_K3, CODED_V3,
        )  # fmt: skip
