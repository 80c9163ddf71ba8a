"""Loading language models: the small one that comes through pip, Hugging Face ids, local folders and GGUF files."""

from kvbench.models.cards import DEFAULT_MODEL, MODELS, ModelCard, cache_folder
from kvbench.models.embedded import CONVERSION, GGUF, GGUF_BYTES, GGUF_SHA256, REQUIREMENT, WHEEL
from kvbench.models.loading import LoadedModel, check_context, load_model
from kvbench.models.places import check_device

__all__ = [
    "CONVERSION",
    "DEFAULT_MODEL",
    "GGUF",
    "GGUF_BYTES",
    "GGUF_SHA256",
    "MODELS",
    "REQUIREMENT",
    "WHEEL",
    "LoadedModel",
    "ModelCard",
    "cache_folder",
    "check_context",
    "check_device",
    "load_model",
]
