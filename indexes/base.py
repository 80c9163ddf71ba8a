"""The contract of a vector index over the keys of one layer: build, search, insert, save and load."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import Extension
from kvbench.contract.reading import check_regular, parse_json, plain, reading, reason
from kvbench.contract.saved import Saveable
from kvbench.indexes.storage import BEYOND, KeyStore, Vectors, as_float32, from_bits

FORMAT = "kvbench-index"
VERSION = "1"
MOST_HEADS = 2**16
"""Query heads of an index, batch rows folded in."""
State = dict[str, NDArray[Any]]


class _About(BaseModel):
    """What a saved index says of itself."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    options: dict[str, Any]
    seed: int
    heads: int = Field(ge=1, le=MOST_HEADS)
    shape: Annotated[tuple[int, int, int], Field(strict=False)]
    dtype: str


class SearchResult(NamedTuple):
    """What a search found: for each head and query the best keys first.

    Attributes:
        ids: int32 [H, q, k], -1 where fewer than k keys were found.
        scores: float32 [H, q, k], inner products q·k (not divided by √d), -inf where the id is -1.
        evaluations: int64 [H, q], vectors compared with the query: keys, centroids, entry points and re-ranked keys.
    """

    ids: NDArray[np.int32]
    scores: NDArray[np.float32]
    evaluations: NDArray[np.int64]


class Index(Extension, Saveable, ABC):
    """An inner-product index over the keys of one layer, one structure per key/value head or per query head.

    Shapes: G key/value heads, H query heads (a multiple of G; head h reads the keys of group h // (H // G)),
    n keys, m new keys or training queries, q queries, d dimensions. Fold batch rows into G and H.

    Subclasses write `_build`, `_search`, `_insert`, `_state`, `_restore` and `nbytes`; this class checks what comes in.
    They find the keys in `self.keys` and the number of query heads in `self.heads`.

    Attributes:
        search_parameter: the option that trades recall for scanned keys (empty if the search is exact).
        uses_queries: whether `build` needs queries of the prompt.
    """

    search_parameter: ClassVar[str] = ""
    uses_queries: ClassVar[bool] = False

    def __init__(self, options: BaseModel | None = None, seed: int = 0) -> None:
        """An empty index; KVBenchError if the options are another index's, or for a seed that faiss cannot take."""
        if options is not None and not isinstance(options, self.Options):
            raise KVBenchError(f"index {self.name} takes {self.name} options; it was given {type(options).__name__}.")
        if not 0 <= seed < 2**31 - 1:
            raise KVBenchError(f"The seed {seed} of index {self.name} is not between 0 and {2**31 - 2}.")
        self.options: Any = self.Options() if options is None else options
        self.seed = seed
        self.keys: KeyStore
        self.heads = 0
        self._waiting: NDArray[np.float32] | None = None

    def build(self, keys: Vectors, queries: Vectors | None = None, *, heads: int | None = None) -> None:
        """Index keys [G, n, d] for `heads` query heads, learning from queries [H, m, d] of the prompt if it uses them.

        Keys are float32, float16 or bfloat16 on the CPU and are read in place: do not overwrite them.
        Raises KVBenchError for other dtypes or shapes, for NaN or infinity, and for missing queries.
        """
        self._hold(KeyStore(keys), heads or (keys.shape[0] if queries is None else int(queries.shape[0])))
        training = None
        if self.uses_queries:
            if queries is None or (self.keys.n and not queries.shape[1]):
                raise KVBenchError(f"index {self.name} learns from the prompt's queries; pass queries [heads, m, d].")
            training = self._checked_queries(queries)
        if self.keys.n:
            self._build(training)
        else:
            self._waiting = training

    def build_beside(self, keys: Vectors, device_keys: Tensor, queries: Tensor | None, *, heads: int) -> None:
        """As `build`, where a device has the same keys [G, n, d] and the queries, and constructs what it can.

        Raises KVBenchError as `build` does.
        """
        finite = self.builds_on_device and bool(device_keys.abs().amax() <= BEYOND) if device_keys.shape[1] else False
        if not finite or (self.uses_queries and (queries is None or not queries.shape[1])):
            self.build(keys, None if queries is None else queries.cpu(), heads=heads)
            return
        self._hold(KeyStore(keys, checked=True), heads)
        self._build_on(device_keys, queries)

    def _hold(self, keys: KeyStore, heads: int) -> None:
        self.keys, self.heads = keys, heads
        if heads % keys.groups:
            raise KVBenchError(f"{heads} query heads are no multiple of {keys.groups} key/value heads.")
        if heads > MOST_HEADS:
            raise KVBenchError(f"{heads} query heads are more than the {MOST_HEADS} of one index.")

    def search(self, queries: Vectors, k: int, *, effort: int | None = None) -> SearchResult:
        """Find about the k largest inner products of each query in queries [H, q, d].

        `effort` takes the place of the option named by `search_parameter`.
        Raises KVBenchError for wrong shapes, NaN or infinity, k < 1 or effort < 1, and before `build`.
        """
        if not self.heads:
            raise KVBenchError(f"index {self.name} is empty; call build before search.")
        if k < 1 or (effort is not None and effort < 1):
            raise KVBenchError(f"k is {k} and effort {effort}; both start at 1.")
        wide = self._checked_queries(queries)
        shape = (self.heads, wide.shape[1], k)
        result = SearchResult(
            np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32), np.zeros(shape[:2], np.int64)
        )
        if self.keys.n and wide.shape[1]:
            self._search(wide, k, self._effort(effort), result)
        return result

    def insert(self, keys: Vectors, *, storage: Vectors | None = None) -> None:
        """Append keys [G, m, d]; their ids continue from n.

        With `storage`, a view [G, n + m, d] of all keys including the new ones (a growing buffer of the caller's), the
        index reads that from now on; without it, it copies all keys to memory of its own once.
        Raises KVBenchError for another dtype or shape than the index holds, and for NaN or infinity.
        """
        if not self.heads:
            raise KVBenchError(f"index {self.name} is empty; call build before insert.")
        first = self.keys.n
        self.keys.append(keys, storage)
        if self.keys.n == first:
            return
        if first:
            self._insert(first)
        else:
            if self.uses_queries and (self._waiting is None or not self._waiting.shape[1]):
                self._waiting = self._queries_from_keys()
            self._build(self._waiting)
            self._waiting = None

    def reserve(self, count: int) -> None:
        """Make room for `count` more keys and compile what takes them, so that no insertion takes longer for it."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the structure, besides the caller's keys."""

    def _parts(self) -> tuple[dict[str, Any], State]:
        """What the index says of itself, and its arrays without the keys."""
        if not self.heads:
            raise KVBenchError(f"index {self.name} is empty; call build before save.")
        tensors: State = {}
        if self.keys.n:
            tensors = {"index." + name: np.ascontiguousarray(array) for name, array in self._state().items()}
        elif self._waiting is not None:
            tensors = {"waiting": self._waiting}
        about = {
            "name": self.name,
            "options": self.options.model_dump(mode="json"),
            "seed": self.seed,
            "heads": self.heads,
            "shape": [self.keys.groups, self.keys.n, self.keys.d],
            "dtype": self.keys.dtype,
        }
        return about, tensors

    def saved(self) -> dict[str, Any]:
        """The parts of a saved index, the keys as they lie in memory, which may be the caller's."""
        about, tensors = self._parts()
        return {"about": about, "tensors": tensors, "keys": self.keys.array}

    @classmethod
    def restored(cls, parts: dict[str, Any]) -> Self:
        """An index that searches exactly as the saved one did; its parts are checked as in `load`."""
        about = _About.model_validate(parts["about"])
        if about.name != cls.name:
            raise ValueError(f"an index of kind {plain(about.name)!r}, not {cls.name}")
        return cls._whole(about, parts["tensors"], from_bits(parts["keys"], about.dtype), "The index")

    def save(self, path: str | Path, *, keys: bool = True) -> None:
        """Write the index as safetensors, whole or not at all; with `keys=False` without the keys, which `load` needs.

        Raises KVBenchError where it cannot be written.
        """
        about, tensors = self._parts()
        if keys:
            tensors["keys"] = np.ascontiguousarray(self.keys.array)
        metadata = {"format": FORMAT, "version": VERSION, "index": json.dumps(about, sort_keys=True)}
        target = Path(path)
        temporary = target.with_name(f".{target.name}-{os.getpid()}")
        try:
            save_file(tensors, str(temporary), metadata=metadata)
            temporary.replace(target)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise KVBenchError(
                f"The index cannot be written to {path} ({reason(error)}): free some space or choose another path."
            ) from error

    @classmethod
    def load(cls, path: str | Path, *, keys: Vectors | None = None) -> Self:
        """Read an index that this class saved; it searches exactly as the saved one did.

        Raises KVBenchError if the file is truncated, foreign, of another index or inconsistent: what compiled code
        relies on (sizes, ids, types, finite numbers) is checked here.
        """
        with reading(lambda reason: f"{path} cannot be read as a kvbench index: {reason}."):
            check_regular(path)
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
                    raise KVBenchError(f"{path} is no kvbench index of version {VERSION}.")
                about = _About.model_validate(parse_json(metadata["index"]))
                if about.name != cls.name:
                    raise KVBenchError(f"{path} holds an index of kind {plain(about.name)!r}, not {cls.name}.")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with reading(lambda reason: f"{path} is damaged: its parts do not fit together ({reason})."):
            if keys is None:
                if "keys" not in tensors:
                    raise KVBenchError(f"{path} was saved without its keys; pass them as keys=.")
                keys = from_bits(tensors["keys"], about.dtype)
            return cls._whole(about, tensors, keys, str(path))

    @classmethod
    def _whole(cls, about: _About, tensors: State, keys: Vectors, told: str) -> Self:
        """Put an index together; KVBenchError, ValueError or KeyError where the parts, of `told`, do not fit."""
        index = cls(cls.Options(**cls.saved_options(about.options)), about.seed)
        index.keys = KeyStore(keys)
        stored = index.keys
        if (stored.groups, stored.n, stored.d) != about.shape or stored.dtype != about.dtype:
            raise KVBenchError(f"{told} belongs to keys of shape {list(about.shape)}, not to these.")
        index.heads = about.heads
        if index.heads % stored.groups:
            raise ValueError("heads")
        waiting = tensors.get("waiting")
        if waiting is not None:
            index._waiting = index._checked_queries(waiting)
        if stored.n:
            index._restore(
                {name[len("index.") :]: array for name, array in tensors.items() if name.startswith("index.")}
            )
        return index

    @classmethod
    def saved_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a saved index; those that an older version did not know get the value that it had."""
        return options

    def _effort(self, effort: int | None) -> int:
        if effort is not None:
            return effort
        return int(getattr(self.options, self.search_parameter)) if self.search_parameter else 1

    def _checked_queries(self, queries: Vectors) -> NDArray[np.float32]:
        wide = as_float32(queries, "queries")
        if (wide.shape[0], wide.shape[2]) != (self.heads, self.keys.d):
            raise KVBenchError(f"queries have shape {wide.shape}; give ({self.heads}, any number, {self.keys.d}).")
        return wide

    def _queries_from_keys(self) -> NDArray[np.float32]:
        per_group = self.heads // self.keys.groups
        return np.repeat(np.stack([self.keys.float32(g) for g in range(self.keys.groups)]), per_group, axis=0)

    @abstractmethod
    def _build(self, queries: NDArray[np.float32] | None) -> None:
        """Build over `self.keys` (at least one key), replacing what was there."""

    @property
    def builds_on_device(self) -> bool:
        """Whether `build_beside` constructs on the device of the keys, as `_build_on` says."""
        return False

    def _build_on(self, keys: Tensor, queries: Tensor | None) -> None:
        """As `_build`, from keys [G, n, d] and queries [H, m, d] on a device."""
        raise NotImplementedError

    @abstractmethod
    def _search(self, queries: NDArray[np.float32], k: int, effort: int, result: SearchResult) -> None:
        """Fill the result, which comes with ids -1, scores -inf and evaluations 0."""

    @abstractmethod
    def _insert(self, first: int) -> None:
        """Take up the keys from `first` (at least 1) on, already in `self.keys`."""

    @abstractmethod
    def _state(self) -> State:
        """The structure as plain arrays, for `_restore`."""

    @abstractmethod
    def _restore(self, state: State) -> None:
        """Rebuild from `_state`'s arrays, with `self.keys` in place; ValueError or KeyError if they do not fit."""


def expect(state: State, name: str, dtype: type, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """A state's array if it has this dtype and shape (None: any length); ValueError otherwise."""
    array = state[name]
    if array.dtype != dtype or array.ndim != len(shape):
        raise ValueError(name)
    if any(want is not None and have != want for have, want in zip(array.shape, shape, strict=True)):
        raise ValueError(name)
    return array


def expect_ids(state: State, name: str, shape: tuple[int | None, ...], n: int, lowest: int = -1) -> NDArray[Any]:
    """A state's int32 array of ids between `lowest` and n - 1; ValueError otherwise."""
    array = expect(state, name, np.int32, shape)
    if array.size and (array.min() < lowest or array.max() >= n):
        raise ValueError(name)
    return array


def expect_finite(state: State, name: str, shape: tuple[int | None, ...]) -> NDArray[np.float32]:
    """A state's float32 array of this shape, finite as keys and means of keys are; ValueError otherwise."""
    array = expect(state, name, np.float32, shape)
    if array.size and not np.abs(array).max() <= 4 * BEYOND:
        raise ValueError(name)
    return array
