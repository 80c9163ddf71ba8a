"""A tokenizer trained here, and tiny random models that come with it: in memory, or in a folder as users name one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvbench.models import LoadedModel
from kvbench.tasks.texts import NOISE, essays

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|turn|>{{ message['role'] }}\n{{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
THINKS = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@functools.cache
def _trained() -> str:
    """A byte-level BPE tokenizer that puts BOS before every text, as Llama's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<bos>", "<eos>", "<|turn|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = essays().words
    texts = [" ".join(words[i : i + 50]) for i in range(0, 20000, 50)]
    backend.train_from_iterator([NOISE, "What is the special magic number\nOne of the special magic", *texts], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return backend.to_str()


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of its own for the caller."""
    backend = Tokenizer.from_str(_trained())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer


def loaded_model() -> LoadedModel:
    """A tiny Llama for up to 1,024 tokens with its tokenizer, as `load_model` gives one."""
    tokenizer = make_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=1024, eos_token_id=1)
    return LoadedModel(model, tokenizer, "tiny", "f", model.device, model.dtype, 1024)


def save_model(folder: Path, chat_template: str | None = CHAT_TEMPLATE, **changes: Any) -> Path:
    """Save a tiny Llama with its tokenizer, for up to 1,024 tokens but for `changes`; gives the folder."""
    tokenizer = make_tokenizer(chat_template)
    options = {"max_position_embeddings": 1024, "eos_token_id": 1, **changes}
    tiny_model(vocab_size=len(tokenizer), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
