"""The oracle that keeps what the continuation attends to, against plain transformers' attention weights."""

import copy

import pytest
import torch
from tiny import shared_model, tokens
from transformers import LlamaForCausalLM

import kvbench
from kvbench.contract.budget import Budget
from kvbench.engine.generation import generate

MODEL, PROMPT, BUDGET, FUTURE = shared_model(), tokens(1, 70, seed=3), 20, 6


@pytest.fixture(scope="module")
def plain():
    """The same weights with transformers' own eager attention, which gives weights."""
    model = LlamaForCausalLM._from_config(copy.deepcopy(MODEL.config), attn_implementation="eager").eval().double()
    model.load_state_dict(MODEL.state_dict())
    return model


def expected(plain, ids, prompt):
    """The best of the prompt's tokens for each layer and head by the weights of what follows."""
    with torch.no_grad():
        weights = plain(ids, output_attentions=True).attentions
    sums = [layer[0, :, prompt:, :prompt].sum(1).view(2, 3, prompt).sum(1) for layer in weights]
    return [[set(head.topk(BUDGET).indices.tolist()) for head in layer] for layer in sums]


def kept(session, prompt):
    ids = [cached.by_lane[0].store.static_ids.expand(1, 2, -1)[0] for cached in session.cache.governed]
    return [[{token for token in head.tolist() if token < prompt} for head in layer] for layer in ids]


def test_it_keeps_what_its_own_answer_attends_to(plain):
    answer = MODEL.generate(PROMPT, max_new_tokens=FUTURE, do_sample=False)
    with kvbench.attach(MODEL, policy="oracle_future", budget=BUDGET, options={"future": FUTURE}) as session:
        generate(session, PROMPT[0].tolist(), max_new_tokens=4)
        assert kept(session, 70) == expected(plain, answer, 70)


def test_a_question_that_passes_through_the_policy_is_what_follows(plain):
    with kvbench.attach(MODEL, policy="oracle_future", budget=BUDGET, options={"future": FUTURE}) as session:
        generate(session, PROMPT[0].tolist(), prompt_tokens=62, max_new_tokens=3)
        assert kept(session, 62) == expected(plain, PROMPT[:, : 62 + FUTURE], 62)
        generate(session, PROMPT[0].tolist(), prompt_tokens=67, max_new_tokens=3)
        question_and_answer = kept(session, 67)
        MODEL(PROMPT[:, :62])  # nothing is known to follow any more
        own = kept(session, 62)
    answer = MODEL.generate(PROMPT, max_new_tokens=3, do_sample=False)
    assert question_and_answer == expected(plain, answer, 67)
    assert own == expected(plain, MODEL.generate(PROMPT[:, :62], max_new_tokens=FUTURE, do_sample=False), 62)


def test_what_comes_after_an_answers_end_is_not_looked_at(plain, monkeypatch):
    answer = MODEL.generate(PROMPT, max_new_tokens=FUTURE, do_sample=False)
    end = int(answer[0, 72])
    assert end not in answer[0, 70:72]
    monkeypatch.setattr(MODEL.generation_config, "eos_token_id", [end])
    with kvbench.attach(MODEL, policy="oracle_future", budget=BUDGET) as session, torch.no_grad():
        MODEL(PROMPT)
        assert kept(session, 70) == expected(plain, answer[:, :72], 70)


def test_it_keeps_more_of_the_answers_mass_than_any_other_eviction(plain):
    answer = MODEL.generate(PROMPT, max_new_tokens=FUTURE, do_sample=False)
    with torch.no_grad():
        weights = plain(answer, output_attentions=True).attentions[0][0, :, 70:, :70].sum(1).view(2, 3, 70).sum(1)
    mass = {}
    for policy, options in (("oracle_future", {"future": FUTURE}), ("snapkv", {"window": 8}), ("keydiff", {})):
        budget = Budget(tokens=BUDGET)
        with kvbench.attach(MODEL, policy=policy, budget=budget, options=options) as session, torch.no_grad():
            MODEL(PROMPT)
            mass[policy] = sum(
                float(weights[head, list(own)].sum()) for head, own in enumerate(kept(session, 70)[0])
            )  # fmt: skip
    assert mass["oracle_future"] > max(mass["snapkv"], mass["keydiff"])
