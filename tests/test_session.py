"""The session carries a policy through real transformers models without changing what they compute."""

import functools
from itertools import pairwise

import pytest
import torch
from tiny import ARCHITECTURES, matrix_policies, shared_model, small_options, tiny_model, tokens

import kvbench
from kvbench.contract.attention import softmax_parts
from kvbench.contract.errors import KVBenchError
from kvbench.plugins import registry

pytestmark = pytest.mark.transformers


def padded_batch(lengths=(40, 61, 50), seed=1):
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = tokens(1, length, seed + row)[0]
        mask[row, width - length :] = 1
    return ids, mask


def generate(model, ids, mask=None, steps=20, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, **kwargs)[:, ids.shape[1] :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_gives_the_tokens_and_logits_of_plain_transformers(architecture):
    model = tiny_model(architecture)
    for ids, mask in [(tokens(1, 60), None), padded_batch()]:
        kwargs = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 20, "do_sample": False}
        kwargs["attention_mask"] = torch.ones_like(ids) if mask is None else mask
        plain = model.generate(ids, **kwargs)
        with kvbench.attach(model, policy="full"):
            ours = model.generate(ids, **kwargs)
        assert torch.equal(plain.sequences, ours.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.scores, ours.scores, strict=True))


def options_of(policy):
    return small_options(registry().find("policy", policy))


@functools.cache
def plain_tokens(architecture):
    """What plain transformers generates after a prompt and after a padded batch, computed once for all policies."""
    model = shared_model(architecture)
    return [generate(model, ids, mask, steps=20) for ids, mask in [(tokens(1, 60), None), padded_batch()]]


@pytest.mark.parametrize(
    ("architecture", "policy"),
    [("llama", policy) for policy in matrix_policies()]
    + [
        (architecture, policy)
        for architecture in ARCHITECTURES
        for policy in ("quest", "retrieval", "streaming_llm", "snapkv")
        if architecture not in ("llama", "mistral")
    ],
)
def test_a_budget_that_covers_everything_gives_the_tokens_of_plain_transformers(architecture, policy):
    model = shared_model(architecture)
    for (ids, mask), plain in zip([(tokens(1, 60), None), padded_batch()], plain_tokens(architecture), strict=True):
        with kvbench.attach(model, policy=policy, budget=1.0, options=options_of(policy)):
            ours = generate(model, ids, mask, steps=20)
        assert torch.equal(plain, ours)


def test_a_model_of_sliding_windows_only_is_refused_by_name():
    model = tiny_model("mistral")
    with pytest.raises(KVBenchError, match=r"MistralForCausalLM has no full-attention .*sliding_attention"):
        kvbench.attach(model, policy="quest", budget=0.5)


@pytest.mark.parametrize("policy", matrix_policies())
def test_a_padded_batch_gives_the_tokens_of_its_rows_alone(policy):
    model = shared_model()
    ids, mask = padded_batch()
    with kvbench.attach(model, policy=policy, budget=24, options=options_of(policy)):
        together = generate(model, ids, mask, steps=16)
        alone = [generate(model, ids[row : row + 1, mask[row] == 1], steps=16) for row in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("policy", ["full", *matrix_policies()])
def test_a_prompt_in_chunks_gives_the_tokens_of_a_prompt_in_one_call(policy):
    model, ids = shared_model(), tokens(2, 70)
    budget = None if policy == "full" else 24
    with kvbench.attach(model, policy=policy, budget=budget, options=options_of(policy)):
        whole = generate(model, ids)
    with kvbench.attach(model, policy=policy, budget=budget, options=options_of(policy), prompt_tokens=70):
        chunked = generate(model, ids, prefill_chunk_size=17)
    assert torch.equal(whole, chunked)


def test_tokens_after_the_prompt_go_through_the_policy_one_by_one():
    model, ids = tiny_model(), tokens(1, 70)
    logits = []
    for block in (1, 10):
        with kvbench.attach(model, policy="quest", budget=24, prompt_tokens=60), torch.no_grad():
            out = model(ids[:, :60])
            for start in range(60, 70, block):
                out = model(ids[:, start : start + block], past_key_values=out.past_key_values)
            logits.append(out.logits[:, -1])
    torch.testing.assert_close(*logits)


def test_leaving_the_block_restores_the_model():
    model = tiny_model()
    before = dict(model.__dict__), model.config.to_dict(), model.config._attn_implementation
    with (
        pytest.raises(ZeroDivisionError),
        kvbench.attach(model, policy="snapkv", budget=0.5, options=options_of("snapkv")),
    ):
        generate(model, tokens(1, 60))
        raise ZeroDivisionError
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert (dict(model.__dict__).keys(), model.config.to_dict(), model.config._attn_implementation) == (
        before[0].keys(), *before[1:],
    )  # fmt: skip
    assert "forward" not in model.__dict__


def test_eviction_frees_memory_per_head():
    model, ids = tiny_model(), tokens(1, 2000)
    kept = {}
    for policy, budget in [("full", None), ("snapkv", 100), ("streaming_llm", 100)]:
        with kvbench.attach(model, policy=policy, budget=budget) as session, torch.no_grad():
            model(ids)
            assert session.cache is not None
            kept[policy] = session.cache.bytes()["resident"]
    per_token = 2 * 2 * 8 * 4 * 3  # keys and values, 2 heads, 8 channels, float32, 3 layers
    assert kept["full"] == 2000 * per_token
    assert kept["snapkv"] == kept["streaming_llm"] == 100 * per_token


def test_ragged_eviction_keeps_other_numbers_per_head_and_attends_to_just_those():
    class Ragged(kvbench.KVCachePolicy):
        name = "ragged"
        summary = "Keeps every third token in the first head, every tenth in the second."

        def prefill(self, layer, queries, keys, values):
            kept = torch.zeros(keys.shape[:3], dtype=torch.bool)
            kept[:, 0, ::3] = True
            kept[:, 1, ::10] = True
            layer.store.keep(kept)
            layer.state["kept"], layer.state["keys"], layer.state["values"] = kept, keys.clone(), values.clone()

        def insert(self, layer, keys, values):
            layer.state["keys"] = torch.cat([layer.state["keys"], keys], dim=2)
            layer.state["values"] = torch.cat([layer.state["values"], values], dim=2)
            more = torch.ones(*layer.state["kept"].shape[:2], keys.shape[2], dtype=torch.bool)
            layer.state["kept"] = torch.cat([layer.state["kept"], more], dim=2)

        def attend(self, layer, queries, selection):
            from kvbench.contract.attend import attend

            ours = attend(layer, queries, selection)
            mask = layer.state["kept"].repeat_interleave(3, dim=1)[:, :, None]
            expected = torch.nn.functional.scaled_dot_product_attention(
                queries,
                layer.state["keys"],
                layer.state["values"],
                attn_mask=mask,
                enable_gqa=True,
                scale=layer.scaling,
            )
            torch.testing.assert_close(ours.output, expected)
            return ours

    model = tiny_model()
    with kvbench.attach(model, policy=Ragged(), budget=0.5) as session:
        generate(model, tokens(2, 300), steps=5)
    store = session.cache.stores()[0]
    assert store.resident_bytes < 0.3 * 2 * 300 * 2 * 8 * 4 * 2 * 2


def test_merged_parts_equal_one_softmax():
    torch.manual_seed(0)
    logits, values = torch.randn(2, 6, 50, dtype=torch.float64) * 30, torch.randn(2, 2, 50, 8, dtype=torch.float64)
    expected = torch.einsum("bht,bhtd->bhd", logits.softmax(-1), values.repeat_interleave(3, dim=1))
    cuts = [0, 1, 1, 20, 50]
    parts = [(logits[..., a:b].float(), values[:, :, a:b].float()) for a, b in pairwise(cuts)]
    merged = softmax_parts(parts, with_weights=True)
    torch.testing.assert_close(merged.output[:, :, 0].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.lse[..., 0].double(), logits.logsumexp(-1), atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(merged.weights.double(), logits.softmax(-1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "qest", "budget": 10}, "Unknown policy 'qest': did you mean quest"),
        ({"policy": "quest"}, "needs a budget"),
        ({"policy": "quest", "budget": 10, "options": {"page_size": "big"}}, "page_size='big'"),
        ({"policy": "quest", "budget": 10, "options": {"pages": 3}}, "its options are: page_size"),
        ({"policy": "quest", "budget": 1.5}, "between 0 and 1"),
        ({"policy": "quest", "budget": 0}, "positive"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(KVBenchError, match=message):
        kvbench.attach(tiny_model(), **arguments)


@pytest.mark.parametrize(
    ("budget", "message"), [(100, "larger than the context of 60"), (5, "smaller than the policy's static")]
)
def test_a_budget_that_does_not_fit_is_refused(budget, message):
    model = tiny_model()
    with kvbench.attach(model, policy="quest", budget=budget), pytest.raises(KVBenchError, match=message):
        generate(model, tokens(1, 60))


def test_a_policy_that_raises_is_named_with_hook_and_layer():
    class Broken(kvbench.KVCachePolicy):
        name = "broken"
        summary = "Raises."

        def select(self, layer, queries, budget):
            return 1 / 0

    model = tiny_model()
    with (
        kvbench.attach(model, policy=Broken(), budget=0.5),
        pytest.raises(
            KVBenchError, match=r"Policy 'broken' \(test_session\) failed in select at layer 0: ZeroDivisionError"
        ),
    ):
        generate(model, tokens(1, 60))


def test_right_padding_nan_keys_beams_and_foreign_caches_are_refused():
    model, (ids, mask) = tiny_model(), padded_batch()
    with kvbench.attach(model, policy="quest", budget=0.5):
        with pytest.raises(KVBenchError, match="padding_side"):
            model(ids.flip(1), attention_mask=mask.flip(1))
        with pytest.raises(KVBenchError, match="beam"):
            generate(model, tokens(1, 60), num_beams=2)
        with pytest.raises(KVBenchError, match="use_cache=True"):
            model(ids, use_cache=False)
    filled = model(tokens(1, 60)).past_key_values
    with kvbench.attach(model, policy="quest", budget=0.5), pytest.raises(KVBenchError, match="without the policy"):
        model(tokens(1, 1), past_key_values=filled)
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with kvbench.attach(model, policy="quest", budget=0.5), pytest.raises(KVBenchError, match=r"Layer 1 .* NaN"):
        model(tokens(1, 60))


def test_two_policies_cannot_be_attached_at_once():
    model = tiny_model()
    with kvbench.attach(model), pytest.raises(KVBenchError, match="attached already"), kvbench.attach(model):
        pass
