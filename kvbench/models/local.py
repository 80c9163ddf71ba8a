"""Models that a user names: local folders, GGUF files and Hugging Face ids."""

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import plain
from kvbench.models.cards import MODELS


def locate(name: str) -> tuple[str, str, str]:
    """Give what to load from, the GGUF file in it if any, and the fingerprint of local files, both else empty."""
    path = Path(name).expanduser()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that no file can have, a loop of links, a closed folder
        why = getattr(error, "strerror", None) or str(error)
        raise KVBenchError(f"There is no model {plain(name)} ({why}): check the path.") from None
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
