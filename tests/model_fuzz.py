"""Mutations of the files of a tiny model, and what a command makes of them: one sentence, or a result."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf

EVIL = "open({!r}, 'w').write('ran')\n"
"""Code beside the model, to which mutated files point."""
NAMES = [
    "auto_map", "model_type", "architectures", "quantization_config", "rope_parameters", "dtype",
    "tie_word_embeddings", "head_dim", "hidden_act", "num_key_value_heads", "layer_types", "attn_implementation",
    "_attn_implementation", "sliding_window", "text_config", "vocab_size", "is_encoder_decoder", "tokenizer_class",
    "added_tokens_decoder", "chat_template", "extra_special_tokens", "model_max_length", "use_cache",
    "bos_token_id", "eos_token_id", "max_position_embeddings", "num_hidden_layers", "pad_token_id",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 7, 0.5, 1e308, -1e-9, 2**31, 2**63, 10**30, "", "x", "a" * 5000, [], {}, [1, 2],
    {"a": 1}, [None], "llama", "bert", "t5", "mamba", "float16", "torch.float64", "\ud800", "\u001b[31m\n",
    "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}", {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 0},
    ["sliding_attention"] * 3,
    {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil",
     "AutoTokenizer": ["modeling_evil.Evil", None]},
    {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq", "bits": 4},
]  # fmt: skip


def mutate(file: Path, lots: random.Random) -> None:
    """Damage a model's file."""
    content = file.read_bytes() if file.exists() else b"{}"
    if file.suffix == ".safetensors":
        content = _tensors(content, lots)
    elif file.suffix == ".gguf":
        content = _bytes(content[:20_000], lots) + content[20_000:] if lots.random() < 0.8 else _bytes(content, lots)
    elif file.suffix == ".json" and lots.random() < 0.8:
        content = _json(content, lots)
    else:
        content = _bytes(content, lots)
    file.write_bytes(content)


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(node, dict):
        parts = [(key, node[key]) for key in list(node)[:60]]
    else:
        parts = list(enumerate(node[:8])) if isinstance(node, list) else []
    for key, value in parts:
        found += _places(value, (*path, key))
    return found


def _json(content: bytes, lots: random.Random) -> bytes:
    whole = json.loads(content)
    for _ in range(lots.randint(1, 3)):
        if lots.random() < 0.3:
            whole[lots.choice(NAMES)] = lots.choice(VALUES)
            continue
        *path, last = lots.choice([place for place in _places(whole) if place] or [("x",)])
        node = whole
        for key in path:
            node = node[key]
        if lots.random() < 0.3 and last in node if isinstance(node, dict) else False:
            del node[last]
        else:
            node[last] = lots.choice(VALUES)
    return json.dumps(whole).encode()


def _bytes(content: bytes, lots: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(lots.randint(1, 4)):
        place = lots.randrange(len(made) + 1)
        match lots.randrange(5):
            case 0:
                del made[place : place + lots.randint(1, 64)]
            case 1:
                made[place : place + 1] = bytes([lots.randrange(256)])
            case 2:
                del made[place:]
            case 3:
                made[place:place] = lots.randbytes(8)
            case _:
                made[place : place + 1] = lots.choice([b'"', b"{", b"[", b"\0", b"\xff" * 8, b"9" * 30])
    return bytes(made)


def _tensors(content: bytes, lots: random.Random) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + size]
    if lots.random() < 0.4:
        return _bytes(content[: 8 + size], lots) + content[8 + size :]
    whole = json.loads(header)
    name = lots.choice([key for key in whole if key != "__metadata__"])
    match lots.randrange(7):
        case 0:
            whole[name]["dtype"] = lots.choice(["F64", "I8", "BF16", "F8_E4M3", "XX", "", "F16", "I64", "BOOL"])
        case 1:
            whole[name]["shape"] = lots.choice([[], [0], [-1], [2**40], [1] * 20, [48], ["a"]])
        case 2:
            whole[name]["data_offsets"] = lots.choice([[0, 0], [0, 2**60], [-1, 4], [4, 0], [0], None])
        case 3:
            del whole[name]
        case 4:
            whole[f"{name}x"] = whole.pop(name)
        case 5:
            whole["__metadata__"] = lots.choice([{"format": "pt"}, {"format": "tf"}, {"format": 3}, {}, None])
        case _:
            whole[name]["shape"].reverse()
    header = json.dumps(whole).encode()
    length = len(header) if lots.random() < 0.9 else lots.choice([0, 5, 2**62])
    return struct.pack("<Q", length) + header + content[8 + size :]


def write_gguf(model: Any, tokenizer: Any, file: Path) -> None:
    """Write a tiny Llama and its byte-level tokenizer as GGUF, in float32."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(sorted(words["vocab"], key=words["vocab"].get))
    writer.add_token_types([1] * len(words["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
