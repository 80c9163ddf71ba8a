"""What architectures do otherwise than Llama, each on a tiny random model against plain transformers."""

from __future__ import annotations

import copy
import functools
import json
import sys
from typing import Any

import pytest
import torch
from tiny import tiny_model, tokens
from transformers import BartConfig, BartForConditionalGeneration
from zoo import PROMPT, SETTINGS, logits, options, tiny, tried

import kvbench
from kvbench.engine.generation import generate
from kvbench.engine.survey import survey
from kvbench.models import load_model
from kvbench.runs.planning import load_to_plan

POLICIES = ["streaming_llm", "snapkv", "quest", "flat"]

SAMPLE = {
    "deepseek_v2": "3 of 3", "deepseek_v3": "3 of 3", "falcon_h1": "3 of 3", "gemma2": "1 of 3",
    "gemma3n_text": "1 of 4", "gemma4_text": "1 of 4", "glm4_moe_lite": "3 of 3", "gpt_oss": "1 of 3",
    "hrm_text": "12 of 12", "jetmoe": "3 of 3",
}  # fmt: skip
"""Ten of the model types of `tox -e models`, and their governed layers."""


@pytest.mark.parametrize("kind", SAMPLE)
def test_full_is_exact_and_covering_policies_are_within_rounding(kind):
    row = tried(kind, POLICIES, [(True, 2)])
    assert (row.verdict, row.governed) == ("exact", SAMPLE[kind]), row.reason


def test_a_graph_over_the_keys_of_latents_is_exact_when_it_covers():
    assert tried("deepseek_v3", ["retrieval"], [(True, 2)]).verdict == "exact"


@pytest.mark.parametrize("kind", ["deepseek_v3", "gemma3n_text"])
@pytest.mark.parametrize(("padded", "chunks"), SETTINGS)
def test_padded_and_unpadded_prompts_are_exact_in_one_chunk_and_in_two(kind, padded, chunks):
    assert tried(kind, ["snapkv"], [(padded, chunks)]).verdict == "exact"


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa", "hy_v4"])
def test_a_model_that_looks_at_the_name_of_its_attention_is_exact(kind):
    model = tiny(kind)
    assert tried(kind, ["snapkv"], [(True, 2)]).verdict == "exact, full only"
    with pytest.raises(kvbench.KVBenchError, match=r"no full-attention layer .*indexed_attention"):
        kvbench.attach(model, policy="snapkv", budget=0.5)


def test_the_name_of_the_attention_is_the_models_own_before_and_after():
    model = tiny_model()
    with kvbench.attach(model):
        inside = model.config._attn_implementation
        assert inside == "sdpa"
        assert inside in ("eager", "sdpa")
        assert copy.deepcopy(model.config)._attn_implementation == "sdpa"
    assert type(model.config._attn_implementation) is str


# Latent attention


def latents(model: Any, policy: Any, **given: Any) -> dict[str, int]:
    given["options"] = options(policy) if isinstance(policy, str) else None
    with kvbench.attach(model, policy=policy, **given) as session:
        logits(model, padded=False, chunks=1)
    return session.cache.bytes()


def test_the_bytes_of_latent_attention_are_its_latents():
    model = tiny("deepseek_v3")  # 24 numbers of latent and 8 of rotated key, in 3 layers of 2 rows
    assert survey(model).token_bytes == 3 * (24 + 8) * 4
    held = latents(model, "streaming_llm", budget=20)
    assert held["resident"] <= 3 * 2 * (24 + 8) * 4 * (20 + 70)  # the budget, and spare room to grow
    offloaded = latents(model, "flat", budget=20)["offloaded"]
    assert 3 * 2 * (24 + 8) * 4 * 20 < offloaded <= 3 * 2 * (24 + 8) * 4 * (44 + 70)


def test_hooks_see_the_keys_and_values_of_latent_attention():
    shapes = []

    class Looks(kvbench.KVCachePolicy):
        name, summary, takes_budget = "looks", "Notes shapes.", False

        def prefill(self, layer, queries, keys, values):
            shapes.append((layer.heads, layer.kv_heads, layer.head_dim, keys.shape[1:], values.shape[1:]))

        def insert(self, layer, keys, values):
            shapes.append((keys.shape[1:], values.shape[1:]))
            held, _, _ = layer.store.static_parts()[0]
            torch.testing.assert_close(held[:, :, -1:], keys)

    latents(tiny("deepseek_v3"), Looks())
    assert shapes[0] == (4, 4, 20, (4, 36, 20), (4, 36, 16))
    assert shapes[-1] == ((4, 1, 20), (4, 1, 16))


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "tova", "knorm"])
def test_heads_that_keep_different_tokens_share_the_memory_of_latents(policy):
    """Against the same policy on a store of keys and values, which the model's own expansion fills."""
    model = tiny("deepseek_v3")
    found = {}
    for name in ("latents", "expanded"):
        layers = survey(model).layers
        given = {"policy": policy, "options": options(policy), "budget": 14}
        with kvbench.attach(model, **given) as session, pytest.MonkeyPatch.context() as patch:
            if name == "expanded":
                patch.setattr("kvbench.engine.cached_layer.LatentStore", _expanded_store(layers))
            found[name] = logits(model, padded=False, chunks=1)
        found[name, "bytes"] = session.cache.bytes()["resident"]
    torch.testing.assert_close(found["latents"], found["expanded"], rtol=1e-4, atol=1e-4)
    assert found["latents", "bytes"] < found["expanded", "bytes"]


def _expanded_store(layers: dict[int, Any]) -> Any:
    from kvbench.contract.storage import KVStore

    class Expanded(KVStore):
        def __init__(self, keys, values, expand, heads):
            self._expand = expand
            super().__init__(*expand(keys, values))

        def append(self, keys, values):
            super().append(*self._expand(keys, values))

    return Expanded


@pytest.mark.parametrize(("kind", "padded"), [("deepseek_v3", False), ("jetmoe", True)])
def test_hidden_states_are_projected_to_the_queries_of_their_own_step(kind, padded):
    """Where a policy asks after the cache's tokens were expanded by calls of the same attention module."""
    seen = []

    class Projects(kvbench.KVCachePolicy):
        name, summary, takes_budget, uses_hidden = "projects", "Projects its own hidden states.", False, True

        def select(self, layer, queries, budget):
            layer.store.static_parts()  # expands
            seen.append(torch.equal(layer.project(layer.hidden), queries))
            return kvbench.Selection()

    with kvbench.attach(tiny(kind), policy=Projects()) as session:
        logits(session.model, padded=padded, chunks=1)
    assert seen and all(seen)


@pytest.mark.parametrize("policy", ["compactor", "expected_attention", "infllm", "shadowkv", "triattention"])
def test_policies_that_need_keys_before_rotation_say_so_for_latents_before_the_model_runs(policy):
    session = kvbench.attach(tiny("deepseek_v3"), policy=policy, budget=0.5)
    with pytest.raises(kvbench.KVBenchError, match="no rotary embedding that can be undone"):
        session.__enter__()


# Layers that share keys, layers that run several times


def test_layers_that_share_keys_see_what_is_left_of_them():
    """A policy that keeps the last tokens of the sharing layers' source, against a mask that hides the others."""
    model = tiny("gemma3n_text")
    seen = {}

    class Looks(kvbench.KVCachePolicy):
        name, summary, takes_budget = "looks", "Notes what each attention attends to.", False

        def select(self, layer, queries, budget):
            seen.setdefault(layer.number, []).append((layer.tokens, layer.module.layer_idx))
            return kvbench.Selection()

    latents(model, Looks())
    assert list(seen) == [1, 3]
    assert seen[3] == [(tokens, 3) for tokens in range(PROMPT + 1, PROMPT + 9)]


def test_tokens_after_the_prompt_come_one_by_one_where_layers_share_keys():
    model, ids = tiny("gemma3n_text"), tokens(1, 40)
    with kvbench.attach(model, policy="streaming_llm", budget=12, prompt_tokens=30), torch.no_grad():
        past = model(ids[:, :30], use_cache=True).past_key_values
        with pytest.raises(
            kvbench.KVBenchError, match="share their keys and values, so the tokens after the prompt must"
        ):
            model(ids[:, 30:], past_key_values=past, use_cache=True)
    with kvbench.attach(model, policy="streaming_llm", budget=12) as session:
        assert len(generate(session, ids[0].tolist(), prompt_tokens=30, max_new_tokens=4).tokens) == 4


@pytest.mark.parametrize("policy", ["infinigen", "h2o", "kvzip"])
@pytest.mark.parametrize("kind", ["gemma3n_text", "hrm_text"])
def test_policies_with_hidden_states_scores_or_replays_cover_layers_that_share_or_repeat(kind, policy):
    row = tried(kind, [policy], [(False, 1)])
    assert row.verdict == "exact", row.reason


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_a_rotation_of_one_tensor_can_be_undone(kind, monkeypatch):
    model, before, found = tiny(kind), [], {}
    source = sys.modules[type(model.model.layers[0].self_attn).__module__]
    right = source.apply_rotary_pos_emb

    @functools.wraps(right)
    def noted(x, *args, **kwargs):
        before.append(x)
        return right(x, *args, **kwargs)

    class Unrotates(kvbench.KVCachePolicy):
        name, summary, takes_budget = "unrotates", "Looks at keys before their rotation.", False

        def prefill(self, layer, queries, keys, values):
            found[layer.number] = layer.unrotate(keys, torch.arange(layer.tokens))

    monkeypatch.setattr(source, "apply_rotary_pos_emb", noted)
    with kvbench.attach(model, policy=Unrotates()), torch.no_grad():
        model(tokens(1, 30), use_cache=True)
    monkeypatch.setattr(source, "apply_rotary_pos_emb", right)
    assert found
    for keys in found.values():
        same = [x for x in before if x.shape == keys.transpose(1, 2).shape]
        assert min(float((x - keys.transpose(1, 2)).abs().max()) for x in same) < 1e-5
    for policy in ("expected_attention", "infllm", "shadowkv"):
        assert tried(kind, [policy], [(True, 1)]).verdict == "exact"


# Scores


def test_a_cap_before_the_softmax_is_honoured():
    model = tiny("gemma2", attn_logit_softcapping=0.1)
    expected = logits(model, padded=False, chunks=1)
    with kvbench.attach(model, policy="snapkv", budget=1.0):
        torch.testing.assert_close(logits(model, padded=False, chunks=1), expected, rtol=1e-4, atol=1e-4)
    with kvbench.attach(model, policy="snapkv", budget=1.0), pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvbench.contract.layer.Layer.capped", lambda layer, scores: scores)
        assert (logits(model, padded=False, chunks=1) - expected).abs().max() > 1e-3


def test_sinks_without_a_value_take_their_share_of_the_softmax():
    from kvbench.contract.attention import softmax_parts

    random = torch.Generator().manual_seed(0)
    scores, values = torch.randn(2, 3, 5, generator=random), torch.randn(2, 3, 5, 4, generator=random)
    sinks = torch.tensor([0.5, -40.0, 60.0])
    parts = [(scores[..., :2], values[:, :, :2]), (scores[..., 2:], values[:, :, 2:])]
    found = softmax_parts(parts, sink_logits=sinks, with_weights=True)
    every = torch.cat([scores, sinks[None, :, None].expand(2, -1, 1)], dim=-1).double()
    weights = every.softmax(-1)[..., :5]
    torch.testing.assert_close(found.weights, weights.float())
    torch.testing.assert_close(
        found.output[:, :, 0].double(), (weights[..., None] * values).sum(2), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(found.lse[..., 0].double(), every.logsumexp(-1), rtol=1e-5, atol=1e-5)


# Windows


def test_a_window_that_holds_the_longest_context_is_governed_and_a_longer_context_refused():
    model = tiny_model("phi3", sliding_window=64, max_position_embeddings=64)
    with kvbench.attach(model, policy="streaming_llm", budget=10) as session, torch.no_grad():
        past = model(tokens(1, 60), use_cache=True).past_key_values
        assert len(session.cache.governed) == 3
        for _ in range(4):
            past = model(tokens(1, 1), past_key_values=past, use_cache=True).past_key_values
        with pytest.raises(kvbench.KVBenchError, match="has a window of 64 tokens and the context has 65"):
            model(tokens(1, 1), past_key_values=past, use_cache=True)


# Refusals, before anything is computed


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("diffllama", "calls its attention function more than once with the keys of layer 0"),
        ("doge", "changes the scores of its attention by its mask"),
        ("git", "does not pass its attention through transformers' attention interface in every layer"),
        ("inkling_text", "changes its softmax by 'position_bias'"),
        ("mamba", "no full-attention layer to govern .its layers are .*linear_attention"),
        ("minimax", "does not run with a cache that is given to it: ValueError: MiniMax uses cache of its own"),
        ("bloom", "does not go through transformers' attention interface"),
    ],
)
def test_a_model_that_cannot_be_governed_is_refused_in_one_sentence(kind, said):
    model = tiny(kind)
    with pytest.raises(kvbench.KVBenchError, match=said) as refused:
        kvbench.attach(model, policy="snapkv", budget=0.5)
    assert str(refused.value).count("\n") == 0


def test_an_encoder_decoder_model_is_refused_by_name():
    model = BartForConditionalGeneration(BartConfig(
        vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    ))  # fmt: skip
    with pytest.raises(kvbench.KVBenchError, match="BartForConditionalGeneration is an encoder-decoder model"):
        kvbench.attach(model)


def test_a_model_is_surveyed_once_and_left_as_it_was():
    model = tiny_model()
    assert survey(model) is survey(model)
    assert not model._forward_pre_hooks
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert survey(model.bfloat16()).token_bytes == 3 * 2 * 2 * 8 * 2


# What users do with a model


def test_guidance_keeps_a_cache_of_its_own():
    model, ids = tiny_model(), tokens(1, 40)
    given = {"max_new_tokens": 8, "do_sample": False, "guidance_scale": 1.7}
    expected = model.generate(ids, **given)
    for policy, budget in (("full", None), ("snapkv", 1.0)):
        with kvbench.attach(model, policy=policy, budget=budget):
            assert torch.equal(model.generate(ids, **given), expected)
    with (
        kvbench.attach(model, policy="snapkv", budget=20, options={"window": 8}),
        pytest.raises(
            kvbench.KVBenchError, match=r"larger than the context of 1 tokens.*guidance_scale.*negative_prompt_ids"
        ),
    ):
        model.generate(ids, **given)


@pytest.mark.parametrize("policy", ["full", "streaming_llm"])
def test_a_compiled_model_gives_the_same_tokens(policy):
    model, ids = tiny_model(), tokens(1, 40)
    given = {"max_new_tokens": 6, "do_sample": False}
    with kvbench.attach(model, policy=policy, budget=16):
        expected = model.generate(ids, **given)
    with kvbench.attach(model, policy=policy, budget=16):
        model.forward = torch.compile(model.forward, backend="eager")
        assert torch.equal(model.generate(ids, **given), expected)
    compiled = torch.compile(tiny_model(), backend="eager")
    with kvbench.attach(compiled, policy=policy, budget=16):
        assert torch.equal(compiled.generate(ids, **given), expected)


@pytest.mark.parametrize("policy", ["full", "snapkv"])
def test_an_answer_that_switches_to_long_rope_equals_generate(policy):
    """Phi3 computes its whole context anew where the answer crosses the length it was first trained for."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = tiny_model(
        "phi3", max_position_embeddings=256, original_max_position_embeddings=48,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 48, **factors,
        },
    )  # fmt: skip
    ids = tokens(1, 42)
    with kvbench.attach(model, policy=policy, budget=1.0):
        expected = model.generate(ids, max_new_tokens=14, do_sample=False)[0, 42:].tolist()
    assert expected == model.generate(ids, max_new_tokens=14, do_sample=False)[0, 42:].tolist()
    with kvbench.attach(model, policy=policy, budget=1.0) as session:
        assert generate(session, ids[0].tolist(), max_new_tokens=14).tokens == expected


def test_covering_policies_in_bfloat16_differ_by_less_than_two_of_torchs_own_attentions():
    model = tiny_model().bfloat16()
    plain = logits(model, padded=False, chunks=1)
    model.set_attn_implementation("eager")
    rounding = (logits(model, padded=False, chunks=1) - plain).abs().mean()
    model.set_attn_implementation("sdpa")
    for policy in ("infinigen", "quest", "snapkv"):
        with kvbench.attach(model, policy=policy, budget=1.0):
            assert (logits(model, padded=False, chunks=1) - plain).abs().mean() < rounding


# The command


CHECKED = [
    "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "gemma3n_text", "jetmoe", "gemma2", "gpt_oss", "falcon_h1", "phi3",
]  # fmt: skip


@pytest.mark.parametrize("kind", [*CHECKED, "deepseek_v32", "mamba", "minimax", "bart"])
def test_the_check_of_a_saved_model_says_exact_or_why_not(kind, kvbench, tokenizer, tmp_path):
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": None}
    sizes |= {"vocab_size_per_layer_input": len(tokenizer)} if kind == "gemma3n_text" else {}
    if kind == "phi3":
        model = tiny_model(kind, sliding_window=256, max_position_embeddings=256, **sizes)
    elif kind == "bart":
        model = BartForConditionalGeneration(BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, **sizes))
    else:
        model = tiny(kind, **sizes)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policies = "snapkv,infinigen" if kind in CHECKED else "full,snapkv"
    code, out, err = kvbench("check", "--json", "--model", tmp_path, "--policy", policies)
    reports = json.loads(out)["reports"] if out else []
    found = {check["name"]: check["status"] for report in reports for check in report["checks"]}
    if kind in CHECKED:
        assert (code, err) == (0, "")
        light = load_to_plan(str(tmp_path))  # experts that look at numbers are no reason to refuse a model in a plan
        assert survey(light.model).layers.keys() == survey(load_model(str(tmp_path)).model).layers.keys()
        assert set(found.values()) == {"passed"} and "covering selection and eviction, prompt in two chunks" in found
        return
    assert code == 2 and err.startswith("Error: ") and err.count("\n") == 1
    assert {
        "deepseek_v32": "has no full-attention layer to govern (its layers are indexed_attention), so policy 'snapkv'",
        "mamba": "keeps its state elsewhere than in a key-value cache",
        "minimax": "does not run with a cache that is given to it",
        "bart": "is an encoder-decoder model",
    }[kind] in err


# Rounding


def test_a_covering_infinigen_in_bfloat16_rounds_as_any_policy_that_attends_to_the_same_tokens():
    model = tiny_model().bfloat16()
    found = {}
    for policy in ("full", "oracle_topk", "infinigen"):
        with kvbench.attach(model, policy=policy, budget=1.0 if policy != "full" else None):
            found[policy] = logits(model, padded=False, chunks=1)
    assert torch.equal(found["infinigen"], found["oracle_topk"])
    exact = logits(tiny_model(), padded=False, chunks=1)
    rounding = float((found["full"] - exact).norm())
    assert float((found["infinigen"] - found["full"]).norm()) < rounding
