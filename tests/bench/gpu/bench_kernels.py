"""Checks and times the decoding step's kernels on a GPU: `python tests/bench/gpu/bench_kernels.py out.json [--tune]`.

Each kernel is compared with float64, then several calls on different inputs are captured in one CUDA graph and timed;
its floor is the bytes that it must move over the measured bandwidth. 8 key/value heads, 32 query heads, dimension 128,
bf16. A kernel that fails does not stop the others: after an error that breaks the GPU's context the script starts anew.
Without a GPU it runs the torch twins on small inputs, which proves the script, not the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvbench import kernels
from kvbench.kernels import Segment, attention, support

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16
G, R, D = 8, 4, 128
H = G * R
BUDGET = 2048 if CUDA else 64
L2 = 128 << 20 if CUDA else 0
Call = Callable[[], Any]


@dataclass
class Case:
    """One kernel at one size: the same call on different inputs, the float64 answer to the first, and its bytes."""

    name: str
    batch: int
    tokens: int
    calls: list[Call]
    expected: Callable[[], Tensor]
    nbytes: float
    found: Callable[[Any], Tensor] = lambda result: result[0] if isinstance(result, tuple) else result
    baselines: dict[str, list[Call]] = field(default_factory=dict)
    tolerance: float = 6e-3
    host: bool = False


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype) if CUDA else torch.randn(shape).to(dtype)


def big(batch: int, tokens: int) -> Tensor:
    """Random keys [B, G, n, d], made in the final type to save memory."""
    return torch.empty(batch, G, tokens, D, device=DEVICE, dtype=DTYPE).normal_()


def copies(nbytes: float) -> int:
    """How many input sets make the cache useless."""
    return max(2, min(16, int(L2 // max(nbytes, 1)) + 1))


def attention64(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """float64 attention of [B, H, 1, d] over [B, G or H, n, d], row by row."""
    rows = []
    for b in range(len(queries)):
        q = queries[b].double().view(keys.shape[1], -1, D)
        logits = q @ keys[b].double().transpose(-1, -2) * D**-0.5
        rows.append((logits.softmax(-1) @ values[b].double()).view(H, 1, D))
    return torch.stack(rows)


def picked(keys: Tensor, ids: Tensor) -> Tensor:
    """Rows [B, G or H, k, d] of the tokens `ids`."""
    batch, sets = ids.shape[:2]
    row = torch.arange(batch, device=keys.device)[:, None, None]
    head = (torch.arange(sets, device=keys.device) // (sets // G))[:, None]
    return keys[row, head, ids.long().to(keys.device)].to(DEVICE)


def sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return scaled_dot_product_attention(queries, keys, values, enable_gqa=keys.shape[1] != H)


def choose(batch: int, sets: int, tokens: int, k: int) -> Tensor:
    """Random distinct ids, int32 [B, sets, k]."""
    return torch.rand(batch, sets, tokens, device=DEVICE).topk(k).indices.int().contiguous()


def decode_case(batch: int, tokens: int) -> Case:
    nbytes = 2.0 * batch * G * tokens * D * 2
    inputs = [(randn(batch, H, 1, D), big(batch, tokens), big(batch, tokens)) for _ in range(copies(nbytes))]
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=DEVICE)
    return Case(
        "decode", batch, tokens, [lambda x=x: kernels.decode(*x, lengths, dtype=DTYPE) for x in inputs],
        lambda: attention64(*inputs[0]), nbytes, baselines={"sdpa": [lambda x=x: sdpa(*x) for x in inputs]},
    )  # fmt: skip


def ragged_case(batch: int, tokens: int) -> Case:
    lengths = torch.randint(tokens // 2, tokens, (batch, G), device=DEVICE, dtype=torch.int32)
    offsets = (lengths.flatten().long().cumsum(0) - lengths.flatten()).view(batch, G)
    total = int(lengths.sum())
    nbytes = 2.0 * total * D * 2
    inputs = [(randn(batch, H, 1, D), randn(total, D), randn(total, D)) for _ in range(copies(nbytes))]

    def expected() -> Tensor:
        q, k, v = inputs[0]
        out = torch.empty(batch, G, R, D, dtype=torch.float64, device=DEVICE)
        for b in range(batch):
            for g in range(G):
                rows = slice(int(offsets[b, g]), int(offsets[b, g] + lengths[b, g]))
                logits = q[b, g * R : g * R + R, 0].double() @ k[rows].double().T * D**-0.5
                out[b, g] = logits.softmax(-1) @ v[rows].double()
        return out.view(batch, H, 1, D)

    calls = [lambda x=x: kernels.ragged(*x, offsets, lengths, dtype=DTYPE) for x in inputs]
    return Case("ragged", batch, tokens, calls, expected, nbytes)


def gather_case(batch: int, tokens: int, per_head: bool, unit: int, static: int = 0, host: bool = False) -> Case:
    sets = H if per_head else G
    nbytes = 2.0 * batch * (sets * BUDGET + G * static) * D * 2
    count = copies(nbytes)
    if host:
        stores = [tuple(torch.empty(batch, G, tokens, D, dtype=DTYPE, pin_memory=CUDA).copy_(big(batch, tokens))
                        for _ in range(2))]  # fmt: skip
    else:
        stores = [(big(batch, tokens), big(batch, tokens)) for _ in range(2)]
    queries = [randn(batch, H, 1, D) for _ in range(count)]
    ids = [choose(batch, sets, tokens // unit, BUDGET // unit) for _ in range(count)]
    windows = [(big(batch, static), big(batch, static)) for _ in range(count if static else 0)]
    lengths = torch.full((batch,), static, dtype=torch.int32, device=DEVICE)

    def flat(i: int) -> Tensor:
        return (ids[i][..., None] * unit + torch.arange(unit, device=DEVICE)).flatten(2)

    def call(i: int) -> Any:
        selected = Segment(*stores[i % len(stores)], ids=ids[i], unit=unit)
        segments = (Segment(*windows[i], lengths), selected) if static else (selected,)
        return kernels.attend(queries[i], *segments, dtype=DTYPE)

    def rows(i: int, part: int) -> Tensor:
        found = picked(stores[i % len(stores)][part], flat(i))
        return torch.cat([windows[i][part].repeat_interleave(sets // G, 1), found], 2) if static else found

    name = f"{'host ' if host else ''}gather {'head' if per_head else 'group'} x{unit}{' + static' if static else ''}"
    baselines = (
        {} if host else {"index + sdpa": [lambda i=i: sdpa(queries[i], rows(i, 0), rows(i, 1)) for i in range(count)]}
    )
    return Case(
        name, batch, tokens, [lambda i=i: call(i) for i in range(count)],
        lambda: attention64(queries[0], rows(0, 0), rows(0, 1)), nbytes, baselines=baselines, host=host,
    )  # fmt: skip


def page_case(batch: int, tokens: int) -> Case:
    pages = tokens // 16
    nbytes = batch * (2.0 * G * pages * D * 2 + H * pages * 4)
    inputs = []
    for _ in range(copies(nbytes)):
        low = big(batch, pages)
        inputs.append((randn(batch, H, 1, D), low, low + big(batch, pages).abs()))
    counts = torch.full((batch,), pages, dtype=torch.int32, device=DEVICE)

    def expected() -> Tensor:
        q, low, high = (x.double() for x in inputs[0])
        q = q.view(batch, G, R, D)
        return (q.clamp_min(0) @ high.transpose(-1, -2) + q.clamp_max(0) @ low.transpose(-1, -2)).flatten(1, 2)

    def chain(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
        q = q.view(batch, G, R, D)
        return q.clamp_min(0) @ high.transpose(-1, -2) + q.clamp_max(0) @ low.transpose(-1, -2)

    return Case(
        "page_scores", batch, tokens, [lambda x=x: kernels.page_scores(*x, counts) for x in inputs], expected, nbytes,
        baselines={"torch": [lambda x=x: chain(*x) for x in inputs]}, tolerance=1e-4,
    )  # fmt: skip


def score_case(batch: int, tokens: int) -> Case:
    nbytes = batch * (1.0 * G * tokens * D * 2 + H * tokens * 4)
    inputs = [(randn(batch, H, 1, D), big(batch, tokens)) for _ in range(copies(nbytes))]

    def expected() -> Tensor:
        q, k = inputs[0]
        return torch.stack([q[b].double().view(G, R, D) @ k[b].double().mT for b in range(batch)]).flatten(1, 2)

    return Case(
        "scores", batch, tokens, [lambda x=x: kernels.scores(*x) for x in inputs], expected, nbytes,
        baselines={"torch": [lambda x=x: x[0].view(batch, G, R, D) @ x[1].transpose(-1, -2) for x in inputs]},
        tolerance=1e-4,
    )  # fmt: skip


def bounds_case(batch: int, tokens: int) -> Case:
    nbytes = batch * G * tokens * D * 2 * (1 + 2 / 16)
    inputs = [(big(batch, tokens), big(batch, tokens // 16), big(batch, tokens // 16)) for _ in range(copies(nbytes))]
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=DEVICE)

    def call(keys: Tensor, low: Tensor, high: Tensor) -> Tensor:
        kernels.page_bounds(keys, lengths, 16, low, high)
        return low

    def expected() -> Tensor:
        return inputs[0][0].view(batch, G, -1, 16, D).amin(3).double()

    calls = [lambda x=x: call(*x) for x in inputs]
    baseline = [lambda x=x: x[0].view(batch, G, -1, 16, D).aminmax(dim=3) for x in inputs]
    return Case("page_bounds", batch, tokens, calls, expected, nbytes, baselines={"torch": baseline}, tolerance=0)


def insert_case(batch: int, tokens: int) -> Case:
    store = big(batch, tokens), big(batch, tokens)
    new = randn(batch, G, 1, D), randn(batch, G, 1, D)
    pages = [randn(batch, G, tokens // 16, D) for _ in range(2)]
    position = torch.full((batch,), tokens // 2 + 5, dtype=torch.int32, device=DEVICE)

    def call() -> Tensor:
        kernels.insert(*store, *new, position)
        kernels.update_bounds(new[0], position, 16, *pages)
        return torch.cat([part[:, :, tokens // 2 + 5] for part in store], 2)

    def only() -> None:
        kernels.insert(*store, *new, position)
        kernels.update_bounds(new[0], position, 16, *pages)

    case = Case(
        "insert + bounds", batch, tokens, [call], lambda: torch.cat([part[:, :, 0] for part in new], 2).double(),
        batch * G * D * 2.0 * 10, tolerance=0,
    )  # fmt: skip
    case.baselines["without the check's copy"] = [only] * 8
    return case


def pq_case(batch: int, tokens: int, parts: int, known: int) -> Case:
    nbytes = batch * (1.0 * G * parts * tokens + H * tokens * 4)
    inputs = []
    for _ in range(copies(nbytes)):
        codes = torch.randint(0, known, (batch, G, parts, tokens), device=DEVICE, dtype=torch.uint8)
        inputs.append((randn(batch, H, 1, D), randn(batch, G, parts, known, D // parts, dtype=torch.float32), codes))

    def expected() -> Tensor:
        q, centroids, codes = inputs[0]
        rows = []
        for b in range(batch):
            tables = torch.einsum("grmc,gmkc->gmkr", q[b].double().view(G, R, parts, -1), centroids[b].double())
            index = codes[b].long()[..., None].expand(-1, -1, -1, R)
            rows.append(tables.gather(2, index).sum(1).transpose(1, 2).reshape(H, tokens))
        return torch.stack(rows)

    calls = [lambda x=x: kernels.pq_scores(*x) for x in inputs]
    return Case(f"pq_scores {parts} x {known}", batch, tokens, calls, expected, nbytes, tolerance=1e-5)


def sq8_inputs(batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, their minima and ranges, and a function's worth of queries."""
    codes = torch.randint(0, 256, (batch, G, tokens, D), device=DEVICE, dtype=torch.uint8)
    ranges = torch.stack([torch.rand(batch, G, D) - 3, torch.rand(batch, G, D) * 2 + 3], 2).to(DEVICE)
    return randn(batch, H, 1, D), codes, ranges.contiguous()


def decoded(codes: Tensor, ranges: Tensor) -> Tensor:
    """float64 rows [G, n, d] of codes [G, n, d]."""
    return ranges[:, :1].double() + ranges[:, 1:].double() * (codes.double() + 0.5) / 255


def sq8_case(batch: int, tokens: int, attention_too: bool) -> Case:
    nbytes = batch * (G * tokens * D * 2.0 if attention_too else G * tokens * D + H * tokens * 4.0)
    inputs = [(*sq8_inputs(batch, tokens), *sq8_inputs(batch, tokens)[1:]) for _ in range(copies(nbytes))]
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=DEVICE)

    def call(q: Tensor, keys: Tensor, key_range: Tensor, values: Tensor, value_range: Tensor) -> Any:
        if not attention_too:
            return kernels.scores(q, keys, row_range=key_range)
        segment = Segment(keys, values, lengths, key_range=key_range, value_range=value_range)
        return kernels.attend(q, segment)

    def expected() -> Tensor:
        q, keys, key_range, values, value_range = inputs[0]
        rows = []
        for b in range(batch):
            logits = q[b].double().view(G, R, D) @ decoded(keys[b], key_range[b]).mT
            if attention_too:
                logits = (logits * D**-0.5).softmax(-1) @ decoded(values[b], value_range[b])
            rows.append(logits.view(H, -1))
        return torch.stack(rows)

    name = "decode of SQ8" if attention_too else "scores of SQ8"
    tolerance = 6e-3 if attention_too else 1e-4
    return Case(name, batch, tokens, [lambda x=x: call(*x) for x in inputs], expected, nbytes, tolerance=tolerance)


def column_case(batch: int, tokens: int) -> Case:
    """Bound by arithmetic, not by bytes: its floor says nothing; the torch twin stands beside it."""
    inputs = [(randn(batch, H, tokens, D), big(batch, tokens)) for _ in range(2)]

    def expected() -> Tensor:
        q, k = inputs[0]
        total = torch.zeros(batch, G, tokens, dtype=torch.float64, device=DEVICE)
        for b in range(batch):
            for h in range(H):
                for first in range(0, tokens, 4096):
                    stop = min(first + 4096, tokens)
                    logits = q[b, h, first:stop].double() @ k[b, h // R, :stop].double().T * D**-0.5
                    future = torch.ones_like(logits, dtype=torch.bool).triu(first + 1)
                    total[b, h // R, :stop] += logits.masked_fill_(future, -torch.inf).softmax(-1).sum(0)
        return total

    def twin(q: Tensor, k: Tensor) -> Tensor:
        with kernels.using("torch"):
            return kernels.column_sums(q, k, D**-0.5)

    return Case(
        "column_sums", batch, tokens, [lambda x=x: kernels.column_sums(*x, D**-0.5) for x in inputs], expected,
        batch * ((2.0 * H + G) * tokens * D * 2 + G * tokens * 4),
        baselines={"torch": [lambda: twin(*inputs[0])]} if tokens <= 8192 else {},
    )  # fmt: skip


def kivi_case(batch: int, tokens: int, bits: int) -> Case:
    group, at, late = 32, (batch, G), 128
    nbytes = 2.0 * batch * G * tokens * D * (bits / 8 + 4 / group)

    def half(*shape: int) -> Tensor:
        """Scales in the first half of the last dimension, minima in the second."""
        steps, lows = torch.rand(shape, device=DEVICE).chunk(2, -1)
        return torch.cat([(steps + 0.5) / 2**bits, lows - 1], -1).half()

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, device=DEVICE, dtype=torch.uint8)

    counts = [torch.full((batch,), n, dtype=torch.int32, device=DEVICE) for n in (tokens, tokens - 64, tokens - late)]
    inputs = []
    for _ in range(copies(nbytes)):
        store = kernels.KIVICodes(
            codes(*at, tokens // group, D * group * bits // 8), half(*at, tokens // group, 2 * D),
            codes(*at, tokens, D * bits // 8), half(*at, tokens, 2 * D // group),
            randn(*at, late, D), randn(*at, late, D), *counts, bits, group, group,
        )  # fmt: skip
        inputs.append((randn(batch, H, 1, D), store))

    def numbers(packed: Tensor, scales: Tensor) -> Tensor:
        unpacked = torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)
        steps, lows = scales.double().chunk(2, -1)
        return unpacked.view(*steps.shape, group) * steps[..., None] + lows[..., None]

    def expected() -> Tensor:
        q, store = inputs[0]
        rows = []
        place = torch.arange(tokens, device=DEVICE)
        for b in range(batch):
            keys = numbers(store.key_codes[b], store.key_scales[b]).transpose(2, 3).flatten(1, 2)
            values = numbers(store.value_codes[b], store.value_scales[b]).flatten(2)
            keys[:, tokens - 64 :] = store.late_keys[b][:, place[tokens - 64 :] % late].double()
            values[:, tokens - late :] = store.late_values[b][:, place[tokens - late :] % late].double()
            logits = q[b].double().view(G, R, D) @ keys.mT * D**-0.5
            rows.append((logits.softmax(-1) @ values).view(H, D))
        return torch.stack(rows)

    calls = [lambda x=x: kernels.attend_kivi(*x) for x in inputs]
    return Case(f"kivi {bits} bits", batch, tokens, calls, expected, nbytes, tolerance=1e-2)


def builders(batch: int, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    yield "decode", lambda: decode_case(batch, tokens)
    yield "ragged", lambda: ragged_case(batch, tokens)
    for per_head, unit, static in ((False, 1, 0), (True, 1, 0), (True, 16, 0), (True, 16, 128), (False, 1, 128)):
        yield "gather", lambda a=(per_head, unit, static): gather_case(batch, tokens, *a)
    if tokens <= 32768:
        yield "host gather", lambda: gather_case(batch, tokens, False, 1, 128, host=True)
        yield "host gather", lambda: gather_case(batch, tokens, False, 16, 128, host=True)
    yield "page_scores", lambda: page_case(batch, tokens)
    yield "scores", lambda: score_case(batch, tokens)
    yield "page_bounds", lambda: bounds_case(batch, tokens)
    yield "insert", lambda: insert_case(batch, tokens)
    yield "pq_scores", lambda: pq_case(batch, tokens, 2, 64)
    yield "pq_scores", lambda: pq_case(batch, tokens, 4, 256)
    yield "scores of SQ8", lambda: sq8_case(batch, tokens, False)
    yield "decode of SQ8", lambda: sq8_case(batch, tokens, True)
    if batch == 1:
        yield "column_sums", lambda: column_case(batch, tokens)
    yield "kivi", lambda: kivi_case(batch, tokens, 2)
    yield "kivi", lambda: kivi_case(batch, tokens, 4)


def microseconds(calls: list[Call], milliseconds: int = 60) -> float:
    """Median time of one call; on a GPU, of a CUDA graph that holds each call twice or so."""
    if not CUDA:
        begin = time.perf_counter()
        calls[0]()
        return 1e6 * (time.perf_counter() - begin)
    repeats = max(1, -(-8 // len(calls)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(400)]
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    begin, used = time.perf_counter(), 0
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
        used += 1
        if used >= 10 and time.perf_counter() - begin > milliseconds / 1000:
            break
        if used % 10 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events[:used]]
    return 1e3 * statistics.median(times) / (repeats * len(calls))


def bandwidths() -> dict[str, float]:
    """Measured bytes a second: a large copy on the device (read and written), and pinned host memory to the device."""
    if not CUDA:
        return {"device": 1e10, "host": 1e10}
    a, b = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).random_() for _ in range(2))
    device = 2 * a.nbytes / microseconds([lambda: a.copy_(b), lambda: b.copy_(a)]) * 1e6
    pinned = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True).random_()
    host = pinned.nbytes / microseconds([lambda: a[: 1 << 28].copy_(pinned, non_blocking=True)]) * 1e6
    return {"device": device, "host": host}


def first_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {(str(problem).strip() or '-').splitlines()[0][:160]}"


def measure(case: Case, bandwidth: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": case.name, "batch": case.batch, "tokens": case.tokens, "bytes": case.nbytes}
    found = case.found(case.calls[0]()).double()
    expected = case.expected()
    row["error"] = float((found - expected.view_as(found)).norm() / expected.norm())
    row["right"] = row["error"] <= case.tolerance
    del found, expected
    row["us"] = microseconds(case.calls)
    row["floor_us"] = case.nbytes / bandwidth["host" if case.host else "device"] * 1e6
    for name, calls in case.baselines.items():
        try:
            row[f"{name}_us"] = microseconds(calls)
        except Exception as problem:
            row[f"{name}_error"] = first_line(problem)
    return row


def show(row: dict[str, Any]) -> str:
    head = f"{row['kernel']:<30} {row['batch']:>2} {row['tokens']:>7} "
    if "failed" in row:
        return head + "FAILED " + row["failed"]
    others = "  ".join(
        f"{key[:-3]} {value:.1f}" for key, value in row.items() if key.endswith("_us") and key != "floor_us"
    )
    right = "" if row["right"] else "  WRONG"
    return (f"{head}{row['error']:>9.1e} {row['us']:>9.1f} {row['floor_us']:>9.1f} "
            f"{row['us'] / row['floor_us']:>6.2f}  {others}{right}")  # fmt: skip


def tune(bandwidth: dict[str, float]) -> list[dict[str, Any]]:
    """Time tiles, warps, stages and splits of the attention kernel, and print the best for each case."""
    rows = []
    standard = attention.tile, attention.split_count
    for name, build in (
        ("decode 1 x 131072", lambda: decode_case(1, 131072)),
        ("decode 1 x 8192", lambda: decode_case(1, 8192)),
        ("decode 8 x 32768", lambda: decode_case(8, 32768)),
        ("gather group x1", lambda: gather_case(1, 131072, False, 1)),
        ("gather head x16 + static", lambda: gather_case(1, 131072, True, 16, 128)),
        ("host gather", lambda: gather_case(1, 32768, False, 1, 128, host=True)),
    ):
        case = build()
        tried = []
        sizes = [(t, w, s) for t in (32, 64, 128) for w in (2, 4, 8) for s in (2, 3, 4) if t * s <= 256]
        for size in sizes if not case.host else sizes[::3]:
            for waves in (1, 2, 4, 8):
                attention.tile = lambda *_, size=size: size
                attention.split_count = lambda device, programs, blocks, waves=waves: max(
                    1, min(-(-waves * 132 // programs), blocks, 128)
                )
                try:
                    tried.append((microseconds(case.calls, 10), *size, waves))
                except Exception as problem:
                    rows.append({"case": name, "tile": size, "failed": first_line(problem)})
                    break
        attention.tile, attention.split_count = standard
        best = sorted(tried)[:4]
        now = microseconds(case.calls)
        floor = case.nbytes / bandwidth["host" if case.host else "device"] * 1e6
        rows.append({"case": name, "now_us": now, "floor_us": floor, "tried": sorted(tried)})
        print(f"{name}: now {now:.1f} us, floor {floor:.1f}; best (us, tokens, warps, stages, waves): "
              + "; ".join(f"{b[0]:.1f} {b[1:]}" for b in best), flush=True)  # fmt: skip
        del case
    return rows


def environment() -> dict[str, Any]:
    """The device, the versions and the commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if CUDA else "cpu", "torch": torch.__version__,
        "triton": getattr(support.triton, "__version__", None), "commit": commit or None,
    }  # fmt: skip


def broken() -> bool:
    """Whether the GPU's context can't be used any more."""
    try:
        torch.ones(1, device=DEVICE).sum().item()
    except Exception:
        return True
    return False


def restarted(arguments: list[str], start: int) -> list[str]:
    """The command's arguments for its cases from `start` on."""
    kept = arguments[: arguments.index("--start")] if "--start" in arguments else arguments
    return [*kept, "--start", str(start)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tune", action="store_true", help="also time other tiles and splits (some minutes)")
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 32768, 131072] if CUDA else [512])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--only", default="", help="kernels whose name begins with this")
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if options.start:
        result: dict[str, Any] = json.loads(options.output.read_text())
    else:
        result = {**environment(), "bandwidth": bandwidths(), "rows": []}
        print({key: value for key, value in result.items() if key != "rows"}, flush=True)
        print(f"{'kernel':<30} {'B':>2} {'tokens':>7} {'error':>9} {'us':>9} {'floor us':>9} {'ratio':>6}  others us")
    bandwidth = result["bandwidth"]
    cases = [(batch, tokens, *case) for batch in options.batch for tokens in options.tokens
             for case in builders(batch, tokens) if case[0].startswith(options.only)]  # fmt: skip
    for number, (batch, tokens, name, build) in enumerate(cases[options.start :], options.start):
        try:
            row = measure(build(), bandwidth)
        except Exception as problem:
            row = {"kernel": name, "batch": batch, "tokens": tokens, "failed": first_line(problem)}
        print(show(row), flush=True)
        result["rows"].append(row)
        options.output.write_text(json.dumps(result, indent=1))
        if "failed" in row and broken():
            print("the GPU's context is lost: starting anew", flush=True)
            os.execv(sys.executable, [sys.executable, *restarted(sys.argv, number + 1)])
        if CUDA:
            torch.cuda.empty_cache()
    if options.tune:
        try:
            result["tuning"] = tune(bandwidth)
        except Exception as problem:
            print("tuning FAILED", first_line(problem))
        options.output.write_text(json.dumps(result, indent=1))
    wrong = [row for row in result["rows"] if "failed" in row or not row["right"]]
    print(f"{len(result['rows'])} measured, {len(wrong)} failed or wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
