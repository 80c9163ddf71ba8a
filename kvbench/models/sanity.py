"""What a model's files must say before anything runs: values that its classes take unseen and later stumble over."""

from typing import Any

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import plain, reason

MOST_LAYERS = 10_000
"""More are a mistake, and take transformers hours to set up."""
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers")
_SPECIAL = ("bos", "eos", "pad")


def check_config(name: str, config: Any) -> None:
    """Raise KVBenchError for a configuration that no decoder-only model can have."""
    if getattr(config, "is_encoder_decoder", False):
        raise KVBenchError(
            f"{name} is an encoder-decoder model ({config.model_type}), and kvbench governs decoder-only models: "
            "choose one that reads its prompt into its own key-value cache."
        )
    text = config.get_text_config()
    _check_number(name, text, "max_position_embeddings", None)
    for depth in _DEPTHS:
        _check_number(name, text, depth, MOST_LAYERS)


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """Raise KVBenchError for a tokenizer that fails at a word, or whose chat template fails at a user's message."""
    try:
        tokenizer.decode(tokenizer.encode("Hello", add_special_tokens=False))
    except Exception as error:
        raise KVBenchError(
            f"The tokenizer of {name} cannot encode a word ({reason(error)}): mend its files, or get them anew."
        ) from error
    if not tokenizer.chat_template:
        return
    message = [{"role": "user", "content": "Hello"}]
    try:
        tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise KVBenchError(
            f"The chat template of {name} cannot be rendered ({reason(error)}): mend it, or remove it from the model's "
            "files."
        ) from error


def check_model(name: str, model: Any) -> None:
    """Raise KVBenchError where the token ids that end an answer are none."""
    settings = model.generation_config
    for kind in _SPECIAL:
        value = getattr(settings, f"{kind}_token_id", None)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
                raise KVBenchError(
                    f"The generation settings of {name} have {kind}_token_id={plain(repr(value))}: expected a token "
                    "id, or a list of them."
                )


def _check_number(name: str, config: Any, field: str, most: int | None) -> None:
    value = getattr(config, field, None)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        limit = "1 or more" if most is None else f"1 to {most}"
        raise KVBenchError(
            f"The configuration of {name} has {field}={plain(repr(value))}: expected a whole number, {limit}."
        )
