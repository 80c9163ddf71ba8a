"""The static set in another storage: what an evicting policy keeps, in the codes of a policy that holds."""

import pytest
import torch
from test_contract_plugins import plugins
from tiny import small_options, tiny_model, tokens

import kvbench
from kvbench.contract import coded
from kvbench.contract.budget import Budget
from kvbench.contract.composition import compose
from kvbench.contract.errors import KVBenchError
from kvbench.contract.storage import KVStore
from kvbench.engine.generation import generate_batch
from kvbench.plugins import registry

EVICTING = ("snapkv", "expected_attention", "h2o", "tova", "knorm", "keydiff", "streaming_llm", "kvzip")
KIVI = {"bits": 2, "group": 8, "residual": 16}
PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (75, 90, 90)]


def attach(model, policy, budget=40, allocator="uniform", **kivi):
    found = registry().find("policy", policy.partition("+")[0])
    options = small_options(found)
    if policy.endswith("+kivi"):
        options = {found.name: options, "kivi": {**KIVI, **kivi}}
    size = {"ratio": budget} if isinstance(budget, float) else {"tokens": budget}
    given = Budget(**size, allocator=allocator) if found.takes_budget else None
    return kvbench.attach(model, policy=policy, budget=given, options=options if policy != "kivi" else KIVI)


def rounded(keys, values, bits, group, residual):
    """Keys [t, d] and values [t, d] of one head, in float64, as KIVI's formulas leave them."""

    def through(x):
        low = x.amin(-1, keepdim=True).half().double()
        step = ((x.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().double()
        return low + step * ((x - low) / step).round().clamp(0, 2**bits - 1)

    keys, values = keys.double().clone(), values.double().clone()
    for first in range(0, len(keys) // residual * residual, group):
        keys[first : first + group] = through(keys[first : first + group].T).T
    old, channels = max(len(values) - residual, 0), min(group, values.shape[1])
    for first in range(0, values.shape[1], channels):
        values[:old, first : first + channels] = through(values[:old, first : first + channels])
    return keys, values


def note_attention(session):
    """The queries, the layer and the output of every step's attention."""
    seen, attention = [], session.attention

    def noting(module, query, key, value, mask, **kwargs):
        output = attention(module, query, key, value, mask, **kwargs)
        if query.shape[2] == 1:
            seen.append((module.layer_idx, query, output[0]))
        return output

    session.attention = noting
    return seen


@pytest.mark.parametrize("allocator", ["uniform", "ada"])
@pytest.mark.parametrize("policy", ["snapkv", "expected_attention"])
@torch.inference_mode()
def test_what_is_kept_is_attended_to_as_its_codes_say(policy, allocator, monkeypatch):
    """Float64: the plain policy's tokens, rounded by the paper's formulas, and what came after them."""
    model, ids = tiny_model(), torch.tensor(PROMPTS[:1])
    whole = []
    monkeypatch.setattr(KVStore, "__init__", _noting(KVStore.__init__, whole))
    with attach(model, policy, allocator=allocator) as session:
        model(ids)
        kept = [layer.by_lane[0].store.static_ids.clone() for layer in session.cache.governed]
    whole.clear()
    with attach(model, f"{policy}+kivi", allocator=allocator) as session:
        model(ids)
        store = [layer.by_lane[0].store for layer in session.cache.governed]
        assert all(torch.equal(one.static_ids, before) for one, before in zip(store, kept, strict=True))
        seen = note_attention(session)
        new = []
        for one in store:
            append = one.append
            one.append = lambda keys, values, append=append: (new.append((keys, values)), append(keys, values))
        model(torch.tensor([[7]]), past_key_values=session.cache)
    for layer, query, output in seen:
        keys, values = whole[layer]
        for head in range(6):
            group = head // 3
            mine = kept[layer].expand(1, 2, -1)[0, group]
            mine = mine[mine >= 0]
            coded_keys, coded_values = rounded(keys[0, group, mine], values[0, group, mine], **KIVI)
            if allocator == "ada":  # heads have storages of their own, and what is new another
                own_keys = torch.cat([coded_keys, new[layer][0][0, group].double()])
                own_values = torch.cat([coded_values, new[layer][1][0, group].double()])
            else:
                own_keys, own_values = rounded(
                    torch.cat([keys[0, group, mine], new[layer][0][0, group]]),
                    torch.cat([values[0, group, mine], new[layer][1][0, group]]), **KIVI,
                )  # fmt: skip
            weights = (own_keys @ query[0, head, 0].double() * 8**-0.5).softmax(0)
            torch.testing.assert_close(output[0, 0, head].double(), weights @ own_values, atol=2e-5, rtol=2e-5)


def _noting(init, whole):
    def noting(self, keys, values):
        whole.append((keys.clone(), values.clone()))
        init(self, keys, values)

    return noting


@pytest.mark.parametrize("policy", EVICTING)
def test_a_covering_budget_leaves_kivi_itself(policy):
    model = tiny_model(pad_token_id=None)
    with attach(model, "kivi") as session:
        expected = generate_batch(session, PROMPTS, max_new_tokens=[30] * 3, decoding="eager")
    with attach(model, f"{policy}+kivi", 1.0) as session:
        found = generate_batch(session, PROMPTS, max_new_tokens=[30] * 3, decoding="eager")
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert found[0].bytes["resident"] <= expected[0].bytes["resident"]


@pytest.mark.parametrize("allocator", ["uniform", "ada", "pyramid"])
@pytest.mark.parametrize("policy", EVICTING)
def test_bytes_are_those_of_the_codes_and_eight_bits_keep_the_answer(policy, allocator):
    model = tiny_model(pad_token_id=None)
    with attach(model, policy, allocator=allocator) as session:
        plain = generate_batch(session, PROMPTS[:1], max_new_tokens=[40], decoding="eager")[0]
        held = [store.static_tokens for store in session.cache.stores()]
    with attach(model, f"{policy}+kivi", allocator=allocator, bits=8) as session:
        eight = generate_batch(session, PROMPTS[:1], max_new_tokens=[40], decoding="eager")[0]
        assert [store.static_tokens for store in session.cache.stores()] == held
    with attach(model, f"{policy}+kivi", allocator=allocator) as session:
        found = generate_batch(session, PROMPTS[:1], max_new_tokens=[40], decoding="eager")[0]
    assert found.bytes["resident"] < 0.8 * plain.bytes["resident"]
    assert found.bytes["index"] == plain.bytes["index"]
    assert eight.tokens[:3] == plain.tokens[:3]  # 8 bits follow the plain answer until a near tie parts them


def test_the_right_tokens_leave_codes_too(monkeypatch):
    """knorm's evictions do not depend on values or on what is attended to, so the same tokens stay."""
    model, found = tiny_model(pad_token_id=None), {}
    monkeypatch.setattr(coded, "SPARE", 10)  # so that what stays is encoded anew a few times
    for policy in ("knorm", "knorm+kivi"):
        for allocator in ("uniform", "ada"):
            with attach(model, policy, allocator=allocator, bits=8) as session:
                generate_batch(session, PROMPTS[:1], max_new_tokens=[1], decoding="eager")
                for token in tokens(1, 45, seed=3)[0]:
                    with torch.inference_mode():
                        model(token[None, None], past_key_values=session.cache)
                layer = session.cache.governed[0].by_lane[0]  # whose keys follow from the tokens alone
                parts, ids = layer.store.static_parts(), layer.store.static_ids.expand(1, 2, -1)
                order = ids.argsort(-1)
                keys = torch.cat([part[0] for part in parts], dim=2)
                found[policy, allocator] = ids.gather(-1, order), keys.gather(2, order[..., None].expand(-1, -1, -1, 8))
    for allocator in ("uniform", "ada"):
        (ids, keys), (other_ids, other_keys) = found["knorm", allocator], found["knorm+kivi", allocator]
        assert torch.equal(ids, other_ids)
        real = (ids >= 0)[..., None]
        torch.testing.assert_close(keys * real, other_keys * real, atol=0.05, rtol=0)


@pytest.mark.parametrize("allocator", ["uniform", "ada"])
@pytest.mark.parametrize("policy", ["snapkv", "expected_attention", "kvzip"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_fixed_steps_over_codes_give_the_answers_of_the_hooks(policy, allocator, rows):
    model = tiny_model(pad_token_id=None)
    with attach(model, f"{policy}+kivi", allocator=allocator) as session:
        logits, head = {}, model.lm_head.forward
        for decoding in ("eager", "fixed"):
            seen = logits[decoding] = []
            model.lm_head.forward = lambda hidden, seen=seen: seen.append(head(hidden)[:, -1]) or head(hidden)
            found = generate_batch(session, PROMPTS[:rows], max_new_tokens=[40] * rows, decoding=decoding)
            assert {one.mode for one in found} == {decoding}
        model.lm_head.forward = head
    for step, (ours, theirs) in enumerate(zip(*logits.values(), strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-3, msg=lambda text, step=step: f"{step}: {text}")
    assert found[0].reads["device"] > 0


def test_what_has_no_fixed_step_over_codes_says_why():
    model = tiny_model(pad_token_id=None)
    for policy, told in (("h2o", "evicts at every step from the codes of 'kivi'"),):
        with attach(model, f"{policy}+kivi") as session, pytest.raises(KVBenchError, match=told):
            generate_batch(session, PROMPTS[:1], max_new_tokens=[3], decoding="fixed")


def test_a_storage_of_a_third_party_holds_the_static_set():
    """Every number of the kept tokens is what float16 leaves of it."""
    model, ids = tiny_model(), torch.tensor(PROMPTS[:1])
    found = {}
    snapkv = registry().find("policy", "snapkv")
    both = compose(snapkv, plugins.Halves)
    for name, made in (("plain", snapkv(snapkv.Options(window=8))), ("both", both(both.Options(window=8)))):
        for allocator in ("uniform", "ada"):
            with kvbench.attach(model, policy=made, budget=Budget(tokens=40, allocator=allocator)) as session:
                with torch.inference_mode():
                    model(ids)
                stores = session.cache.stores()
                found[name, allocator] = stores[0].static_parts()[0], sum(one.resident_bytes for one in stores)
    for allocator in ("uniform", "ada"):
        (plain, plain_bytes), (halves, bytes_) = found["plain", allocator], found["both", allocator]
        real = torch.ones_like(plain[0]) if plain[2] is None else plain[2][..., None]
        for place in (0, 1):
            assert torch.equal(plain[place].half().float() * real, halves[place] * real)
        assert bytes_ < 0.6 * plain_bytes


# -- selections from codes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocator", ["uniform", "ada"])
@pytest.mark.parametrize(("page", "kivi"), [(4, {}), (16, {}), (4, {"bits": 4, "residual": 8}), (3, {"residual": 24})])
@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_fixed_steps_select_pages_of_codes_as_the_hooks_do(page, kivi, allocator, rows):
    model, options = tiny_model(pad_token_id=None), {"quest": {"page_size": page}, "kivi": {**KIVI, **kivi}}
    logits, head = {}, model.lm_head.forward
    with kvbench.attach(
        model, policy="quest+kivi", options=options, budget=Budget(tokens=40, allocator=allocator)
    ) as session:
        for decoding in ("eager", "fixed"):
            seen = logits[decoding] = []
            model.lm_head.forward = lambda hidden, seen=seen: seen.append(head(hidden)[:, -1]) or head(hidden)
            found = generate_batch(session, PROMPTS[:rows], max_new_tokens=[60] * rows, decoding=decoding)
            assert {one.mode for one in found} == {decoding}
    model.lm_head.forward = head
    for step, (ours, theirs) in enumerate(zip(*logits.values(), strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-3, msg=lambda text, step=step: f"{step}: {text}")
    with kvbench.attach(model, policy="quest", options={"page_size": page}, budget=40) as session:
        plain = generate_batch(session, PROMPTS[:rows], max_new_tokens=[60] * rows, decoding="fixed")
    assert found[0].bytes["resident"] < plain[0].bytes["resident"]
    assert found[0].reads["device"] < plain[0].reads["device"]


@pytest.mark.parametrize("policy", ["retrieval", "infinigen", "oracle_topk"])
def test_other_selections_from_codes_say_why_they_have_no_fixed_step(policy):
    model = tiny_model(pad_token_id=None)
    with (
        attach(model, f"{policy}+kivi") as session,
        pytest.raises(KVBenchError, match="selects from the codes of 'kivi'"),
    ):
        generate_batch(session, PROMPTS[:1], max_new_tokens=[3], decoding="fixed")


# -- compression of codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocator", ["uniform", "ada"])
@pytest.mark.parametrize("policy", ["snapkv", "h2o", "knorm"])
def test_codes_are_compressed_while_decoding(policy, allocator):
    model, found = tiny_model(pad_token_id=None), {}
    for name in (policy, f"{policy}+kivi"):
        options = small_options(registry().find("policy", policy))
        if name.endswith("kivi"):
            options = {policy: options, "kivi": {**KIVI, "bits": 8}}
        budget = Budget(tokens=40, allocator=allocator, compress_every=16)
        with kvbench.attach(model, policy=name, options=options, budget=budget) as session:
            found[name] = generate_batch(session, PROMPTS[:1], max_new_tokens=[70], decoding="eager")[0]
            if name.endswith("kivi"):
                with pytest.raises(KVBenchError, match="compresses the codes of 'kivi'"):
                    generate_batch(session, PROMPTS[:1], max_new_tokens=[3], decoding="fixed")
    plain, codes = found.values()
    assert codes.held_tokens == plain.held_tokens
    assert codes.answer_bytes["peak"] < plain.answer_bytes["peak"]
    assert codes.tokens[:2] == plain.tokens[:2]
