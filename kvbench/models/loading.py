"""Loading a language model and its tokenizer for inference."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import reason as told
from kvbench.models.cards import DEFAULT_MODEL, MODELS
from kvbench.models.embedded import CONVERSION_VERSION, GGUF_SHA256, embedded_model
from kvbench.models.local import locate
from kvbench.models.places import check_device, device_named, dtype_named, placed
from kvbench.models.quantised import check_quantised, loaded_format, weights_format
from kvbench.models.quiet import quiet
from kvbench.models.sanity import check_config, check_model, check_tokenizer
from kvbench.models.scaling import extend, rope_scaling_named

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass
class LoadedModel:
    """A model ready to run: evaluation mode, no gradients.

    `fingerprint` changes with the weights and the tokenizer, and belongs to a run's configuration. `max_context` is
    the longest sequence in tokens, prompt and answer together, or None where the model states no limit.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    name: str
    fingerprint: str
    device: "torch.device"
    dtype: "torch.dtype"
    max_context: int | None
    lasting: bool = False
    """Whether `fingerprint` says the same of another process's model."""
    rope_scaling: str | None = None
    """What the rotary embedding was stretched by, such as `yarn:4`."""
    weights: str | None = None
    """What quantised weights are stored as, such as `fp8`; None for plain numbers."""
    device_map: Literal["auto"] | None = None
    """Whether accelerate spread the model by layer over all GPUs; `placed` says what lies where."""

    @property
    def placed(self) -> dict[str, str] | None:
        """Devices by the modules that accelerate put there; None for a model that lies on one device."""
        return placed(self.model)

    @property
    def computed_with(self) -> str | None:
        """As `weights`, and whether loading turned them into plain numbers; of a model with its weights only."""
        return loaded_format(self.model, self.weights) if self.weights else None


def load_model(
    name: str = DEFAULT_MODEL,
    *,
    device: str | None = None,
    dtype: str | None = None,
    context_length: int | None = None,
    rope_scaling: str | None = None,
    device_map: Literal["auto"] | None = None,
    weights: bool = True,
) -> LoadedModel:
    """Load a causal language model and its tokenizer for inference.

    `name` is a name from MODELS, a local folder, a .gguf file or a Hugging Face id. Only safetensors and GGUF weights
    are read, and no code that comes with a model is run. `device` defaults to CUDA where there is one, `dtype` to
    bfloat16 on CUDA and float32 elsewhere. `context_length` is the number of tokens that the caller needs; with
    `rope_scaling="yarn"` (arXiv:2309.00071) a model with rotary embedding is extended to it where its limit is shorter,
    and with `"yarn:4"` it is extended by this factor whatever the context. With `device_map="auto"` accelerate spreads
    the model by layer over all GPUs, and over memory and disk where these are too small. Quantised weights are read
    where transformers and its libraries can.
    Without `weights` the model's tensors are on PyTorch's meta device: it has its configuration, tokenizer, fingerprint
    and sizes, takes no memory and cannot run; `device` is then where it would run, and need not be on this machine.
    Raises KVBenchError for a model that cannot be had, read, or made to fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow

    place, scaling = device_named(device), rope_scaling_named(rope_scaling, "rope_scaling")
    if device_map not in (None, "auto"):
        raise KVBenchError(f"The device map {device_map} is not known: give auto, or leave it out.")
    if weights:
        check_device(place)
    number_type = dtype_named(dtype, place)
    if name in MODELS:
        with _readable_errors(name):
            folder = embedded_model()
        source, gguf, fingerprint = str(folder), "", f"gguf-sha256:{GGUF_SHA256}/{CONVERSION_VERSION}"
    else:
        source, gguf, fingerprint = locate(name)
    arguments: dict[str, Any] = {"trust_remote_code": False}
    if gguf:
        arguments["gguf_file"] = gguf
    with _readable_errors(name):
        config = AutoConfig.from_pretrained(source, **arguments)
        check_config(name, config)
        stored = weights_format(config)
        if weights:
            check_quantised(name, config, place)
        limit, extended = extend(name, config.get_text_config(), scaling, context_length)
        _check_limit(name, limit, context_length)
        commit = getattr(config, "_commit_hash", None)
        lasting = bool(fingerprint or commit)
        fingerprint = (fingerprint or f"commit:{commit}") + (
            f"+{extended.kind}:{extended.factor:g}" if extended else ""
        )
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **arguments)
        check_tokenizer(name, tokenizer)
        if weights:
            spread = "auto" if device_map and place.type != "cpu" else {"": place} if device_map or stored else None
            if spread is not None:  # accelerate puts it there while it reads
                arguments["device_map"] = spread
            model = _with_weights(name, source, config, number_type, arguments)
            model = model.to(place) if spread is None else model
        else:
            import torch  # noqa: PLC0415 - see device_named

            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=number_type, trust_remote_code=False)
            if hasattr(model, "_can_set_experts_implementation") and model._can_set_experts_implementation():
                model.set_experts_implementation("batched_mm")  # the one way that needs no numbers
        check_model(name, model)
        model = model.eval().requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        fingerprint=fingerprint,
        device=place,
        dtype=number_type,
        max_context=limit,
        lasting=lasting,
        rope_scaling=None if extended is None else extended.text,
        weights=stored,
        device_map=device_map,
    )


def _with_weights(
    name: str, source: str, config: Any, number_type: "torch.dtype", arguments: dict[str, Any]
) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM, GgufConfig  # noqa: PLC0415 - slow

    gguf = "gguf_file" in arguments
    with quiet(gguf=gguf, bar=True):
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            dtype=number_type,
            use_safetensors=True,
            **arguments,
            **({"quantization_config": GgufConfig(dequantize=True)} if gguf else {}),
        )
    if lost := sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"]):
        raise KVBenchError(
            f"The weights of {name} lack {len(lost)} tensors that its architecture needs, such as {lost[0]}: get "
            "the complete model, or one whose config.json fits its weights."
        )
    return model


def check_context(loaded: LoadedModel, tokens: int) -> None:
    """Raise KVBenchError where `tokens` (prompt and answer together) are more than the model can read."""
    _check_limit(loaded.name, loaded.max_context, tokens)


def _check_limit(name: str, limit: int | None, tokens: int | None) -> None:
    if limit is not None and tokens is not None and tokens > limit:
        raise KVBenchError(
            f"{name} reads at most {limit} tokens and {tokens} were asked for: choose a shorter context length, a "
            "model with a longer context, or extend this one, where the command has it, with --rope-scaling yarn."
        )


@contextlib.contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    try:
        yield
    except KVBenchError:
        raise
    except Exception as error:  # the libraries below raise whatever they meet in a bad file
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise KVBenchError(
                f"{name} needs code of its own to load, which kvbench does not run: choose a model that transformers "
                "supports itself."
            ) from error
        if "safetensors" in reason and ("does not appear to have" in reason or "no file named" in reason):
            raise KVBenchError(
                f"{name} has no safetensors weights, and pickled ones are not read since they can run code: choose "
                "another revision or convert them."
            ) from error
        names = ", ".join(MODELS)
        raise KVBenchError(
            f"The model {name} could not be loaded ({told(error)}): give a name from `kvbench models` ({names}), a "
            "local folder or a Hugging Face id."
        ) from error
