"""The models known by name, and the folder that keeps them."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelCard:
    """What `kvbench models` shows of a model known by name; sizes in bytes, context length in tokens."""

    name: str
    summary: str
    reference: str
    licence: str
    parameters: int
    context_length: int
    download_bytes: int
    cache_bytes: int


DEFAULT_MODEL = "smollm2-135m"
MODELS: dict[str, ModelCard] = {
    DEFAULT_MODEL: ModelCard(
        name=DEFAULT_MODEL,
        summary="SmolLM2-135M-Instruct (4-bit weights, dequantised): small, trained, and reached by pip alone",
        reference="arXiv:2502.02737",
        licence="Apache-2.0",
        parameters=134_515_008,
        context_length=8192,
        download_bytes=92_871_040,
        cache_bytes=541_600_000,
    )
}


def cache_folder() -> Path:
    """Give the folder where kvbench keeps models: KVBENCH_CACHE, or the user's cache folder."""
    import platformdirs  # noqa: PLC0415 - keeps `kvbench --help` fast

    return Path(os.environ.get("KVBENCH_CACHE") or platformdirs.user_cache_path("kvbench", appauthor=False))
