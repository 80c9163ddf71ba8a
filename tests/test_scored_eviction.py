"""Policies that score the prompt and keep the best, against slow, obvious float64 references of their papers."""

import pytest
import torch
from drive import Driven, random_vectors
from tiny import shared_model
from torch import nn

from kvbench.contract.errors import KVBenchError
from kvbench.engine.rotary import Rotary

VECTORS = random_vectors(steps=1)
N, GROUPS, SHARE, D = VECTORS.prompt, 2, 3, 8


def kept(policy, budget, options, **more):
    """The tokens that each row and head keeps of the prompt."""
    ids = Driven(policy, VECTORS, budget, options, **more).layer.store.static_ids.expand(2, GROUPS, -1)
    return {(row, group): ids[row, group].tolist() for row in range(2) for group in range(GROUPS)}


def prompt(row, group):
    """Float64 queries [3, n, d], keys and values [n, d] of a key/value head's prompt."""
    queries = VECTORS.queries[row, group * SHARE : (group + 1) * SHARE, :N]
    return (queries.double(), *(x[row, group, :N].double() for x in (VECTORS.keys, VECTORS.values)))


def window_weights(queries, keys, window):
    """Mean causal weights [3, n − window] of the last queries."""
    rows = [
        (queries[:, at] @ keys[: at + 1].T / D**0.5).softmax(-1)[:, : N - window] for at in range(N - window, N)
    ]  # fmt: skip
    return torch.stack(rows).mean(0)


def best(scores, count):
    return set(torch.tensor(scores).topk(count).indices.tolist())


def test_lagkv_keeps_what_stands_out_against_the_next_partition():
    sinks, lag, budget = 3, 8, 42
    for (row, group), ids in kept("lagkv", budget, {"sinks": sinks, "lag": lag}).items():
        _, keys, values = prompt(row, group)
        partitions = (N - sinks) // lag  # the last of 10 is a reference alone
        tail = list(range(sinks + (partitions - 1) * lag, N))
        expected, room = set(range(sinks)) | set(tail), budget - sinks - len(tail)
        for part in range(partitions - 1):
            span = range(sinks + part * lag, sinks + (part + 1) * lag)
            scores = torch.zeros(lag, dtype=torch.float64)
            for x in (keys, values):
                own, following = x[list(span)], x[span.stop : span.stop + lag]
                low, high = following.min(0).values, following.max(0).values
                scores += torch.softmax(((own - low) / (high - low)).std(1), 0) / 2
            extra = room % (partitions - 1)
            count = room // (partitions - 1) + (part >= partitions - 1 - extra)
            expected |= {span[i] for i in scores.topk(count).indices.tolist()}
        assert set(ids) == expected and len(ids) == budget


def test_lagkv_slides_where_the_prompt_has_no_two_partitions():
    for ids in kept("lagkv", 20, {"sinks": 3, "lag": 50}).values():
        assert sorted(ids) == [0, 1, 2, *range(N - 17, N)]


def test_chunkkv_keeps_the_same_whole_chunks_for_all_heads():
    size, window, budget = 4, 10, 33
    found = kept("chunkkv", budget, {"chunk_size": size, "window": window})
    for row in range(2):
        votes = sum(window_weights(*prompt(row, group)[:2], window).sum(0) for group in range(GROUPS))
        chunks = [votes[start : start + size].mean() for start in range(0, N - window, size)]
        expected = set(range(N - window, N))
        for chunk in best(chunks, (budget - window) // size):
            expected |= set(range(chunk * size, chunk * size + size))
        for group in range(GROUPS):
            assert set(found[row, group]) == expected and len(expected) == 30


class Projecting(nn.Module):
    """What criticalkv reads of an attention module."""

    def __init__(self, width):
        super().__init__()
        self.o_proj = nn.Linear(width, 5, bias=False)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_criticalkv_spends_half_by_score_and_half_by_projected_values(pooling):
    window, kernel, budget, epsilon = 8, 5, 28, 1e-4
    torch.manual_seed(1)
    module = Projecting(GROUPS * SHARE * D)
    options = {"window": window, "kernel": kernel, "pooling": pooling, "epsilon": epsilon}
    old = N - window
    differs = False
    for (row, group), ids in kept("criticalkv", budget, options, module=module).items():
        queries, keys, values = prompt(row, group)
        weights = window_weights(queries, keys, window)
        near = [weights[:, max(at - 2, 0) : at + 3] for at in range(old)]
        scores = torch.stack([
            (x.max(1).values if pooling == "max" else x.sum(1) / kernel).mean() for x in near
        ])  # fmt: skip
        norms = torch.zeros(old, dtype=torch.float64)
        for head in range(group * SHARE, (group + 1) * SHARE):
            own = module.o_proj.weight.double()[:, head * D : (head + 1) * D]
            norms += (values[:old] @ own.T).abs().sum(1) / SHARE
        first = scores.topk((budget - window) // 2).indices.tolist()
        second = ((scores + epsilon) * norms).tolist()
        mine = sorted((at for at in range(old) if at not in first), key=lambda at: -second[at])
        chosen = set(first) | set(mine[: budget - window - len(first)])
        differs |= chosen != best(scores.tolist(), budget - window)
        got = set(ids) - set(range(old, N))
        if pooling == "avg":
            assert got == chosen
        else:  # max pooling gives neighbours equal scores
            assert sum(second[at] for at in got) == pytest.approx(sum(second[at] for at in chosen), rel=0.05)
        assert len(ids) == budget
    assert differs


def test_criticalkv_names_a_layer_without_an_output_projection():
    with pytest.raises(KVBenchError, match=r"output projection of layer 0, and its module Identity has none of 6 × 8"):
        kept("criticalkv", 28, {"window": 8})


def test_compactor_blends_leverage_and_the_attention_of_chunks():
    model = shared_model()
    rotary = Rotary(model, model.config, model.model.layers[0].self_attn, 0)
    options = {"sinks": 3, "recent": 2, "chunk": 16, "sketch": 6, "blending": 0.7, "ridge": 0.01, "seed": 5}
    found = kept("compactor", 30, options, rotary=rotary)
    sketch = torch.randn(D, 6, generator=torch.Generator().manual_seed(5)).double() / 6**0.5
    middle = N - 5
    for row in range(2):
        unusual, attended = [], []
        for group in range(GROUPS):
            queries, keys, values = (x[..., 3 : N - 2, :] for x in prompt(row, group))
            half, places = D // 2, torch.arange(3, N - 2).double()[:, None]
            angles = places * 10000.0 ** (-torch.arange(half).double() / half)
            a, b = keys[:, :half], keys[:, half:]
            plain = torch.cat([a * angles.cos() + b * angles.sin(), b * angles.cos() - a * angles.sin()], 1)
            x = (plain - plain.mean(0)) @ sketch
            gram = x.T @ x + 0.01 * torch.eye(6, dtype=torch.float64)
            unusual.append(torch.stack([one @ torch.linalg.solve(gram, one) for one in x]))
            received = torch.zeros(middle, dtype=torch.float64)
            for head in range(SHARE):
                for asking in range(middle):
                    start = asking // 16 * 16
                    span = slice(start, min(start + 16, middle))
                    received[span] += (keys[span] @ queries[head, asking] / D**0.5).softmax(0) / SHARE
            received *= values.norm(dim=1)
            padded = torch.cat([received.new_zeros(1), received, received.new_zeros(1)])
            attended.append((padded[:-2] + padded[1:-1] + padded[2:]) / 3)
        unusual, attended = torch.stack(unusual), torch.stack(attended)
        total = 0.7 * (unusual - unusual.mean()) / unusual.std() + (attended - attended.mean()) / attended.std()
        for group in range(GROUPS):
            expected = {at + 3 for at in total[group].topk(25).indices.tolist()} | {0, 1, 2, N - 2, N - 1}
            assert set(found[row, group]) == expected


@pytest.mark.parametrize("mix", [0.07, 0.9])
def test_r_kv_keeps_what_is_attended_to_and_not_redundant(mix):
    window, kernel, budget, threshold = 8, 7, 30, 0.5
    old = N - window
    for (row, group), ids in kept("r_kv", budget, {"mix": mix}).items():
        queries, keys, _ = prompt(row, group)
        logits = (queries[:, old:] @ keys[:old].T / D**0.5).max(0).values
        weights = logits.softmax(-1).mean(0)
        important = torch.stack([weights[max(at - kernel // 2, 0) : at + kernel // 2 + 1].max() for at in range(old)])
        directions = keys / keys.norm(dim=1, keepdim=True)
        alike = directions @ directions.T
        for at in range(N):
            alike[at, at] = 0
            similar = [other for other in range(N) if alike[at, other] > threshold]
            if similar:
                alike[at, similar[-1]] = 0
        redundant = alike.mean(0).softmax(0)[:old]
        scores = mix * important - (1 - mix) * redundant
        assert set(ids) == best(scores.tolist(), budget - window) | set(range(old, N))


def test_triattention_scores_by_the_mean_query_at_later_distances():
    model, recent, budget, furthest = shared_model(), 2, 30, 20
    rotary = Rotary(model, model.config, model.model.layers[0].self_attn, 0)
    half, places = D // 2, torch.arange(N).double()[:, None]
    omega = 10000.0 ** (-torch.arange(half).double() / half)

    def unrotated(x):
        """Complex numbers [n, d/2] before rotation."""
        return torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones(N, half).double(), -places * omega)

    for (row, group), ids in kept(
        "triattention", budget, {"furthest": furthest, "recent": recent}, rotary=rotary
    ).items():
        queries, keys, _ = prompt(row, group)
        plain, best = unrotated(keys), []
        for head in range(SHARE):
            asked = unrotated(queries[head])
            mean = asked.mean(0)
            trigonometric = torch.zeros(N, dtype=torch.float64)
            offsets = [1, 2, 4, 8, 16]
            for offset in offsets:
                distance = (N - 1 - places) + offset
                phase = mean.angle() - plain.angle()
                trigonometric += (mean.abs() * plain.abs() * (omega * distance + phase).cos()).sum(1) / len(offsets)
            norms = ((asked.abs().mean(0) - mean.abs()) * plain.abs()).sum(1)
            score = trigonometric + norms
            best.append((score - score.mean()) / score.std(correction=0))
        total = torch.stack(best).max(0).values[: N - recent]
        assert set(ids) == set(total.topk(budget - recent).indices.tolist()) | set(range(N - recent, N))
