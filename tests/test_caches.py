"""What `generate` does with caches around a policy: chunks, turns, caches of other kinds, sessions that ended."""

import copy
import pickle
import threading

import pytest
import torch
from test_session import options_of, padded_batch
from tiny import ALIKE, budgeted_policies, tiny_model, tokens
from torch import nn
from transformers import AttentionInterface, DynamicCache, StaticCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import kvbench
from kvbench.contract.errors import KVBenchError
from kvbench.engine.session import Session

pytestmark = pytest.mark.transformers

SINKS, BUDGET = 4, 24


def attach(model, policy, budget=BUDGET, **more):
    options = {} if policy == "full" else options_of(policy)
    return kvbench.attach(model, policy=policy, budget=None if policy == "full" else budget, options=options, **more)


def answer(model, ids, mask=None, steps=8, **more):
    mask = torch.ones_like(ids) if mask is None else mask
    more = {"do_sample": False, **more}
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=steps, return_dict_in_generate=True, output_scores=True, **more
    )


def same(one, other):
    return torch.equal(one.sequences, other.sequences) and all(map(torch.equal, one.scores, other.scores))


# -- chunks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["full", *(name for name in budgeted_policies() if name not in ALIKE)])
def test_generate_in_chunks_gives_what_generate_in_one_call_gives(policy):
    model = tiny_model()
    if policy == "squeezed_attention":
        model = model.double()  # in single precision a chunk's rounding moves a key to another cluster
    ids, mask = padded_batch((61, 30, 47))  # 31 tokens of padding, more than two chunks of 13
    with attach(model, policy, 0.5) as session:
        whole = answer(model, ids, mask)
        budgets = session.cache.budgets
        for chunk in (13, 100):
            chunked = answer(model, ids, mask, prefill_chunk_size=chunk)
            assert session.cache.budgets == budgets
            assert torch.equal(whole.sequences, chunked.sequences)
            for one, other in zip(whole.scores, chunked.scores, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("allocator", ["ada", "squeeze"])
def test_allocators_see_the_whole_prompt_of_every_row_in_chunks_too(allocator):
    model, (ids, mask) = tiny_model(), padded_batch((61, 30, 47))
    with attach(model, "snapkv", kvbench.Budget(ratio=0.5, allocator=allocator)) as session:
        whole = answer(model, ids, mask)
        budgets = session.cache.budgets
        for chunk in (1, 13):
            assert torch.equal(whole.sequences, answer(model, ids, mask, prefill_chunk_size=chunk).sequences)
            assert session.cache.budgets.keys() == budgets.keys()


@pytest.mark.parametrize("policy", ["snapkv", "quest", "duo_attention"])
def test_chunks_of_one_token_and_a_last_chunk_of_one_token_are_prompt(policy):
    model, ids = tiny_model(), tokens(1, 61)
    with attach(model, policy, 0.5) as session:
        whole = answer(model, ids)
        for chunk in (1, 20, 60, 61):
            assert torch.equal(whole.sequences, answer(model, ids, prefill_chunk_size=chunk).sequences)
            assert {layer.prompt_tokens for cached in session.cache.governed for layer in cached.by_lane} == {61}


def test_chunks_that_the_model_s_own_generation_config_asks_for_are_noticed():
    model, ids = tiny_model(), tokens(1, 61)
    with attach(model, "snapkv", 0.5):
        whole = answer(model, ids)
    model.generation_config.prefill_chunk_size = 20
    with attach(model, "snapkv", 0.5):
        assert torch.equal(whole.sequences, answer(model, ids).sequences)


@pytest.mark.parametrize("chunk", [None, 20])
def test_sampling_draws_what_it_draws_without_a_policy_that_covers_everything(chunk):
    model, (ids, mask) = tiny_model(), padded_batch()
    draws = {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 2}
    torch.manual_seed(3)
    plain = answer(model, ids, mask, **draws)
    with attach(model, "snapkv", 1.0):
        torch.manual_seed(3)
        ours = answer(model, ids, mask, prefill_chunk_size=chunk, **draws)
    assert torch.equal(plain.sequences, ours.sequences)


def test_a_longer_prompt_announced_than_generate_has_is_refused():
    model = tiny_model()
    with attach(model, "snapkv", prompt_tokens=70), pytest.raises(KVBenchError, match=r"70 tokens.*has 61"):
        answer(model, tokens(1, 61))


def test_a_prompt_announced_shorter_sends_the_rest_through_the_policy():
    model, ids = tiny_model(), tokens(1, 61)
    with attach(model, "quest", prompt_tokens=40) as session:
        out = answer(model, ids, prefill_chunk_size=20)
        assert session.cache.governed[0].by_lane[0].prompt_tokens == 40
    with attach(model, "quest"), torch.no_grad():
        past = model(ids[:, :40]).past_key_values
        for place in range(40, 61):
            logits = model(ids[:, place : place + 1], past_key_values=past).logits
    torch.testing.assert_close(out.scores[0], logits[:, -1])


# -- turns ---------------------------------------------------------------------------------------------------------


def two_turns(model, first, second, mask=None, **more):
    """Answers to two turns, the second with the first's cache; the whole conversation and both answers' scores."""
    mask = torch.ones_like(first) if mask is None else mask
    one = answer(model, first, mask, **more)
    ids = torch.cat([one.sequences, second], dim=1)
    mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
    two = answer(model, ids, mask, past_key_values=one.past_key_values, **more)
    return two.sequences, torch.stack([*one.scores, *two.scores], dim=1)


@pytest.mark.parametrize("policy", ["full", "snapkv", "streaming_llm", "h2o", "quest", "flat", "duo_attention"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_two_turns_under_a_covering_budget_are_those_of_plain_transformers(policy, chunk):
    model, (ids, mask) = tiny_model(), padded_batch()
    more = tokens(3, 7, seed=5)
    plain, expected = two_turns(model, ids, more, mask)
    if chunk and not torch.equal(two_turns(model, ids, more, mask, prefill_chunk_size=chunk)[0], plain):
        pytest.skip("this transformers itself answers a second turn in chunks otherwise than whole (5.17 does)")
    with attach(model, policy, 1.0):
        ours, found = two_turns(model, ids, more, mask, prefill_chunk_size=chunk)
    assert torch.equal(plain, ours)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def generating(prompt, steps, more):
    """Places of a conversation of two turns whose logits gave the answers' tokens."""
    second = prompt + steps + more
    return [*range(prompt - 1, prompt + steps - 1), *range(second - 1, second + steps - 1)]


def test_a_second_turn_under_eviction_is_governed_token_by_token_as_the_first_prompt_set_it():
    model, ids, more = tiny_model(), tokens(2, 50), tokens(2, 7, seed=5)
    with attach(model, "streaming_llm"):
        conversation, found = two_turns(model, ids, more)
    # The prompt is causal; from then on a token sees the sinks and the last 24 − 4 tokens, itself among them.
    length = conversation.shape[1] - 1
    row, column = torch.arange(length)[:, None], torch.arange(length)
    sinks = options_of("streaming_llm")["sinks"]
    seen = (column <= row) & ((row < 50) | (column < sinks) | (column > row - (BUDGET - sinks)))
    with torch.no_grad():
        logits = model(conversation[:, :-1], attention_mask=seen.expand(2, 1, -1, -1)).logits
    torch.testing.assert_close(found, logits[:, generating(50, 8, 7)], rtol=1e-3, atol=1e-3)


def best_tokens_attention(module, query, key, value, attention_mask, scaling, **_):
    """Plain attention; but after 50 tokens a head sees its newest token and the 23 others that score best."""
    keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    logits = query @ keys.transpose(-1, -2) * scaling
    row, column = torch.arange(query.shape[2])[:, None], torch.arange(keys.shape[2])
    earlier = logits.masked_fill(column >= row, -torch.inf)
    least = earlier.topk(min(BUDGET - 1, logits.shape[-1]), dim=-1).values[..., -1:]
    seen = (column == row) | ((column < row) & ((row < 50) | (earlier >= least)))
    return (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(1, 2), None


def test_a_second_turn_under_selection_chooses_from_both_turns():
    model, ids, more = tiny_model(), tokens(2, 50), tokens(2, 7, seed=5)
    with attach(model, "oracle_topk"):
        conversation, found = two_turns(model, ids, more)
    AttentionInterface.register("best_tokens", best_tokens_attention)
    model.set_attn_implementation("best_tokens")
    with torch.no_grad():
        logits = model(conversation[:, :-1]).logits
    torch.testing.assert_close(found, logits[:, generating(50, 8, 7)], rtol=1e-3, atol=1e-3)


def test_conversations_can_take_turns_within_a_block():
    model = tiny_model()
    prompts, more = [tokens(1, 61, seed=1), tokens(1, 40, seed=2)], tokens(1, 5, seed=3)
    with attach(model, "quest"):
        apart = [two_turns(model, prompt, more)[0] for prompt in prompts]
    with attach(model, "quest"):
        firsts = [answer(model, prompt) for prompt in prompts]
        mixed = [
            answer(model, torch.cat([first.sequences, more], dim=1), past_key_values=first.past_key_values).sequences
            for first in firsts
        ]
    assert all(map(torch.equal, apart, mixed))


# -- caches of other kinds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "kind", "chunk", "policy"),
    [
        ("llama", "static", None, "full"),
        ("llama", "static", 20, "snapkv"),
        ("llama", "offloaded", 20, "quest"),
        ("llama", "dynamic", 20, "full"),
        ("gemma3", "static", 20, "quest"),
        ("gemma3", "static", None, "snapkv"),
        ("gemma3", "offloaded", None, "full"),
        ("gemma3", "dynamic", 20, "snapkv"),
    ],
)
def test_the_policy_s_cache_takes_the_place_of_the_one_that_generate_makes(architecture, kind, chunk, policy):
    model, (ids, mask) = tiny_model(architecture), padded_batch()
    with attach(model, policy):
        expected = answer(model, ids, mask)
        assert same(expected, answer(model, ids, mask, cache_implementation=kind))
        again = answer(model, ids, mask, cache_implementation=kind, prefill_chunk_size=chunk)
    assert torch.equal(again.sequences, expected.sequences)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_empty_cache_that_is_passed_in_is_filled_by_the_policy(implementation):
    model, more = tiny_model(), tokens(1, 5, seed=3)
    model.set_attn_implementation(implementation)
    ids = tokens(1, 61)
    with attach(model, "snapkv"):
        expected, _ = two_turns(model, ids, more)
        for cache in (DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=99)):
            first = answer(model, ids, past_key_values=cache)
            second = answer(model, torch.cat([first.sequences, more], dim=1), past_key_values=cache)
            assert torch.equal(second.sequences, expected)
            assert cache.get_seq_length() == expected.shape[1] - 1
    with pytest.raises(KVBenchError, match="inside"):
        model(more, past_key_values=cache)


def test_a_quantised_cache_is_refused():
    from transformers.cache_utils import Cache, QuantizedLayer

    class Quantised(QuantizedLayer):
        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, tensor):
            return tensor

    model = tiny_model()
    cache = Cache(layers=[Quantised() for _ in range(3)])
    with attach(model, "snapkv"), pytest.raises(KVBenchError, match="quantise"):
        answer(model, tokens(1, 40), past_key_values=cache)


# -- caches that have lost their session ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["full", "snapkv", "quest"])
def test_a_cache_is_refused_after_its_block_elsewhere_and_copied(policy):
    model, other, more = tiny_model(), tiny_model(seed=1), tokens(1, 1)
    with attach(model, policy) as session:
        cache = answer(model, tokens(1, 61)).past_key_values
        for copied in (copy.deepcopy, copy.copy, pickle.dumps, lambda c: copy.deepcopy(session.cache.layers[0])):
            with pytest.raises(KVBenchError, match="cannot be copied"):
                copied(cache)
        with pytest.raises(KVBenchError, match="inside"):
            other(more, past_key_values=cache)
        expected = model(more, past_key_values=cache).logits
    for use in (
        lambda: model(more, past_key_values=cache),
        lambda: other(more, past_key_values=cache),
        lambda: model.generate(tokens(1, 90), past_key_values=cache, max_new_tokens=2),
    ):
        with pytest.raises(KVBenchError, match=r"inside .*block"):
            use()
    with attach(model, policy):
        with pytest.raises(KVBenchError, match="another"):
            model(more, past_key_values=cache)
        fresh = answer(model, tokens(1, 61)).past_key_values
        assert torch.equal(model(more, past_key_values=fresh).logits, expected)


def test_parts_of_the_model_and_models_that_share_its_configuration_are_refused():
    model = tiny_model()
    twin = type(model)(model.config).eval()
    with attach(model, "snapkv"):
        for call in (model.model, twin):
            with pytest.raises(KVBenchError, match="Call LlamaForCausalLM itself"):
                call(tokens(1, 40))
        answer(model, tokens(1, 61))
        for call in (model.model, twin):
            with pytest.raises(KVBenchError, match="Call LlamaForCausalLM itself"):
                call(tokens(1, 40))


def test_another_number_of_rows_and_masks_of_other_shapes_are_refused():
    model = tiny_model()
    with attach(model, "snapkv"):
        cache = answer(model, tokens(2, 61)).past_key_values
        with pytest.raises(KVBenchError, match=r"2 rows.*1"):
            model(tokens(1, 1), past_key_values=cache)
        with pytest.raises(KVBenchError, match=r"\[2, 1, 40, 40\]"):
            model(tokens(2, 40), attention_mask=torch.ones(2, 1, 40, 40, dtype=torch.bool).tril())
    with attach(model, "full"):
        mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
        found = model(tokens(2, 40), attention_mask=mask).logits
    torch.testing.assert_close(found, model(tokens(2, 40)).logits)


def test_a_mask_is_seen_wherever_it_stands_among_the_arguments():
    model, (ids, mask) = tiny_model(), padded_batch()
    with attach(model, "snapkv") as session, torch.no_grad():
        model(ids, mask)
        assert [lane.padding for lane in session.cache.lanes] == [0, 11, 21]


# -- sessions that end ---------------------------------------------------------------------------------------------


class Stumble(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise ZeroDivisionError


class Failing(kvbench.KVCachePolicy):
    name, summary, takes_budget = "failing", "Fails in layer 1 at the third step.", False

    def insert(self, layer, keys, values):
        if layer.ordinal == 1 and layer.tokens == 64:
            raise ZeroDivisionError


def state(model):
    hooks = [(len(part._forward_pre_hooks), len(part._forward_hooks)) for part in model.modules()]
    return hooks, model.config.to_dict(), model.config._attn_implementation, sorted(model.__dict__)


@pytest.mark.parametrize("policy", ["full", "snapkv", "infinigen", "full_no_cache"])
def test_sessions_one_after_another_and_errors_leave_no_trace(policy):
    model, ids = tiny_model(), tokens(1, 61)
    before, plain = state(model), answer(model, ids)
    options = {} if policy.startswith("full") else options_of(policy)
    budget = None if policy.startswith("full") else BUDGET
    runs = []
    for _ in range(2):
        with kvbench.attach(model, policy=policy, budget=budget, options=options):
            runs.append(answer(model, ids, use_cache=policy != "full_no_cache"))
        with pytest.raises(ZeroDivisionError), kvbench.attach(model, policy=policy, budget=budget, options=options):
            answer(model, ids, stopping_criteria=[Stumble()], use_cache=policy != "full_no_cache")
        assert state(model) == before
        assert same(answer(model, ids), plain)
    assert same(*runs)


def test_a_cache_is_refused_after_an_error_halfway_through_the_layers_and_the_session_goes_on():
    model, ids = tiny_model(), tokens(1, 61)
    with kvbench.attach(model, policy=Failing()) as session:
        with pytest.raises(KVBenchError, match="failing"):
            answer(model, ids)
        with pytest.raises(KVBenchError, match="error"):
            model(tokens(1, 1), past_key_values=session.cache)
        again = answer(model, ids, steps=3)
    assert torch.equal(again.sequences, answer(model, ids, steps=3).sequences)


class OtherAttention(nn.Module):
    layer_idx = 0


def test_an_error_on_entering_the_block_leaves_the_model_as_it_was():
    model = tiny_model()
    model.model.other = OtherAttention()
    before = state(model)
    budget = kvbench.Budget(tokens=BUDGET, allocator="squeeze")
    with (
        pytest.raises(KVBenchError, match="2 attention modules"),
        kvbench.attach(model, policy="snapkv", budget=budget, options=options_of("snapkv")),
    ):
        pass
    assert state(model) == before
    with attach(model, "snapkv"):
        answer(model, tokens(1, 61))


def test_a_session_can_be_entered_again():
    model, ids = tiny_model(), tokens(1, 61)
    session = attach(model, "quest")
    assert isinstance(session, Session)
    with session:
        first = answer(model, ids)
    with session:
        assert same(first, answer(model, ids))


# -- streaming -----------------------------------------------------------------------------------------------------


class Words(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got += value.reshape(-1).tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("chunk", [None, 1, 20])
def test_tokens_stream_from_another_thread(chunk):
    model, ids, words = tiny_model(), tokens(1, 61), Words()
    with attach(model, "snapkv"):
        expected = answer(model, ids).sequences
        thread = threading.Thread(
            target=answer, args=(model, ids), kwargs={"streamer": words, "prefill_chunk_size": chunk}
        )
        thread.start()
        thread.join()
    assert words.got == expected[0].tolist()
    assert words.ended


def test_guidance_takes_turns_with_its_own_context():
    model, ids = tiny_model(), tokens(1, 61)
    plain = answer(model, ids, guidance_scale=1.5, negative_prompt_ids=tokens(1, 30, seed=7))
    with attach(model, "snapkv", 1.0):
        ours = answer(model, ids, guidance_scale=1.5, negative_prompt_ids=tokens(1, 30, seed=7))
    assert torch.equal(plain.sequences, ours.sequences)
