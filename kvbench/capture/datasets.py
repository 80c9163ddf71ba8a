"""Vectors in the layouts of vector search: HDF5 as in ann-benchmarks, read and written, and .fvecs and .npy, written.

ann-benchmarks' layout is an HDF5 file with `train` [n, d], `test` [q, d], the ids `neighbors` [q, k] of the nearest
vectors of `train`, best first, their `distances` [q, k], and the attributes `distance` and `point_type`
(Aumüller, Bernhardsson, Faithfull, ANN-Benchmarks, arXiv:1807.05614). A further data set `learn` [m, d] has queries
that an index may learn from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvbench.capture.files import sha256_of
from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import check_regular, reading

INNER_PRODUCT = ("ip", "dot", "inner_product", "innerproduct")
ANGULAR = ("angular", "cosine")
CHECKED = 32
"""Queries whose nearest vectors are searched again, to see that a file's are those by inner product."""
TOLERANCE = 1e-3
Float = NDArray[np.float32]


class Vectors(NamedTuple):
    """Float32 vectors [n, d], [q, d] and, where there are any, [m, d] to learn from; ids [q, k] of the nearest."""

    keys: Float
    queries: Float
    learn: Float | None
    neighbors: NDArray[np.int64] | None


@dataclass(frozen=True)
class Dataset:
    """An HDF5 file in ann-benchmarks' layout: `keys` vectors, `queries` and `learnt` queries to learn from.

    `held_out`: so many of its first test queries are for indexes to learn from, and are not searched.
    """

    path: Path
    keys: int
    queries: int
    learnt: int
    dimension: int
    distance: str
    sha256: str
    held_out: int = 0
    layers: tuple[int, ...] = (0,)

    def document(self) -> dict[str, Any]:
        """What tells it from another, as JSON can hold it."""
        return {
            "name": self.path.name, "sha256": self.sha256, "distance": self.distance, "dimension": self.dimension,
            "keys": self.keys, "queries": self.queries, "learnt": self.learnt, "held_out": self.held_out,
        }  # fmt: skip

    def check_learnt(self, index: str) -> None:
        """Raise KVBenchError where there are no queries that `index` could learn from."""
        if not self.learnt:
            raise KVBenchError(
                f"Index '{index}' learns from queries, and {self.path} has none to learn from (`learn`): set aside the "
                "first of its test queries with --learn 1000, or leave the index out."
            )

    def read(self, k: int) -> Vectors:
        """Read the vectors; `neighbors` where the file has k for each query.

        Raises KVBenchError for vectors that are not finite, and for neighbours that are not those by inner product.
        """
        with _opened(self.path) as file, reading(lambda reason: f"{self.path} cannot be read: {reason}."):
            keys, test = _float32(file["train"], "train"), _float32(file["test"], "test")
            learn = _float32(file["learn"], "learn") if "learn" in file else None
            truth = None
            if "neighbors" in file and file["neighbors"].shape[1] >= k:
                truth = np.asarray(file["neighbors"][:], np.int64)
        if self.distance in ANGULAR:
            keys, test = _normalised(keys), _normalised(test)
            learn = None if learn is None else _normalised(learn)
        if truth is not None:
            self._check_truth(keys, test, truth[:, :k])
            truth = truth[self.held_out :]
        if self.held_out:
            learn = test[: self.held_out]
        return Vectors(keys, test[self.held_out :], learn, truth)

    def _check_truth(self, keys: Float, queries: Float, truth: NDArray[np.int64]) -> None:
        if truth.size and (truth.min() < 0 or truth.max() >= len(keys)):
            raise KVBenchError(f"{self.path} names neighbors that are no rows of train, 0 to {len(keys) - 1}.")
        few = np.linspace(0, len(queries) - 1, min(CHECKED, len(queries))).astype(int)
        scores = queries[few] @ keys.T
        best = -np.sort(-np.partition(scores, -truth.shape[1], axis=1)[:, -truth.shape[1] :], axis=1)
        theirs = np.take_along_axis(scores, truth[few], axis=1)
        size = np.abs(best).max(axis=1, keepdims=True) + 1e-30
        if float(((best - theirs) / size).max()) > TOLERANCE:
            raise KVBenchError(
                f"The neighbors of {self.path} are not the nearest by inner product, as its distance "
                f"'{self.distance}' says: export it again, or take its data set neighbors out, to have them computed."
            )


def load_dataset(path: str | Path, *, learn: int = 0) -> Dataset:
    """Open an HDF5 file in ann-benchmarks' layout, `learn` of whose first test queries are only learnt from.

    Raises KVBenchError where h5py is not installed, for a file that has no such layout, and for distances other than
    inner product (`ip`, `dot`) and `angular`, whose vectors are normalised.
    """
    file = Path(path)
    with _opened(file) as content, reading(lambda reason: f"{file} is not in ann-benchmarks' layout ({reason})."):
        shapes = {}
        for name in ("train", "test", *(name for name in ("learn", "neighbors") if name in content)):
            if name not in content:
                raise ValueError(f"it lacks the data set {name}")
            shapes[name] = content[name].shape
            if len(shapes[name]) != 2 or not all(shapes[name]):
                raise ValueError(f"{name} has the shape {shapes[name]}, not two dimensions")
        if len({shapes[name][1] for name in shapes if name != "neighbors"}) > 1:
            raise ValueError("its vectors have different dimensions")
        if "neighbors" in shapes and shapes["neighbors"][0] != shapes["test"][0]:
            raise ValueError("neighbors has another number of rows than test")
        distance = content.attrs.get("distance", "")
        distance = str(distance.decode() if isinstance(distance, bytes) else distance).lower()
    if distance not in (*INNER_PRODUCT, *ANGULAR):
        raise KVBenchError(
            f"{file} has the distance '{distance}', and kvbench's indexes search by inner product: give a file of "
            f"{', '.join(INNER_PRODUCT[:2])} or angular."
        )
    queries = shapes["test"][0] - learn
    if learn < 0 or queries < 1:
        raise KVBenchError(f"--learn {learn} leaves none of the {shapes['test'][0]} queries of {file}: give fewer.")
    learnt = learn or shapes.get("learn", (0,))[0]
    return Dataset(file, shapes["train"][0], queries, learnt, shapes["train"][1], distance, sha256_of(file), learn)


def h5py() -> Any:
    """The library that reads and writes HDF5; KVBenchError where it is not installed."""
    try:
        import h5py as library  # noqa: PLC0415  an extra
    except ImportError:
        raise KVBenchError("h5py is not installed, and HDF5 files need it: pip install 'kvbench[hdf5]'.") from None
    return library


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    library = h5py()
    with reading(lambda reason: f"{file} cannot be read as HDF5 ({reason}): give a file in ann-benchmarks' layout."):
        check_regular(file)
        content = library.File(file, "r")
    with content:
        yield content


def _float32(data: Any, name: str) -> Float:
    found = np.ascontiguousarray(data[:], np.float32)
    if not np.isfinite(found).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    return found


def _normalised(vectors: Float) -> Float:
    found: Float = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-30))
    return found
