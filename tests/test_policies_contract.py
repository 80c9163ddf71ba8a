"""Policies that look beyond one layer's keys and queries, against slow, obvious float64 references of their papers."""

import itertools
import json

import pytest
import torch
from test_session import generate, padded_batch
from test_strategies import Watch, attended
from tiny import tiny_model, tokens

import kvbench
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError

SILENT = {"instruction": "", "continuation": ""}
BUDGETED = {
    "infinigen": {"partial_weight_ratio": 0.4},
    "infllm": {"init": 2, "local": 8, "block_size": 4, "representatives": 2},
    "shadowkv": {"chunk_size": 4, "local": 8, "outliers": 1, "rank": 6}, "kvzip": {**SILENT, "chunk": 16, "tail": 3},
    "expected_attention": {}, "duo_attention": {"sinks": 2, "recent": 8, "window": 8},
}  # fmt: skip
UNBUDGETED = {"kivi": {"group": 8, "residual": 16}, "think": {"pruned": 0.5, "window": 8}}
EVERY = {**BUDGETED, **UNBUDGETED}
MODEL = tiny_model()


class Record(Watch):
    """Keeps all values, the attention inputs and the outputs as well."""

    name, summary = "record", "Records."

    def __init__(self):
        super().__init__()
        self.values, self.hidden, self.outputs = {}, [], []

    def prefill(self, layer, queries, keys, values):
        self.values[layer.ordinal] = values.clone()
        return (yield from super().prefill(layer, layer.prompt_queries, keys, values))

    def query_window(self, number):
        return None

    def insert(self, layer, keys, values):
        self.values[layer.ordinal] = torch.cat([self.values[layer.ordinal], values], dim=2)
        return (yield from super().insert(layer, keys, values))

    def select(self, layer, queries, budget):
        self.hidden.append(layer.hidden)
        return (yield from super().select(layer, queries, budget))

    def attend(self, layer, queries, selection):
        result = yield
        self.outputs.append(result.output[:, :, 0])
        return result


def record(policy, budget, ids, options, steps=8, model=MODEL):
    probe = Record()
    with kvbench.attach(model, policy=policy, budget=budget, options=options, probes=[probe]) as session:
        generate(model, ids, steps=steps)
    return probe, session


def rope(x, positions, sign=1):
    """Rotary embedding with base 10000 on halves, as in Su et al. (arXiv 2104.09864) and Llama, in float64."""
    half = x.shape[-1] // 2
    angles = positions.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos(), sign * angles.sin()
    a, b = x.double()[..., :half], x.double()[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def softmax_attention(query, keys, values, scaling):
    return (keys.double() @ query.double() * scaling).softmax(0) @ values.double()


# -- what all of them promise ----------------------------------------------------------------------------------------


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("architecture", "policy"),
    [*(("gemma3", policy) for policy in EVERY), *(("llama", policy) for policy in UNBUDGETED)],
)
def test_without_a_limit_the_tokens_are_those_of_plain_transformers(architecture, policy):
    model = tiny_model(architecture)
    ids, mask = padded_batch()
    plain = generate(model, ids, mask, steps=12)
    options = {**EVERY[policy], **{"kivi": {"residual": 128}, "think": {"pruned": 0.0}}.get(policy, {})}
    with kvbench.attach(model, policy=policy, budget=1.0, options=options):
        assert torch.equal(generate(model, ids, mask, steps=12), plain)


@pytest.mark.parametrize("policy", UNBUDGETED)
def test_neither_padding_nor_chunks_change_what_a_row_gives(policy):
    ids, mask = padded_batch((40, 61, 40))
    options = EVERY[policy]
    with kvbench.attach(MODEL, policy=policy, budget=24, options=options):
        together = generate(MODEL, ids, mask, steps=12)
        alone = [generate(MODEL, ids[row : row + 1, mask[row] == 1], steps=12) for row in range(3)]
    assert torch.equal(together, torch.cat(alone))
    with kvbench.attach(MODEL, policy=policy, budget=24, options=options, prompt_tokens=61):
        assert torch.equal(generate(MODEL, ids[1:2], steps=12, prefill_chunk_size=17), together[1:2])


def test_duo_attention_stays_within_the_budget_of_all_layers_together():
    probe, _ = record("duo_attention", 30, tokens(2, 97), BUDGETED["duo_attention"])
    totals = {}
    for layer, _, static, selection, _, now in probe.steps:
        totals[now] = totals.get(now, 0) + sum(map(len, attended(layer, static, selection)))
    whole = (30 - 10) * 6 // (97 - 10)
    assert totals == {now: 2 * 3 * (6 * 10 + whole * (now - 10)) for now in range(98, 105)}
    assert totals[98] <= 30 * 2 * 6 * 3 + 2 * 3 * whole


@pytest.mark.parametrize("policy", EVERY)
def test_memory_is_really_freed_or_moved(policy):
    ids = tokens(1, 1500)
    with kvbench.attach(MODEL, policy="full") as session, torch.no_grad():
        MODEL(ids)
        full = session.cache.bytes()["resident"]
    with kvbench.attach(MODEL, policy=policy, budget=150, options=EVERY[policy]) as session, torch.no_grad():
        MODEL(ids)
        held = session.cache.bytes()
    assert full == 1500 * 2 * 2 * 8 * 4 * 3
    if policy in ("infinigen", "infllm", "shadowkv"):
        values = full // 2 if policy == "shadowkv" else full
        assert held["offloaded"] == pytest.approx(values, rel=0.02)
        assert held["resident"] < (0.45 if policy == "shadowkv" else 0.03) * full
        assert 0 < held["index"] < 0.3 * full
    elif policy == "kivi":  # 2 of 32 bits, and two float16 for 8 numbers
        assert held["resident"] == pytest.approx(full * (2 + 4) / 32, rel=0.12)
    elif policy == "think":
        assert held["resident"] == pytest.approx(full * 3 / 4, rel=0.02)
    else:
        assert held["resident"] <= 1.2 * full * 150 / 1500
        assert held["offloaded"] == 0


# -- each against its paper --------------------------------------------------------------------------------------------


def test_infinigen_fetches_what_the_previous_layers_input_predicts():
    prompt, budget, alpha = 80, 20, 2.0
    probe, _ = record("infinigen", budget, tokens(2, prompt), {"partial_weight_ratio": 0.4, "alpha": alpha})
    fetched = []
    for number, (layer, queries, static, selection, _, now) in enumerate(probe.steps):
        assert static.tolist() == [now - 1]
        for row in range(2):
            predicted = queries[row, :, 0].double()
            if layer.ordinal:
                weight = MODEL.model.layers[layer.ordinal].self_attn.q_proj.weight.double()
                plain = weight @ probe.hidden[number - 1][row, 0].double()
                predicted = rope(plain.view(6, 1, 8), torch.tensor([now - 1]))[:, 0]
            below, counts = [], []
            for group in range(2):
                asked = probe.prompt_queries[layer.ordinal][row, group * 3 : group * 3 + 3].double().flatten(0, 1)
                keys = probe.keys[layer.ordinal][row, group].double()
                skew = torch.linalg.svd(asked, full_matrices=False).Vh.T
                telling = (asked @ skew).abs().mean(0) + (keys[:prompt] @ skew).abs().mean(0)
                kept = telling.topk(3).indices
                relative = []
                for head in range(group * 3, group * 3 + 3):
                    score = (keys[: now - 1] @ skew)[:, kept] @ (predicted[head] @ skew)[kept] * layer.scaling
                    relative.append(score - score.max())
                below.append(torch.stack(relative).amax(0))
                counts.append(int((below[-1] > -alpha).sum()))
            count = min(-(-sum(counts) // 2), budget - 1)
            fetched.append(count)
            for group in range(2):
                expected = sorted(below[group].topk(count).indices.tolist())
                found = selection.ids[row, group]
                assert sorted(found[found >= 0].tolist()) == expected
    assert min(fetched) < budget - 1  # the threshold decides, not the budget alone


def test_infllm_looks_up_blocks_by_representatives_and_places_them_at_the_local_distance():
    prompt, budget, init, local, block, marks = 83, 30, 2, 8, 4, 2
    options = {"init": init, "local": local, "block_size": block, "representatives": marks}
    probe, _ = record("infllm", budget, tokens(2, prompt), options, steps=14)
    seen = {index: queries.double() for index, queries in probe.prompt_queries.items()}
    closed = {}
    for (layer, queries, static, selection, _, now), output in zip(probe.steps, probe.outputs, strict=True):
        keys, values = probe.keys[layer.ordinal], probe.values[layer.ordinal].double()
        plain = rope(keys, torch.arange(keys.shape[2]), sign=-1)
        blocks = (now - init - local) // block
        stop = init + blocks * block
        assert sorted(static.tolist()) == list(range(stop, now))
        for row in range(2):
            for number in range(blocks):
                for group in range(2):
                    if (layer.ordinal, row, number, group) in closed:
                        continue
                    judged = []
                    for token in range(init + number * block, init + (number + 1) * block):
                        following = seen[layer.ordinal][row, group * 3 : group * 3 + 3, token + 1 : token + 1 + local]
                        judged.append((following.sum(0) @ keys[row, group, token].double()).mean())
                    best = torch.stack(judged).topk(marks).indices + init + number * block
                    closed[layer.ordinal, row, number, group] = best
            turned = rope(rope(queries[row], torch.tensor([now - 1]), sign=-1), torch.tensor([local]))[:, 0]
            relevance = [
                sum(
                    turned[head] @ plain[row, head // 3, closed[layer.ordinal, row, number, head // 3]].T
                    for head in range(6)
                ).sum()
                for number in range(blocks)
            ]
            count = (budget - len(static) - init) // block
            best = torch.stack(relevance).topk(count).indices
            far = [*range(init), *(init + int(n) * block + i for n in best for i in range(block))]
            for head in range(6):
                assert sorted(selection.ids[row, head // 3].tolist()) == sorted(far)
                near = static.tolist()
                straight = keys[row, head // 3, near].double() @ queries[row, head, 0].double()
                logits = torch.cat([plain[row, head // 3, far] @ turned[head], straight]) * layer.scaling
                expected = logits.softmax(0) @ values[row, head // 3, far + near]
                torch.testing.assert_close(output[row, head].double(), expected, atol=1e-4, rtol=1e-3)
        seen[layer.ordinal] = torch.cat([seen[layer.ordinal], queries.double()], dim=2)
    assert (
        max(number for _, _, number, _ in closed) >= (prompt - init - local) // block
    )  # a block closed while decoding


def test_shadowkv_rebuilds_low_rank_keys_of_the_chunks_its_landmarks_choose():
    prompt, budget, chunk, local, outliers, rank = 86, 36, 4, 8, 2, 5
    options = {"chunk_size": chunk, "local": local, "outliers": outliers, "rank": rank}
    probe, _ = record("shadowkv", budget, tokens(2, prompt), options)
    chunks = (prompt - local) // chunk
    stop = chunks * chunk
    for (layer, queries, static, selection, _, now), output in zip(probe.steps, probe.outputs, strict=True):
        assert sorted(static.tolist()) == list(range(stop, now))
        for row in range(2):
            keys, values = probe.keys[layer.ordinal][row].double(), probe.values[layer.ordinal][row].double()
            plain = rope(keys[:, :stop], torch.arange(stop), sign=-1)
            matrix = plain.transpose(0, 1).reshape(stop, -1)
            left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
            low = (left[:, :rank] * singular[:rank] @ right[:rank]).view(stop, 2, 8).transpose(0, 1)
            rebuilt = rope(low, torch.arange(stop))
            for group in range(2):
                parts = keys[group, :stop].view(chunks, chunk, 8)
                means = parts.mean(1)
                cosine = torch.nn.functional.cosine_similarity(parts, means[:, None], dim=-1).amin(1)
                odd = cosine.topk(outliers, largest=False).indices.tolist()
                regular = [number for number in range(chunks) if number not in odd]
                weights = torch.stack([
                    (means[regular] @ queries[row, head, 0].double() * layer.scaling).softmax(0)
                    for head in range(group * 3, group * 3 + 3)
                ]).amax(0)  # fmt: skip
                count = (budget - len(static)) // chunk - outliers
                chosen = [regular[int(i)] for i in weights.topk(count).indices]
                far = [number * chunk + i for number in odd + chosen for i in range(chunk)]
                assert sorted(selection.ids[row, group].tolist()) == sorted(far)
                held = keys[group].clone()
                held[[number * chunk + i for number in chosen for i in range(chunk)]] = rebuilt[
                    group, [number * chunk + i for number in chosen for i in range(chunk)]
                ]
                everything = far + static.tolist()
                for head in range(group * 3, group * 3 + 3):
                    expected = softmax_attention(
                        queries[row, head, 0], held[everything], values[group, everything], layer.scaling
                    )
                    torch.testing.assert_close(output[row, head].double(), expected, atol=1e-4, rtol=1e-3)


def test_kvzip_keeps_what_repeating_the_prompt_attends_to():
    prompt, budget, chunk, tail = 50, 20, 20, 3
    ids = tokens(2, prompt)
    _, session = record("kvzip", budget, ids, {**SILENT, "chunk": chunk, "tail": tail}, steps=2)
    scores = torch.zeros(3, 2, 2, prompt, dtype=torch.float64)
    for start in range(0, prompt, chunk):
        stop = min(start + chunk, prompt)
        more = ids[:, max(start - tail, 0) : stop]
        longer, _ = record("streaming_llm", 1.0, torch.cat([ids, more], dim=1), {}, steps=2)
        for layer in range(3):
            for row in range(2):
                for head in range(6):
                    queries = longer.prompt_queries[layer][row, head, prompt:].double()
                    keys = longer.keys[layer][row, head // 3].double()
                    for number, query in enumerate(queries):
                        visible = torch.cat([keys[start:stop], keys[prompt : prompt + number + 1]])
                        weights = (visible @ query * 8**-0.5).softmax(0)[: stop - start]
                        best = scores[layer, row, head // 3, start:stop]
                        scores[layer, row, head // 3, start:stop] = torch.maximum(best, weights)
    uneven = 0
    for cached in session.cache.governed:
        (layer,) = cached.by_lane
        for row in range(2):
            best = scores[layer.ordinal, row].flatten().topk(2 * budget).indices
            for group in range(2):
                expected = sorted(int(i) % prompt for i in best if int(i) // prompt == group)
                kept = layer.store.static_ids[row, group]
                assert sorted(kept[(kept >= 0) & (kept < prompt)].tolist()) == expected
                uneven += len(expected) != budget
    assert uneven


def test_kvzip_puts_the_papers_words_before_the_replay():
    class Tokenizer:
        texts = ()

        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            self.texts += (text,)
            return [5, 6] if len(self.texts) == 1 else [7]

    ids, seen, tokenizer = tokens(1, 40), [], Tokenizer()
    handle = MODEL.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0][0].tolist()))
    with kvbench.attach(MODEL, policy="kvzip", budget=10, options={"chunk": 25}, tokenizer=tokenizer), torch.no_grad():
        MODEL(ids)
    handle.remove()
    prompt = ids[0].tolist()
    assert seen == [prompt, [5, 6, *prompt[:25]], [7, *prompt[17:]]]
    assert tokenizer.texts == (
        "\n\nRepeat the previous context exactly.",
        "\n\nRepeat the part of the previous context exactly, starting with ",
    )
    with (
        pytest.raises(KVBenchError, match="tokenizer"),
        kvbench.attach(MODEL, policy="kvzip", budget=10, options={"chunk": 25}),
    ):
        pass


class ChatTokenizer:
    """Its template puts the tokens 21, 22, 23 before a message and 24, 25 after it; any other text is token 9."""

    chat_template = "yes"

    def apply_chat_template(self, messages, **kwargs):
        assert kwargs["add_generation_prompt"]
        assert not kwargs["enable_thinking"]
        return f"<system>{messages[0]['content']}<assistant>"

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"<system>": [21, 22, 23], "<assistant>": [24, 25]}.get(text, [9])


@pytest.mark.parametrize("begins", ["whole", "merged", "otherwise"])
def test_kvzip_keeps_the_system_prompt_and_replays_in_the_chat_template(begins):
    ids, seen, chunk, budget = tokens(2, 43), [], 20, 12
    system = {"whole": 3, "merged": 2, "otherwise": 0}[begins]
    ids[:, :system] = torch.tensor([21, 22, 23][:system])
    ids[:, system] = 30
    handle = MODEL.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0][0].tolist()))
    options = {"chunk": chunk, "tail": 4}
    session = kvbench.attach(MODEL, policy="kvzip", budget=budget, options=options, tokenizer=ChatTokenizer())
    with session, torch.no_grad():
        MODEL(ids)
    handle.remove()
    prompt = ids[0].tolist()
    chunks = [prompt[start : start + chunk] for start in range(system, 43, chunk)]
    expected = [[9, 24, 25, *chunks[0]]]
    expected += [[9, *before[-4:], 24, 25, *part] for before, part in itertools.pairwise(chunks)]
    assert seen == [prompt, *expected]
    for cached in session.cache.governed:
        (layer,) = cached.by_lane
        assert layer.static == (system, 0)
        for row in layer.store.static_ids:
            for kept in row:
                assert set(range(system)) <= set(kept.tolist())
            assert (row >= 0).sum() == budget * 2


def test_kvzip_weighs_the_system_prompt_beside_the_chunk():
    prompt, budget, system = 33, 12, 3
    ids = tokens(1, prompt)
    ids[:, :system] = torch.tensor([21, 22, 23])
    options = {"chunk": prompt, "instruction": "", "continuation": ""}
    session = kvbench.attach(MODEL, policy="kvzip", budget=budget, options=options, tokenizer=ChatTokenizer())
    with session, torch.no_grad():
        MODEL(ids)
    more = torch.cat([ids, torch.tensor([[24, 25]]), ids[:, system:]], dim=1)
    longer, _ = record("streaming_llm", 1.0, more, {}, steps=2)
    for cached in session.cache.governed:
        (layer,) = cached.by_lane
        scores = torch.zeros(2, prompt - system, dtype=torch.float64)
        for head in range(6):
            queries = longer.prompt_queries[layer.ordinal][0, head, prompt:].double()
            keys = longer.keys[layer.ordinal][0, head // 3].double()
            for number, query in enumerate(queries):
                weights = (keys[: prompt + number + 1] @ query * 8**-0.5).softmax(0)[system:prompt]
                scores[head // 3] = torch.maximum(scores[head // 3], weights)
        best = scores.flatten().topk(2 * (budget - system)).indices.tolist()
        for group in range(2):
            mine = sorted(i % (prompt - system) + system for i in best if i // (prompt - system) == group)
            kept = layer.store.static_ids[0, group]
            assert kept[(kept >= 0) & (kept < prompt)].tolist() == [*range(system), *mine]


@pytest.mark.parametrize("normalise_sinks", [True, False])
@pytest.mark.parametrize("covariance", [True, False])
def test_expected_attention_keeps_what_a_gaussian_of_queries_would_attend_to(covariance, normalise_sinks):
    prompt, budget, sinks, future = 70, 24, 4, 16
    options = {"sinks": sinks, "future": future, "covariance": covariance, "normalise_sinks": normalise_sinks}
    probe, session = record("expected_attention", budget, tokens(2, prompt), options, steps=2)
    turn = torch.stack([rope(torch.eye(8)[:, None], torch.tensor([prompt + t]))[:, 0] for t in range(future)]).mean(0)
    for cached in session.cache.governed:
        (layer,) = cached.by_lane
        plain = rope(probe.prompt_queries[layer.ordinal], torch.arange(prompt), sign=-1)[:, :, sinks:]
        for row in range(2):
            for group in range(2):
                keys = probe.keys[layer.ordinal][row, group, :prompt].double()
                weights = torch.zeros(prompt, dtype=torch.float64)
                for head in range(group * 3, group * 3 + 3):
                    mean = plain[row, head].mean(0) @ turn
                    spread = turn.T @ torch.cov(plain[row, head].T, correction=0) @ turn * covariance
                    exponents = [key @ mean / 8**0.5 + key @ spread @ key / 16 for key in keys]
                    left_out = 0 if normalise_sinks else sinks
                    weights[left_out:] += torch.stack(exponents[left_out:]).softmax(0) / 3
                score = weights * probe.values[layer.ordinal][row, group, :prompt].double().norm(dim=-1)
                expected = [*range(sinks), *(int(i) + sinks for i in score[sinks:].topk(budget - sinks).indices)]
                kept = layer.store.static_ids[row, group]
                assert kept[kept < prompt].tolist() == sorted(expected)


@pytest.mark.parametrize("given", [True, False])
def test_duo_attention_gives_the_context_to_the_best_heads_of_the_model(given, tmp_path):
    prompt, budget, sinks, recent, window = 90, 40, 2, 8, 8
    options = {"sinks": sinks, "recent": recent, "window": window}
    profile = [[0.1, 0.9], [0.8, 0.3], [0.2, 0.7]]
    if given:
        (tmp_path / "profile.json").write_text(json.dumps(profile))
        options["profile"] = tmp_path / "profile.json"
    probe, session = record("duo_attention", budget, tokens(2, prompt), options)
    scores = torch.tensor(profile, dtype=torch.float64)[:, None].repeat(1, 2, 1)
    moved = torch.zeros_like(scores)
    if not given:
        for layer in range(3):
            for row in range(2):
                for head in range(6):
                    for i in range(prompt - window, prompt):
                        keys, values = (x[layer][row, head // 3, : i + 1].double() for x in (probe.keys, probe.values))
                        query, near = probe.prompt_queries[layer][row, head, i], [0, 1, *range(i + 1 - recent, i + 1)]
                        whole = softmax_attention(query, keys, values, 8**-0.5)
                        streamed = softmax_attention(query, keys[near], values[near], 8**-0.5)
                        moved[layer, row, head // 3] += (whole - streamed).square().sum()
        scores = moved
    count = (budget - sinks - recent) * 6 // (prompt - sinks - recent)
    assert 0 < count < 6
    for (layer, queries, static, _, _, now), output in zip(probe.steps, probe.outputs, strict=True):
        streaming = [*range(sinks), *range(now - recent, now)]
        assert sorted(static.tolist()) == streaming
        for row in range(2):
            best = scores[:, row].flatten().topk(count).indices.tolist()
            for head in range(6):
                seen = list(range(now)) if layer.ordinal * 2 + head // 3 in best else streaming
                keys, values = (part[layer.ordinal][row, head // 3, seen] for part in (probe.keys, probe.values))
                expected = softmax_attention(queries[row, head, 0], keys, values, layer.scaling)
                torch.testing.assert_close(output[row, head].double(), expected, atol=1e-4, rtol=1e-3)
    aside = sum(store.aside._tokens.length * store.aside._tokens.keys.shape[1] for store in session.cache.stores())
    assert aside == 2 * count * (prompt + 7 - sinks - recent)


def test_duo_attention_gives_the_context_to_the_heads_that_an_allocator_gives_most(tmp_path):
    prompt, size, sinks, recent = 90, 40, 2, 8
    budget = Budget(tokens=size, allocator="ada", options={"alpha": 0, "window": 8})
    _, session = record("duo_attention", budget, tokens(2, prompt), {"sinks": sinks, "recent": recent})
    layers = [layer.by_lane[0] for layer in session.cache.governed]
    given = torch.cat([layer.budget.heads for layer in layers], dim=1)
    chosen = torch.cat([layer.state["heads"] for layer in layers], dim=1)
    count = (size - sinks - recent) * 6 // (prompt - sinks - recent)
    assert (chosen.sum(1) == count).all()
    for row in range(2):
        assert given[row][chosen[row]].min() >= given[row][~chosen[row]].max()
    (tmp_path / "profile.json").write_text("[[1, 2], [3, 4], [5, 6]]")
    with pytest.raises(KVBenchError, match="leave one of them out"):
        record("duo_attention", budget, tokens(2, prompt), {"profile": tmp_path / "profile.json"})


@pytest.mark.parametrize(
    ("content", "message"), [("[[1, 2]]", r"shape \[1, 2\]"), ("{", "not readable"), ('{"a": 1}', "not readable")]
)
def test_a_profile_that_does_not_fit_is_refused_before_anything_runs(content, message, tmp_path):
    (tmp_path / "profile.json").write_text(content)
    options = {"profile": tmp_path / "profile.json"}
    with (
        pytest.raises(KVBenchError, match=message),
        kvbench.attach(MODEL, policy="duo_attention", budget=0.5, options=options),
    ):
        pass


def test_kivi_refuses_groups_that_do_not_fit():
    with (
        kvbench.attach(MODEL, policy="kivi", options={"group": 16, "residual": 40}),
        pytest.raises(KVBenchError, match="multiples of the group of 16"),
    ):
        generate(MODEL, tokens(1, 60))
