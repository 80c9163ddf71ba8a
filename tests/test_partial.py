"""Steps that the host takes part in: a search between the device's pieces, merged with the static set's attention."""

import math
from collections import defaultdict
from typing import ClassVar

import numpy as np
import pytest
import torch
from kernel_references import DEVICE, error, ints, randn
from test_fixed import PROMPTS, attach, logits
from tiny import small_options, tiny_model

import kvbench
from kvbench import kernels
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.engine import fixed
from kvbench.engine.generation import generate
from kvbench.indexes.threads import on_threads
from kvbench.indexes.weighing import score_rows, weigh_rows
from kvbench.kernels import support
from kvbench.plugins import registry
from kvbench.runs.timing import step_metrics, step_row
from kvbench.strategies.selecting.index_step import IndexStep, Turns

OUT_OF_ORDER = [PROMPTS[number] for number in (1, 0, 2)]
"""Rows whose groups of equal length do not lie side by side."""


def retrieving(model, budget=24, allocator="uniform", policy="ivf", **options):
    cls = registry().find("policy", policy)
    return kvbench.attach(
        model, policy=cls(cls.Options(**{**small_options(cls), **options})),
        budget=Budget(tokens=budget, allocator=allocator),
    )  # fmt: skip


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize(("allocator", "every"), [("uniform", 16), ("uniform", 3), ("uniform", 0), ("ada", 1)])
@torch.inference_mode()
def test_both_ways_to_attend_give_the_hooks_logits_for_rows_out_of_order(where, allocator, every):
    model = tiny_model(pad_token_id=None)
    with retrieving(model, allocator=allocator, attention=where, insert_every=every) as session:
        hooks, expected = logits(session, None, 20, "eager", OUT_OF_ORDER)
        ours, found = logits(session, None, 20, "fixed", OUT_OF_ORDER)
    assert [one.tokens for one in ours] == [one.tokens for one in hooks]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_16_bits_are_searched_and_attended_in_place(dtype):
    model = tiny_model(pad_token_id=None).to(dtype)
    with retrieving(model, policy="vamana") as session:
        _, expected = logits(session, None, 8, "eager", OUT_OF_ORDER)
        _, found = logits(session, None, 8, "fixed", OUT_OF_ORDER)
    for mine, theirs in zip(found[:3], expected[:3], strict=True):
        assert error(mine, theirs) < (0.05 if dtype == torch.bfloat16 else 0.01)


@torch.inference_mode()
def test_a_budget_that_soon_covers_all_and_one_that_leaves_nothing():
    model = tiny_model(pad_token_id=None)
    for budget in (10, 11, 39, 40):
        with retrieving(model, budget) as session:
            hooks, expected = logits(session, PROMPTS[0], 20, "eager")
            ours, found = logits(session, PROMPTS[0], 20, "fixed")
        assert ours[0].tokens == hooks[0].tokens, budget
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4)


@torch.inference_mode()
def test_the_question_passes_by_hooks_before_the_steps_begin():
    model, ids = tiny_model(pad_token_id=None), PROMPTS[1]
    for prompt in (61, 52, 40):  # none, some and several moves to the index before
        with retrieving(model, insert_every=6) as session:
            hooks = generate(session, ids, prompt_tokens=prompt, max_new_tokens=20, decoding="eager")
            ours = generate(session, ids, prompt_tokens=prompt, max_new_tokens=20, decoding="fixed")
        assert ours.tokens == hooks.tokens


def test_layers_insert_at_different_steps():
    """So that no step has the insertions of all layers."""
    model = tiny_model(pad_token_id=None, num_hidden_layers=4)
    with retrieving(model, insert_every=8, attention="host") as session:
        generate(session, PROMPTS[1], max_new_tokens=34, decoding="fixed")
        decoder = session._fixed
        sizes = [step._turns[0] for step in decoder._steps.values()]
        at = [[taken for taken in range(1, 33) if one.at(taken)[1] > one.at(taken - 1)[1]] for one in sizes]
        assert at == [[8, 16, 24, 32], [6, 14, 22, 30], [4, 12, 20, 28], [2, 10, 18, 26]]
        inserting = [number for number, parts in enumerate(decoder.parts, 1) if parts.get("insertion")]
        assert inserting == sorted(taken - 1 for layer in at for taken in layer), (
            "while the device ends the step before"
        )
        assert all(
            step._parts[0].index.keys.n == one.at(33)[1]
            for step, one in zip(decoder._steps.values(), sizes, strict=True)
        )


def test_the_device_is_waited_for_once_a_layer_before_the_search(monkeypatch):
    events = []
    for name in ("before", "beside", "search", "after"):
        original = getattr(IndexStep, name)
        monkeypatch.setattr(
            IndexStep, name, lambda self, *given, o=original, n=name: events.append(n) or o(self, *given)
        )
    monkeypatch.setattr(fixed, "wait", lambda event: events.append("wait"))
    with retrieving(tiny_model(pad_token_id=None)) as session:
        generate(session, PROMPTS[0], max_new_tokens=4, decoding="fixed")
    assert events == ["before", "beside", "wait", "search", "after"] * 9


def test_turns_count_as_the_hooks_do():
    turns = Turns(tokens=100, aside=80, beyond=3, until=5, period=8)
    assert [turns.at(taken) for taken in (1, 2, 9, 10, 18)] == [(101, 80), (102, 85), (109, 85), (110, 93), (118, 101)]


def test_rows_are_weighed_by_their_scores_as_in_float64():
    generator = np.random.default_rng(5)
    rows = generator.standard_normal((2 * 40, 12)).astype(np.float32)
    ids = np.stack([generator.permutation(30)[:9] for _ in range(6)]).astype(np.int32)
    ids[2, 4:] = ids[3, 0] = -1
    scores = (9 * generator.standard_normal(ids.shape)).astype(np.float32)
    counts = np.array([9, 3, 9, 9, 0, 20])
    sums, lses = np.empty((6, 12), np.float32), np.empty(6, np.float32)
    on_threads(weigh_rows, 6, rows, 40, 2, ids, scores, counts, 0.5, sums, lses)
    for head in range(6):
        taken = [i for i in range(min(9, counts[head])) if ids[head, i] >= 0]
        if not taken:
            assert not sums[head].any() and lses[head] == -np.inf
            continue
        logits = 0.5 * scores[head, taken].astype(np.float64)
        weights = np.exp(logits)
        expected = weights @ rows[40 * (head // 3) + ids[head, taken]].astype(np.float64) / weights.sum()
        np.testing.assert_allclose(sums[head], expected, rtol=1e-5, atol=1e-6)
        assert lses[head] == pytest.approx(math.log(weights.sum()), rel=1e-5)
    queries, found = generator.standard_normal((6, 12)).astype(np.float32), np.empty((6, 31), np.float32)
    on_threads(score_rows, 6, rows, 40, 2, 31, queries, found)
    for head in range(6):
        expected = rows[40 * (head // 3) : 40 * (head // 3) + 31].astype(np.float64) @ queries[head]
        np.testing.assert_allclose(found[head], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups", "dim", "count"), [(6, 2, 80, 1), (4, 4, 64, 67), (8, 1, 256, 33)])
def test_weigh_equals_float64(implementation, dtype, heads, groups, dim, count):
    if implementation == "triton" and support.triton is None:
        pytest.skip("triton is not installed")
    torch.manual_seed(3)
    values, scores = randn(2, groups, 90, dim, dtype=dtype), randn(2, heads, count, scale=9.0)
    ids = torch.rand(2, heads, 90, device=DEVICE).topk(count).indices.int()
    ids[0, 0, count // 2 :] = -1
    ids[1, 1] = -1
    with kernels.using(implementation):
        output, lse = kernels.weigh(scores, ids, values, scaling=0.3)
        with pytest.raises(KVBenchError, match="are not two contiguous"):
            kernels.weigh(scores, ids[:, :1], values)
    logits = (scores.double() * 0.3).masked_fill(ids < 0, -torch.inf)
    weights = logits.softmax(-1).nan_to_num()
    each = values.double().repeat_interleave(heads // groups, dim=1)
    picked = each.gather(2, ids.long().clamp_min(0)[..., None].expand(-1, -1, -1, dim))
    assert error(output, (weights[:, :, None] @ picked)) < 1e-5
    assert error(lse.exp(), logits.logsumexp(-1).exp()) < 1e-5 and lse[1, 1] == -torch.inf
    assert ints([0]).dtype == torch.int32


def test_results_say_what_a_steps_time_went_to():
    with retrieving(tiny_model(pad_token_id=None)) as session:
        found = generate(session, PROMPTS[0], max_new_tokens=20, decoding="fixed")
    assert found.mode == "fixed" and len(found.parts_s) == 19
    row = step_row(found, torch.device("cpu"))
    parts = row["step_parts_s"]
    assert set(parts) == {"search", "insertion", "attention", "transfer", "rest"}
    assert min(parts["search"], parts["attention"], parts["insertion"], parts["rest"]) > 0
    assert sum(parts.values()) == pytest.approx(sum(row["step_s"]) / 19)
    assert step_metrics([row])["step_parts_s"] == pytest.approx(parts)
    with attach(tiny_model(pad_token_id=None), "quest") as session:
        plain = generate(session, PROMPTS[0], max_new_tokens=4, decoding="fixed")
    assert "step_parts_s" not in step_row(plain, torch.device("cpu"))
    assert step_metrics([{"step_s": [1.0]}])["step_parts_s"] == {}


class FakeGraph:
    """Notes what happens between its begin and end, in place of a CUDA graph."""

    log: ClassVar[list[str]] = []

    def capture_begin(self, **given):
        assert given["capture_error_mode"] == "thread_local"
        self.log.append("begin")

    def capture_end(self):
        self.log.append("end")

    def replay(self):
        self.log.append("replay")


class FakeEvent:
    def __init__(self, enable_timing):
        assert not enable_timing

    def record(self):
        FakeGraph.log.append("record")

    def synchronize(self):
        FakeGraph.log.append("synchronize")


def test_a_step_is_cut_into_graphs_around_each_search(monkeypatch):
    FakeGraph.log = log = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 1)
    for name in ("before", "beside", "search", "ahead", "after"):
        original = getattr(IndexStep, name)
        monkeypatch.setattr(IndexStep, name, lambda self, *given, o=original, n=name: log.append(n) or o(self, *given))
    with retrieving(tiny_model(pad_token_id=None)) as session, torch.inference_mode():
        session.model(torch.tensor([PROMPTS[0]]))
        decoder = session.fixed(torch.tensor([5]), 8, graph=False)
        for step in decoder._split:
            step.between(1)
        decoder._forward()  # as before a capture: nothing reads what a search leaves before the first one
        log.clear()
        segments = decoder._segments = fixed._Segments()
        decoder._cutting = True
        segments.begin()
        decoder._forward()
        segments.end()
        decoder._cutting = False
        layer = ["before", "end", "begin", "beside", "end", "begin", "after"]
        assert log == ["begin", *layer * 3, "end"]
        log.clear()
        decoder.step()
    launched, searched = ["replay", "record", "replay"], ["synchronize", "search"]
    assert log == [*launched, *searched, *[*launched, "ahead", *searched] * 2, "replay", "ahead"]
    assert defaultdict(float, decoder.parts[0])["wait"] >= 0
