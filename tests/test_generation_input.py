"""kvbench's own generation: nothing to generate, nothing to read, and more than the model can read."""

import pytest
import torch
from test_generation import attach
from tiny import tiny_model, tokens

import kvbench
from kvbench.contract.errors import KVBenchError
from kvbench.engine.generation import exact_logits, force, generate, generate_batch
from kvbench.engine.prefill import prefill

pytestmark = pytest.mark.transformers

PROMPT = tokens(1, 61)[0].tolist()
POLICIES = ("full", "snapkv", "quest", "flat")


@pytest.mark.parametrize("policy", POLICIES)
def test_no_new_tokens_give_an_empty_answer_with_the_prefill_timed(policy):
    model = tiny_model()
    with attach(model, policy) as session:
        some = generate(session, PROMPT, max_new_tokens=3)
        none = generate(session, PROMPT, max_new_tokens=0)
        shared = generate(session, PROMPT, max_new_tokens=0, prefilled=prefill(tiny_model(), [PROMPT]))
        asked = generate(session, PROMPT, prompt_tokens=50, max_new_tokens=0)
        batch = generate_batch(session, [PROMPT, PROMPT[5:], PROMPT], max_new_tokens=[3, 0, 1])
    for one in (none, shared, asked):
        assert (one.tokens, one.step_s) == ([], [])
        assert one.prefill_s > 0
        assert one.index_s > 0 or policy == "full"
        assert one.bytes["resident"] > 0
    assert [one.tokens for one in batch] == [some.tokens, [], some.tokens[:1]]
    assert [len(one.step_s) for one in batch] == [2, 0, 0]


def test_no_new_tokens_without_a_cache():
    with kvbench.attach(tiny_model(), policy="full_no_cache") as session:
        none = generate(session, PROMPT, max_new_tokens=0)
    assert (none.tokens, none.step_s) == ([], [])
    assert none.prefill_s > 0


@pytest.mark.parametrize("policy", [*POLICIES, "full_no_cache"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"prompts": [PROMPT, []], "max_new_tokens": [1, 1]}, "prompt 1 is empty"),
        ({"prompts": [], "max_new_tokens": []}, "no prompts"),
        ({"prompts": [[5, 97]]}, r"token id 97.*96"),
        ({"prompts": [[5, -1]]}, r"token id -1.*96"),
        ({"max_new_tokens": [-1]}, "max_new_tokens is -1"),
        ({"max_new_tokens": [1, 1]}, "1 prompts and 2"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"prompt_tokens": 62}, "prompt_tokens is 62"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"max_new_tokens": [40]}, r"at most 100 tokens.*101"),
        ({"prompts": [PROMPT, PROMPT * 2], "max_new_tokens": [1, 1]}, r"at most 100 tokens.*123"),
    ],
)
def test_what_cannot_be_generated_is_said_in_a_sentence_before_anything_is_computed(policy, arguments, message):
    model = tiny_model(max_position_embeddings=100)
    session = kvbench.attach(model, policy=policy) if policy == "full_no_cache" else attach(model, policy)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with session, pytest.raises(KVBenchError, match=message):
        generate_batch(session, **{"prompts": [PROMPT], "max_new_tokens": [1], **arguments})
    assert not calls


def test_the_whole_window_can_be_filled():
    model = tiny_model(max_position_embeddings=100)
    with attach(model, "quest") as session:
        assert len(generate(session, PROMPT, max_new_tokens=39).tokens) == 39


@pytest.mark.parametrize(
    ("ids", "prompt_tokens", "message"),
    [
        (PROMPT, 0, "prompt_tokens is 0"),
        (PROMPT, 60, "prompt_tokens is 60"),
        ([], 1, "prompt 0 is empty"),
        (PROMPT * 2, 50, r"at most 100 tokens.*122"),
    ],
)
def test_forced_tokens_need_a_prompt_and_a_successor(ids, prompt_tokens, message):
    model = tiny_model(max_position_embeddings=100)
    with attach(model, "quest") as session, pytest.raises(KVBenchError, match=message):
        force(session, ids, prompt_tokens=prompt_tokens)
    with pytest.raises(KVBenchError, match=message):
        exact_logits(model, ids, prompt_tokens=prompt_tokens)


def test_a_prompt_computed_once_is_not_empty_either():
    for prompts, message in (([[]], "prompt 0 is empty"), ([], "no prompts")):
        with pytest.raises(KVBenchError, match=message):
            prefill(tiny_model(), prompts)


def test_a_session_forgets_where_a_prompt_of_kvbench_s_own_ended():
    model, ids = tiny_model(), tokens(1, 40)
    with attach(model, "snapkv"):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    with attach(model, "snapkv") as session:
        generate(session, PROMPT, max_new_tokens=2)
        force(session, PROMPT, prompt_tokens=50)
        with pytest.raises(KVBenchError):
            generate(session, PROMPT, max_new_tokens=5000)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
        generate(session, PROMPT, max_new_tokens=2, prefilled=prefill(tiny_model(), [PROMPT]))
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
