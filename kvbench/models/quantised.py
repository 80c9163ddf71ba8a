"""Quantised weights that transformers reads: what they are called, and whether they can be read here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import plain

if TYPE_CHECKING:
    import torch


def weights_format(config: Any) -> str | None:
    """What a model's weights are stored as: `fp8`, `gptq 4-bit`, `bitsandbytes 4-bit nf4`; None for plain numbers."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    known = given if isinstance(given, dict) else given.to_dict()
    method = known.get("quant_method")
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes":
        kind = known.get("bnb_4bit_quant_type") or "fp4"
        return f"bitsandbytes 4-bit {kind}" if known.get("load_in_4bit") else "bitsandbytes 8-bit"
    bits = known.get("bits") or known.get("w_bit")
    return f"{method} {bits}-bit" if isinstance(bits, int) else method


def check_quantised(name: str, config: Any, device: torch.device) -> None:
    """Raise KVBenchError where quantised weights cannot be read on this machine, for want of a library or a GPU."""
    known = weights_format(config)
    if known is None:
        return
    from transformers.quantizers.auto import AutoHfQuantizer  # noqa: PLC0415 - slow

    from kvbench.models.quiet import quiet  # noqa: PLC0415

    try:
        with quiet(gguf=False):
            quantiser = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
            quantiser.validate_environment(device_map={"": device})
    except Exception as error:  # each method has its own way to refuse
        reason = plain(" ".join(str(error).split()) or type(error).__name__)
        raise KVBenchError(
            f"The weights of {name} are {plain(known)}, which cannot be read here ({reason.rstrip('.')}): install what "
            "is missing, or choose a model whose weights are plain numbers."
        ) from None


def loaded_format(model: Any, known: str) -> str:
    """What a loaded model computes with: what its weights are stored as, and whether loading made plain numbers."""
    quantiser = getattr(model, "hf_quantizer", None)
    undone = quantiser is None or getattr(quantiser.quantization_config, "dequantize", False)
    return f"{known}, dequantised" if undone else known
