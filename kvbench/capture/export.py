"""Writes captured vectors with their exact nearest neighbours for other tools of vector search."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvbench.capture.datasets import h5py
from kvbench.capture.files import Capture
from kvbench.contract.errors import KVBenchError, unwritable

FORMATS = ("hdf5", "fvecs", "npy")
Float = NDArray[np.float32]
BLOCK_BYTES = 256 * 2**20


def export(
    capture: Capture, output: Path, formats: Sequence[str], *, k: int = 100, layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None, sinks: int = 4, window: int = 64,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> list[Path]:  # fmt: skip
    """Write the vectors of each layer and query head, and return the files.

    `train` are the prompt's keys but the first `sinks` and last `window`, as indexes get them; `test` the decoding
    queries, `learn` the prompt's queries, `neighbors` the ids of the k keys of largest inner product in float64, best
    first, and `distances` minus these products. HDF5 in ann-benchmarks' layout; `.fvecs` and `.ivecs` (each row after
    its length as int32, little-endian), and `.npy` in a file each. A file is written whole or not at all. Raises
    KVBenchError for layers, heads, formats or k that cannot be had, and where a file cannot be written.
    """
    manifest = capture.manifest
    if wrong := [name for name in formats if name not in FORMATS]:
        raise KVBenchError(f"--format {wrong[0]} is none of {', '.join(FORMATS)}.")
    if not formats:
        raise KVBenchError(f"--format names no format: give some of {', '.join(FORMATS)}.")
    if "hdf5" in formats:
        h5py()
    chosen = tuple(range(manifest.heads)) if heads is None else tuple(heads)
    for head in chosen:
        if not 0 <= head < manifest.heads:
            raise KVBenchError(f"There is no head {head}: the capture's {manifest.heads} query heads start at 0.")
    keys = manifest.prompt_tokens - sinks - window
    if min(sinks, window) < 0 or not 1 <= k <= keys:
        raise KVBenchError(
            f"k = {k} does not fit the {max(keys, 0)} keys between {sinks} sinks and a window of {window}: choose a "
            "smaller k or window, or a longer context."
        )
    numbers = [capture.layer(number).number for number in (capture.layers if layers is None else layers)]
    written: list[Path] = []
    shared, of, done = manifest.heads // manifest.kv_heads, len(numbers) * len(chosen), 0
    try:
        output.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            layer = capture.layer(number)
            prompt, decode = layer.prompt, layer.decode
            prompt_keys, learn, queries = prompt.keys, prompt.queries, decode.queries
            for head in chosen:
                name = f"layer-{number:03d}.head-{head:02d}"
                progress(done, of, name)
                done += 1
                train = _array(prompt_keys[head // shared, sinks : prompt_keys.shape[1] - window])
                content: dict[str, NDArray[Any]] = {
                    "train": train,
                    "test": _array(queries[head]),
                    "learn": _array(learn[head]),
                }
                content["neighbors"], content["distances"] = ground_truth(train, content["test"], k)
                for form in formats:
                    written += _WRITERS[form](output, name, content)
    except OSError as error:
        raise KVBenchError(unwritable(output, error)) from None
    return written


def ground_truth(keys: Float, queries: Float, k: int) -> tuple[NDArray[np.int32], Float]:
    """Ids [q, k] of the k keys [n, d] of largest inner product with queries [q, d], and minus the products; float64."""
    wide, block = torch.from_numpy(keys).double().T, max(1, BLOCK_BYTES // (8 * max(len(keys), 1)))
    parts = [(part.double() @ wide).topk(k, dim=1) for part in torch.split(torch.from_numpy(queries), block)]
    ids = torch.cat([part.indices for part in parts]).int().numpy()
    return ids, (-torch.cat([part.values for part in parts])).float().numpy()


def _array(tensor: torch.Tensor) -> Float:
    found: Float = np.ascontiguousarray(tensor.float().numpy())
    return found


def _whole(file: Path, write: Callable[[Path], None]) -> Path:
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return file


def _hdf5(folder: Path, name: str, content: Mapping[str, NDArray[Any]]) -> list[Path]:
    def write(path: Path) -> None:
        with h5py().File(path, "w") as file:
            file.attrs.update(type="dense", distance="ip", dimension=content["train"].shape[1], point_type="float")
            for key, array in content.items():
                file.create_dataset(key, data=array)

    return [_whole(folder / f"{name}.hdf5", write)]


def _vecs(folder: Path, name: str, content: Mapping[str, NDArray[Any]]) -> list[Path]:
    written = []
    for key, array in content.items():
        wide = array.astype("<i4" if key == "neighbors" else "<f4")
        rows = np.empty((len(wide), wide.shape[1] + 1), "<i4")
        rows[:, 0], rows[:, 1:] = wide.shape[1], wide.view("<i4")
        ending = "ivecs" if key == "neighbors" else "fvecs"
        written.append(_whole(folder / f"{name}.{key}.{ending}", rows.tofile))
    return written


def _npy(folder: Path, name: str, content: Mapping[str, NDArray[Any]]) -> list[Path]:
    def write(array: NDArray[Any]) -> Callable[[Path], None]:
        def save(path: Path) -> None:
            with path.open("wb") as stream:
                np.save(stream, array, allow_pickle=False)

        return save

    return [_whole(folder / f"{name}.{key}.npy", write(array)) for key, array in content.items()]


_WRITERS: dict[str, Callable[[Path, str, Mapping[str, NDArray[Any]]], list[Path]]] = {
    "hdf5": _hdf5, "fvecs": _vecs, "npy": _npy,
}  # fmt: skip
