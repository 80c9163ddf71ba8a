"""Compression while decoding: every so many tokens the answer is cut down too, by hooks and in fixed steps alike."""

import itertools

import pytest
import torch
from operations import copying
from test_contract_plugins import plugins
from tiny import small_options, tiny_model, tokens

import kvbench
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.engine.generation import generate, generate_batch
from kvbench.plugins import registry

POLICIES = ("snapkv", "h2o", "tova", "knorm", "keydiff", "expected_attention", "streaming_llm")
SCORERS = ("lagkv", "chunkkv", "criticalkv", "r_kv")
KEEPERS = ("triattention",)
"""Those that keep the prompt and compress the answer alone."""
"""Further ones, whose prompts are scored as `score_held` scores what is held."""
EVERY, BUDGET = 12, 30
PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (40, 61, 61)]
SHORT = tokens(1, 17, seed=17)[0].tolist()


def attach(model, policy, allocator="uniform", budget=BUDGET, every=EVERY):
    found = policy if isinstance(policy, type) else registry().find("policy", policy)
    given = Budget(tokens=budget, allocator=allocator, compress_every=every)
    return kvbench.attach(model, policy=found(found.Options(**small_options(found))), budget=given)


def decode(session, prompts, steps, decoding):
    """The generations, and the logits of every step."""
    seen, head = [], session.model.lm_head.forward
    session.model.lm_head.forward = lambda hidden: seen.append(head(hidden)[:, -1].clone()) or head(hidden)
    try:
        return generate_batch(session, prompts, max_new_tokens=[steps] * len(prompts), decoding=decoding), seen
    finally:
        session.model.lm_head.forward = head


@pytest.mark.parametrize(
    ("prompts", "policy", "allocator"),
    [
        *itertools.product(([SHORT], PROMPTS), (*POLICIES, plugins.LongestValues), ("uniform", "pyramid", "ada")),
        *((PROMPTS, policy, "ada") for policy in SCORERS),
        *(([SHORT], policy, "uniform") for policy in KEEPERS),
    ],
)
@torch.inference_mode()
def test_fixed_steps_compress_as_the_hooks_do(policy, allocator, prompts):
    model = tiny_model(pad_token_id=None)
    with attach(model, policy, allocator) as session:
        hooks, expected = decode(session, prompts, 65, "eager")
        fixed, found = decode(session, prompts, 65, "fixed")
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4, msg=lambda text, step=step: f"{step}: {text}")
    assert [one.tokens for one in fixed] == [one.tokens for one in hooks]
    for mine, theirs in zip(fixed[0].held_tokens, hooks[0].held_tokens, strict=True):
        assert mine == pytest.approx(theirs, abs=1)  # the mean over heads is rounded down hook by hook
    assert max(hooks[0].held_tokens) <= BUDGET + EVERY
    assert max(fixed[0].held_tokens[2 * EVERY :]) >= BUDGET + EVERY - 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("decoding", ["eager", "fixed"])
def test_a_budget_for_all_tokens_is_exact(policy, decoding):
    model = tiny_model(pad_token_id=None)
    ids = torch.tensor([SHORT])
    exact = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    with attach(model, policy, budget=60) as session:
        assert generate(session, SHORT, max_new_tokens=40, decoding=decoding).tokens == exact[0, len(SHORT) :].tolist()


# -- what is kept, by the papers' formulas in float64 ---------------------------------------------------------------


def first_layer(model, ids):
    """Queries [H, n, d], keys and values [G, n, d] of the first layer, which depend on the tokens alone."""
    found = {}
    with kvbench.attach(model, policy="full") as session, torch.inference_mode():
        attention = session.attention

        def noting(module, query, key, value, mask, **kwargs):
            found.setdefault(module.layer_idx, (query[0].double(), key[0].double(), value[0].double()))
            return attention(module, query, key, value, mask, **kwargs)

        session.attention = noting
        model(ids)
    return found[0]


def weights(queries, keys, query, kept, heads):
    """Softmax weights of some query heads at a position over the tokens kept."""
    return (queries[heads, query] @ keys[kept].T / keys.shape[1] ** 0.5).softmax(-1)


def scores_of(policy, queries, keys, prompt, budget):
    """A function of the tokens kept and the context's length that scores them for one key/value head's queries."""
    gathered = {}

    def h2o(kept, now, group):
        own = slice(group * 3, group * 3 + 3)
        if not gathered.get(group):
            gathered[group] = dict.fromkeys(range(prompt), 0.0)
            for query in range(prompt):
                for token, weight in enumerate(weights(queries, keys[group], query, range(query + 1), own).sum(0)):
                    gathered[group][token] += float(weight)
        for step in range(max(now - EVERY, prompt), now):
            seen = [token for token in kept if token <= step]
            for token, weight in zip(seen, weights(queries, keys[group], step, seen, own).sum(0), strict=True):
                gathered[group][token] = gathered[group].get(token, 0.0) + float(weight)
        recent = max(round(budget / 2), 1)
        return [float("inf") if token >= now - recent else gathered[group][token] for token in kept]

    def tova(kept, now, group):
        everyone = torch.stack([
            weights(queries, keys[head // 3], now - 1, kept, slice(head, head + 1))[0] for head in range(6)
        ]).mean(0)  # fmt: skip
        return [float("inf") if token == now - 1 else float(one) for token, one in zip(kept, everyone, strict=True)]

    def knorm(kept, now, group):
        return [float("inf") if token >= now - 8 else -float(keys[group][token].norm()) for token in kept]

    def keydiff(kept, now, group):
        directions = keys[group][kept] / keys[group][kept].norm(dim=-1, keepdim=True)
        anchor = directions.mean(0)
        alike = directions @ anchor / anchor.norm()
        return [float("inf") if token >= now - 8 else -float(one) for token, one in zip(kept, alike, strict=True)]

    def snapkv(kept, now, group):
        votes = torch.zeros(len(kept), dtype=torch.float64)
        for query in range(now - 8, now):
            seen = [place for place, token in enumerate(kept) if token <= query]
            found = weights(
                queries, keys[group], query, [kept[place] for place in seen], slice(group * 3, group * 3 + 3)
            )
            votes[seen] += found.mean(0)
        old = len(kept) - 8
        pooled = [sum(float(votes[i]) for i in range(max(at - 2, 0), min(at + 3, old))) / 5 for at in range(old)]
        return pooled + [float("inf")] * 8

    def triattention(kept, now, group):
        """Of the answer alone, standardised over it; the prompt stays."""
        own, half = [token for token in kept if token >= prompt], keys.shape[2] // 2
        omega = 10000.0 ** (-torch.arange(half).double() / half)

        def unrotated(x, places):
            angles = -torch.tensor(list(places)).double()[:, None] * omega
            return torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)

        plain, best = unrotated(keys[group][own], own), []
        for head in range(group * 3, group * 3 + 3):
            asked = unrotated(queries[head][:prompt], range(prompt))
            mean, score = asked.mean(0), torch.zeros(len(own), dtype=torch.float64)
            for power in range(17):
                distance = now - 1 - torch.tensor(own).double()[:, None] + 2**power
                phase = omega * distance + mean.angle() - plain.angle()
                score += (mean.abs() * plain.abs() * phase.cos()).sum(1) / 17
            score += ((asked.abs().mean(0) - mean.abs()) * plain.abs()).sum(1)
            best.append((score - score.mean()) / score.std(correction=0))
        found = dict(zip(own, torch.stack(best).max(0).values.tolist(), strict=True))
        return [float("inf") if token < prompt or token >= now - 8 else found[token] for token in kept]

    return {
        "h2o": h2o, "tova": tova, "knorm": knorm, "keydiff": keydiff, "snapkv": snapkv, "triattention": triattention,
    }[policy]  # fmt: skip


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "tova", "knorm", "keydiff", "triattention"])
def test_the_tokens_kept_are_those_of_the_formulas(policy):
    """In the first layer, from a prompt that the budget covers: all is decided while decoding."""
    model, answer = tiny_model(pad_token_id=None), tokens(1, 50, seed=5)[0].tolist()
    queries, keys, _ = first_layer(model, torch.tensor([SHORT + answer]))
    score = scores_of(policy, queries, keys, len(SHORT), BUDGET)
    kept = {group: list(range(len(SHORT))) for group in range(2)}
    rounds = 0
    with attach(model, policy) as session, torch.inference_mode():
        model(torch.tensor([SHORT]))
        for step, token in enumerate(answer):
            if step and step % EVERY == 0:
                now = len(SHORT) + step
                for group, mine in kept.items():
                    found = score(mine, now, group)
                    best = sorted(range(len(mine)), key=lambda at: -found[at])[:BUDGET]
                    rounds += len(mine) > BUDGET
                    kept[group] = sorted(mine[at] for at in best)
            for mine in kept.values():
                mine.append(len(SHORT) + step)
            model(torch.tensor([[token]]), past_key_values=session.cache)
            ids = session.cache.governed[0].by_lane[0].store.static_ids.expand(1, 2, -1)
            for group, mine in kept.items():
                assert sorted(ids[0, group].tolist()) == mine, step
    assert rounds == 2 * 3


def test_triattention_compresses_the_prompt_too_where_it_is_told_to():
    model, found = tiny_model(pad_token_id=None), registry().find("policy", "triattention")
    told = r"keeps the prompt, .* has no room for its 40 tokens and 8 .* at least 48"
    with attach(model, "triattention") as session, pytest.raises(KVBenchError, match=told):
        generate(session, PROMPTS[0], max_new_tokens=2)
    policy = found(found.Options(recent=8, keep_prompt=False))
    with kvbench.attach(model, policy=policy, budget=Budget(tokens=BUDGET, compress_every=EVERY)) as session:
        generate(session, PROMPTS[0], max_new_tokens=30, decoding="eager")
        ids = session.cache.stores()[0].static_ids
    assert bool((ids < 40).any()) and int((ids >= 40).sum(-1).min()) > 8


# -- memory and copies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocator", ["uniform", "ada"])
@pytest.mark.parametrize("policy", [*POLICIES, "every step"])
def test_a_step_between_compressions_copies_no_keys_and_values(policy, allocator):
    """Bytes of keys and values written per step do not grow with the cache, ragged or not, hook by hook."""
    model, found = tiny_model(pad_token_id=None), {}
    for budget in (100, 400):
        name, every = ("h2o", None) if policy == "every step" else (policy, 16)
        with attach(model, name, allocator, budget, every) as session, torch.inference_mode():
            model(tokens(1, 600))
            step = lambda token: model(torch.tensor([[token]]), past_key_values=session.cache)  # noqa: E731
            for token in range(3, 8):
                step(token)
            with copying(least=2 * 2 * 8 * 2) as counter:
                for token in range(3, 8):
                    step(token)
            found[budget] = counter.bytes / 5
    held = 2 * 2 * 8 * 4 * 300 * 3
    assert found[400] - found[100] < 0.02 * held, found


def test_memory_grows_in_room_that_is_there():
    model = tiny_model(pad_token_id=None)
    with attach(model, "snapkv") as session, torch.inference_mode():
        model(torch.tensor([PROMPTS[0]]))
        places = set()
        for token in range(3, 3 + EVERY):
            model(torch.tensor([[token]]), past_key_values=session.cache)
            places.add(session.cache.stores()[0].static_parts()[0][0].data_ptr())
        assert len(places) == 1
        assert session.cache.bytes()["resident"] == 3 * 2 * 2 * 8 * 4 * (BUDGET + EVERY)


@pytest.mark.parametrize("decoding", ["eager", "fixed"])
def test_peak_and_mean_bytes_over_the_answer(decoding):
    token = 3 * 2 * 2 * 8 * 4
    with attach(tiny_model(pad_token_id=None), "snapkv") as session:
        found = generate(session, PROMPTS[0], max_new_tokens=50, decoding=decoding)
    assert found.answer_bytes == {"peak": token * (BUDGET + EVERY), "mean": token * (BUDGET + EVERY)}
    with kvbench.attach(tiny_model(pad_token_id=None), policy="snapkv", budget=30, options={"window": 8}) as session:
        grown = generate(session, PROMPTS[0], max_new_tokens=150, decoding=decoding)
    assert grown.answer_bytes["peak"] >= grown.answer_bytes["mean"] > found.answer_bytes["mean"]
    assert grown.held_tokens == []


# -- bad input -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_compressed_is_told_in_one_sentence():
    model = tiny_model()
    for policy, every, told in (
        ("quest", 12, "does not compress while decoding"),
        ("kvzip", 12, "does not compress while decoding"),
        ("snapkv", 7, "smaller than the window of 8 tokens of policy 'snapkv'"),
        ("knorm", 4, "smaller than the window of 8 tokens"),
    ):
        with pytest.raises(KVBenchError, match=told):
            attach(model, policy, every=every)
    for every in (0, -1):
        with pytest.raises(ValueError, match="greater than or equal to 1"):
            Budget(tokens=30, compress_every=every)

    class Wrong(plugins.LongestValues):
        def score_held(self, layer, held):
            return held.values

    for decoding in ("eager", "fixed"):
        with (
            attach(model, Wrong) as session,
            pytest.raises(KVBenchError, match=r"gave shape .* in score_held at layer 0"),
        ):
            generate(session, PROMPTS[0], max_new_tokens=30, decoding=decoding)


def test_runs_of_earlier_versions_keep_their_names():
    assert "compress_every" not in Budget(tokens=30).model_dump(mode="json")
    assert Budget(tokens=30, compress_every=5).model_dump(mode="json")["compress_every"] == 5
    assert Budget.model_validate(Budget(tokens=30, compress_every=5).model_dump()) == Budget(
        tokens=30, compress_every=5
    )
