"""Tiny random models of every causal-LM class of the installed transformers, and what policies make of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import transformers
from tiny import small_options
from transformers import CONFIG_MAPPING, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

import kvbench
from kvbench.plugins import registry

VOCABULARY, WIDTH, HEADS, DIM = 97, 64, 4, 16


def _each(names: str, size: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


SIZES: dict[str, int] = {
    **_each("vocab_size vocab_size_per_layer_input unpadded_vocab_size", VOCABULARY),
    **_each("hidden_size n_embd d_model emb_dim dim_model embedding_size word_embed_proj_dim lru_width", WIDTH),
    **_each("attention_hidden_size input_embedding_size embedding_dim output_embedding_size ffn_dim n_inner", WIDTH),
    **_each("decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner intermediate_size moe_intermediate_size", WIDTH),
    **_each("shared_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size", WIDTH),
    **_each("ffn_hidden_size expert_ffn_hidden_size dense_intermediate_size feed_forward_size", WIDTH),
    **_each("moe_shared_expert_intermediate_size intermediate_size_mlp", WIDTH),
    **_each("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", HEADS),
    **_each("attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads", HEADS),
    **_each("num_key_value_heads swa_num_key_value_heads num_kv_heads num_query_groups", HEADS // 2),
    **_each("head_dim swa_head_dim dim_head kv_channels d_head attention_head_size v_head_dim index_head_dim", DIM),
    **_each("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers", 3),
    **_each("num_decoder_layers num_blocks", 3),
    **_each("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
    **_each("num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k index_n_heads", 2),
    **_each("n_group topk_group num_expert_group first_k_dense_replace", 1),
    **_each("sliding_window sliding_window_size attention_window_size window_size local_attention", 16),
    **_each("attention_chunk_size query_pre_attn_scalar hidden_size_per_layer_input", 16),
    **_each("max_position_embeddings n_positions n_ctx max_target_positions", 256),
    **_each("linear_key_head_dim linear_value_head_dim mamba_d_state mamba_n_heads state_size rotary_dim", 8),
    "q_lora_rank": 32, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "index_topk": 20,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_head_dim": 16, "linear_num_heads": 4,
    "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8, "time_step_rank": 4, "mamba_dt_rank": 4,
    "laurel_rank": 8, "max_source_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2,
}  # fmt: skip
"""Sizes by the names that configurations use: smaller of two is taken."""

DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2}
EXPERTS = {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 64, "n_shared_experts": 1}
SHARED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
HYBRID = {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "attention_hidden_size": 128,
          "attention_head_dim": 32}  # fmt: skip

CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "blenderbot": {"encoder_layers": 3, "decoder_layers": 3},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": EXPERTS, "dots1": EXPERTS,
    "dots3_note_text": {"per_layer_config": {2: {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 20}}},
    "falcon_h1": {"mamba_d_ssm": 128, **MAMBA},
    "gemma3n_text": {**SHARED, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [64] * 4},
    "gemma4_text": {**SHARED, "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}},
    "gemma4_unified_text": {**SHARED, "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 2, "num_hidden_layers": 12},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "musicgen_decoder": {"num_codebooks": 1}, "musicgen_melody_decoder": {"num_codebooks": 1},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
                       "indexer_compress_ratio": 4, "ngram_vocab_size_base": 100},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**HYBRID, "n_mamba_heads": 2},
    "zamba2": {**HYBRID, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 8,
               "hybrid_layer_ids": [1, 3]},
}  # fmt: skip
"""What shrinking by names alone leaves unusable, by model type."""


def tiny(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of the class that transformers has for the model type `kind`."""
    cls = getattr(transformers, CLASSES[kind])
    name = cls.config_class.model_type
    try:
        full = CONFIG_MAPPING[name]().to_dict()
    except Exception:
        full = {"model_type": name}
    config = cls.config_class(**{**_shrunk(full), **changes})
    torch.manual_seed(seed)
    return cls(config).eval()


def _shrunk(full: dict[str, Any]) -> dict[str, Any]:
    kind = full.get("model_type", "")
    small = {name: _smaller(name, value) for name, value in full.items()}
    depth = next((full[name] for name in DEPTHS if isinstance(full.get(name), int)), 0)
    if depth > 1:
        kept = _kept(full, depth)
        small |= {name: [full[name][place] for place in kept] for name in _per_layer(full, depth)}
        small |= {name: len(kept) for name in DEPTHS if name in full}
        if isinstance(full.get("per_layer_config"), dict):
            places = {int(place): own for place, own in full["per_layer_config"].items() if int(place) in kept}
            small["per_layer_config"] = {
                kept.index(place): {name: _smaller(name, value) for name, value in own.items()}
                for place, own in places.items()
            }
    if "num_key_value_heads" in full and full["num_key_value_heads"] == full.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "qk_rope_head_dim" in full:
        small |= {name: small["qk_rope_head_dim"] for name in ("head_dim",) if name in full}
        small |= {name: 20 for name in ("qk_head_dim",) if name in full}
    small |= {name: SIZES[name] for name in ("head_dim", "num_key_value_heads") if full.get(name, 0) is None}
    if "is_decoder" in full and not full.get("is_encoder_decoder"):
        small["is_decoder"] = True
    if "initializer_range" in full:
        small["initializer_range"] = 0.15  # attention that is peaked enough for its tokens to matter
    small |= CHANGES.get(kind, {})
    unset = ("model_type", "transformers_version", "dtype", "architectures", "_name_or_path")
    nested = {
        name: _shrunk(value) for name, value in small.items() if isinstance(value, dict) and "model_type" in value
    }
    return {name: value for name, value in {**small, **nested}.items() if name not in unset}


def _smaller(name: str, value: Any) -> Any:
    fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return min(value, SIZES[name]) if fits and name in SIZES else value


def _per_layer(full: dict[str, Any], depth: int) -> list[str]:
    return [name for name, value in full.items() if isinstance(value, list) and len(value) == depth]


def _kept(full: dict[str, Any], depth: int) -> list[int]:
    """Layers that stay: the first of each kind, and more up to three."""
    named = [full[name] for name in _per_layer(full, depth) if all(isinstance(value, str) for value in full[name])]
    kinds = list(zip(*named, strict=True)) or [()] * depth
    first = sorted({kinds.index(kind) for kind in kinds})
    return sorted([*first, *[place for place in range(depth) if place not in first][: max(0, 3 - len(first))]])


PROMPT, STEPS = 36, 8
SETTINGS = [(padded, chunks) for padded in (False, True) for chunks in (1, 2)]


def logits(model: Any, *, padded: bool, chunks: int) -> torch.Tensor:
    """Logits [9, 2, V] after the prompt and after each of 8 further tokens; one row of two is padded on its left."""
    ids = torch.randint(3, 90, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :5] = mask[0, :5] = 0
    takes = inspect.signature(model.forward).parameters
    borders = [0, *([] if chunks == 1 else [PROMPT // 2 + 3]), *range(PROMPT, PROMPT + STEPS + 1)]
    past: dict[str, Any] = {}
    if model.config.model_type == "recurrent_gemma":  # the only one that fills a cache and does not return it
        past = {"past_key_values": DynamicCache(config=model.config)}
    found = []
    with torch.no_grad():
        for start, stop in pairwise(borders):
            extra = (
                {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, start:stop]} if "position_ids" in takes else {}
            )
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], **past, **extra)
            if out.get("past_key_values") is not None:
                past = {"past_key_values": out.past_key_values}
            found.append(out.logits[:, -1].float())
    return torch.stack(found[-STEPS - 1 :])


def options(policy: str) -> dict[str, Any]:
    """Options of a policy that fit contexts of tens of tokens."""
    return small_options(registry().classes["policy"][policy])


@dataclass
class Row:
    """What came of one model class: `exact`, or refused or not tried and why; `wrong` and `error` are faults."""

    verdict: str
    governed: str = ""
    reason: str = ""


def tried(kind: str, policies: Iterable[str], settings: Iterable[tuple[bool, int]] = SETTINGS) -> Row:
    """Hold `full` and covering policies to plain transformers on a tiny model of a model type."""
    try:
        model = tiny(kind)
        plain = list(_plain(model, settings))
        if not plain:
            return Row("not tried", reason="a tiny model gives no finite logits step by step")
    except Exception as error:
        return Row("not tried", reason=f"a tiny model does not run: {_first_line(error)}")
    places = ""
    try:
        for setting, expected in plain:
            with kvbench.attach(model, policy="full", prompt_tokens=PROMPT) as session:
                got = logits(model, padded=setting[0], chunks=setting[1])
                places = f"{len(session.cache.governed)} of {len(session.cache.layers)}"
            if not torch.equal(got, expected):
                return Row("wrong", places, f"full is {_error(got, expected):.1g} off {setting}")
    except kvbench.KVBenchError as error:
        return Row("refused", reason=str(error))
    except Exception as error:
        return Row("error", places, f"full: {error!r}")
    for policy in policies:
        try:
            for setting, expected in plain:
                with kvbench.attach(model, policy=policy, options=options(policy), budget=1.0, prompt_tokens=PROMPT):
                    got = logits(model, padded=setting[0], chunks=setting[1])
                if not (error := _error(got, expected)) < 2e-4:
                    return Row("wrong", places, f"{policy} is {error:.1g} off {setting}")
        except kvbench.KVBenchError as error:
            return Row("exact, full only", reason=str(error).split(", so policy")[0])
        except Exception as error:
            return Row("error", places, f"{policy}: {error!r}")
    with kvbench.attach(model, policy="streaming_llm", budget=10, prompt_tokens=PROMPT):
        got = logits(model, padded=False, chunks=1)
    if _error(got, logits(model, padded=False, chunks=1)) < 1e-3:
        return Row("wrong", places, "a budget of 10 tokens changes nothing")
    return Row("exact", places)


def _plain(model: Any, settings: Iterable[tuple[bool, int]]) -> Iterator[tuple[tuple[bool, int], torch.Tensor]]:
    """The settings that plain transformers can run, and its logits."""
    errors = []
    for padded, chunks in settings:
        try:
            found = logits(model, padded=padded, chunks=chunks)
        except Exception as error:
            errors.append(error)
            continue
        if torch.isfinite(found).all():
            yield (padded, chunks), found
    if len(errors) == len(list(settings)):
        raise errors[0]


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.std())


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
