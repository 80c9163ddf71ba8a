"""Tiny random models of several architectures, made in the test."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvbench.engine.saving.identify import weights_fingerprint
from kvbench.plugins import registry
from kvbench.strategies.evicting.kvzap import Surrogate

COMMON: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False, "initializer_range": 0.4,
}  # fmt: skip

ARCHITECTURES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 24}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
         "query_pre_attn_scalar": 8},
    ),
}  # fmt: skip


DATA_DEPENDENT = {
    "infinigen", "magicpig", "oracle_topp", "retroinfer", "squeezed_attention", "twilight", "vattention",
}  # fmt: skip
"""Policies whose number of tokens depends on the data, with the budget as its upper bound."""


@functools.cache
def shared_model(architecture: str = "llama") -> Any:
    """The tiny model of an architecture, for tests that leave it as it is."""
    return tiny_model(architecture)


def tiny_model(architecture: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model whose attention is peaked enough for tokens to differ when attention does."""
    config_class, model_class, extra = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**COMMON, **extra, **changes})).eval()
    model.generation_config.eos_token_id = None
    return model


SMALL_OPTIONS = {
    "sinks": 2, "window": 8, "page_size": 4, "subspaces": 2, "init": 2, "local": 8, "recent": 8, "block_size": 4,
    "chunk_size": 4, "instruction": "", "continuation": "",
}  # fmt: skip
"""For the options of these names, values that leave a policy a choice in contexts of tens of tokens."""


def small_options(policy: type[Any]) -> dict[str, Any]:
    """Options that fit a policy to contexts of tens of tokens."""
    fields = policy.Options.model_fields
    # Some policies call a share of the budget what others count in tokens.
    return {
        name: value for name, value in SMALL_OPTIONS.items() if name in fields and fields[name].annotation is not float
    }


FITTED = {"kvzap"}
"""Policies that need a file fitted on the model: a test file of their own holds them to what holds for all."""


def every_policy() -> dict[str, type[Any]]:
    """The registered policies by name that can be made for any model."""
    return {name: policy for name, policy in sorted(registry().classes["policy"].items()) if name not in FITTED}


def fitted_options(name: str, model: Any) -> dict[str, Any]:
    """What a policy of `FITTED` needs for a model, at random; nothing for others."""
    if name not in FITTED:
        return {}
    config, random = model.config, torch.Generator().manual_seed(3)
    layers = {
        number: {
            "weight": torch.randn(config.num_key_value_heads, config.hidden_size, generator=random),
            "bias": torch.zeros(config.num_key_value_heads),
        }
        for number in range(config.num_hidden_layers)
    }
    file = Path(tempfile.mkdtemp()) / "surrogate.safetensors"
    Surrogate("linear", layers, weights_fingerprint(model), type(model).__name__).save(file)
    return {"surrogate": str(file)}


def budgeted_policies() -> list[str]:
    """Every registered policy that takes a budget, so that none is forgotten in the tests that hold for all."""
    return sorted(name for name, policy in every_policy().items() if policy.takes_budget)


def matrix_policies() -> list[str]:
    """The policies of the tests that hold for all of them, with one index policy of each kind.

    All index policies are one class with another index, and every index has tests of its own: an exact one, one of
    clusters and one of a graph that the prompt's queries train go through every way that the class has.
    """
    return of_each_kind(budgeted_policies())


def of_each_kind(policies: Iterable[str]) -> list[str]:
    """Policies without the index policies that are of a kind with another."""
    classes = registry().classes["policy"]
    return [name for name in policies if not hasattr(classes[name], "index") or name in INDEX_KINDS]


INDEX_KINDS = ("flat", "ivf", "retrieval")


ALIKE = {
    **dict.fromkeys(("chunkkv", "compactor", "criticalkv", "lagkv", "r_kv"), "snapkv"),
    **dict.fromkeys(("fp8", "turboquant"), "int8"),
}  # fmt: skip
"""Policies that hold and save what another one does, and differ in scores or codes alone, which tests of their own
compare with formulas: tests of what is held from step to step, and saved, take that one for them."""


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length] without the special ones."""
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
