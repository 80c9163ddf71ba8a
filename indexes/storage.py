"""Keys as the kernels read them: one row-major block of rows, never copied to another dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvbench.contract.errors import KVBenchError
from kvbench.indexes.compiled import decode, find_beyond

Array = NDArray[Any]
Vectors = Array | torch.Tensor

# numba has no 16-bit floats on CPUs: the kernels tell the two formats apart by the signedness of their bits.
_BITS = {"float32": np.float32, "float16": np.uint16, "bfloat16": np.int16}
BEYOND = 1e15
"""Magnitude up to which sums of squared differences stay finite in float32, whatever the number of dimensions."""
# `widen` reads float16's infinity and NaN as numbers beyond its largest one.
_LARGEST = {"float32": BEYOND, "float16": 65504.0, "bfloat16": BEYOND}


def as_bits(vectors: Vectors, what: str) -> tuple[Array, str]:
    """The same memory as float32, or as the bits of float16 (uint16) or bfloat16 (int16), and the dtype's name.

    Raises KVBenchError for another dtype, number of dimensions or device.
    """
    if isinstance(vectors, torch.Tensor):
        if vectors.device.type != "cpu":
            raise KVBenchError(f"{what} are on {vectors.device}; indexes read CPU memory, so move them first.")
        vectors = vectors.detach()
        name = str(vectors.dtype).removeprefix("torch.")
        array = vectors.view(torch.int16).numpy() if name in ("float16", "bfloat16") else vectors.numpy()
    else:
        array = np.asarray(vectors)
        name = str(array.dtype)
    if name not in _BITS:
        raise KVBenchError(f"{what} have dtype {name}; give float32, float16 or bfloat16.")
    if array.ndim != 3:
        raise KVBenchError(f"{what} have {array.ndim} dimensions; give three (heads, vectors, d).")
    return array.view(_BITS[name]), name


def as_float32(vectors: Vectors, what: str) -> NDArray[np.float32]:
    """The vectors as contiguous float32 [heads, vectors, d]; KVBenchError if any is NaN, infinite or beyond 1e15."""
    array, name = as_bits(vectors, what)
    array = np.ascontiguousarray(array)
    wide = array if name == "float32" else decode(array)
    heads, count, d = wide.shape
    if find_beyond(wide.reshape(-1, d), count, heads, 0, count, _LARGEST[name]) >= 0:
        raise KVBenchError(
            f"{what} hold NaN or infinite values, or such beyond {BEYOND:g}, whose squares overflow; an index needs "
            "finite vectors."
        )
    return wide


def rows_in_place(array: Array) -> tuple[Array, int] | None:
    """The memory of [g, n, d] as read-only rows [≥ n, d], and the rows from one group to the next; None if it has gaps.

    Row i of group g is row `g * stride + i`.
    """
    groups, n, d = array.shape
    size = array.itemsize
    row = d * size
    viewable = array.size == 0 or (
        (n < 2 or array.strides[1] == row)
        and (d < 2 or array.strides[2] == size)
        and (groups < 2 or (array.strides[0] % row == 0 and array.strides[0] >= n * row))
    )
    if not viewable and n:
        return None
    stride = array.strides[0] // row if groups > 1 and n > 0 else n
    total = (groups - 1) * stride + n
    return np.lib.stride_tricks.as_strided(array, (total, d), (row, size), writeable=False), stride


class KeyStore:
    """Keys [G, n, d] of G key/value heads: a view of the caller's memory, or the index's own growable copy.

    `rows` is two-dimensional and contiguous; key `i` of group `g` is row `g * stride + i`.
    """

    def __init__(self, keys: Vectors, *, checked: bool = False) -> None:
        """Read `keys`; they are known to be finite where `checked`."""
        self.owned = False
        self._capacity: Array
        self._attach(keys, checked=int(keys.shape[1]) if checked else 0)

    groups: int
    n: int
    d: int

    def _attach(self, keys: Vectors, checked: int) -> None:
        array, self.dtype = as_bits(keys, "keys")
        groups, n, d = array.shape
        if groups == 0 or d == 0:
            raise KVBenchError(f"keys have shape {array.shape}; give at least one head and one dimension.")
        found = rows_in_place(array)
        if found is None:
            array = np.ascontiguousarray(array)
            found = rows_in_place(array)
            assert found is not None
        self.array = array
        self.rows, self.stride = found
        self.groups, self.n, self.d = groups, n, d
        bad = find_beyond(self.rows, self.stride, groups, checked, n, _LARGEST[self.dtype])
        if bad >= 0:
            raise KVBenchError(
                f"key {bad % n} of head {bad // n} is NaN or infinite, or beyond {BEYOND:g}, whose square overflows; "
                "an index needs finite vectors."
            )

    def move(self, keys: Vectors) -> None:
        """Read the same keys at another place, `keys` [G, n, d], from now on."""
        array, dtype = as_bits(keys, "keys")
        assert (array.shape, dtype) == ((self.groups, self.n, self.d), self.dtype), "these are other keys"
        self._attach(keys, checked=self.n)
        self.owned = False

    def append(self, keys: Vectors, storage: Vectors | None) -> None:
        """Append keys [G, m, d]: read from `storage` [G, n + m, d] where given, else copied to memory of our own."""
        new, dtype = as_bits(keys, "keys")
        groups, m, d = new.shape
        if (groups, d, dtype) != (self.groups, self.d, self.dtype):
            raise KVBenchError(
                f"inserted keys are {dtype} with {groups} heads of dimension {d}; "
                f"the index holds {self.dtype} with {self.groups} heads of dimension {self.d}."
            )
        first = self.n
        if storage is not None:
            whole, storage_dtype = as_bits(storage, "storage")
            if whole.shape != (groups, first + m, d) or storage_dtype != dtype:
                raise KVBenchError(
                    f"storage is {storage_dtype} {whole.shape}; give {dtype} {(groups, first + m, d)}, all keys so far."
                )
            before = (self.array, self.rows, self.stride, self.n)
            try:
                self._attach(storage, checked=first)
            except KVBenchError:
                self.array, self.rows, self.stride, self.n = before
                raise
            self.owned = False
            return
        addition = KeyStore(keys)
        if not self.owned or first + m > self._capacity.shape[1]:
            capacity = max(16, 2 * first, first + m)
            grown = np.empty((groups, capacity, d), dtype=self.array.dtype)
            grown[:, :first] = self.array
            self._capacity = grown
            self.owned = True
        self._capacity[:, first : first + m] = addition.array
        self.array = self._capacity[:, : first + m]
        self.stride = self._capacity.shape[1]
        self.rows = self._capacity.reshape(-1, d)
        self.n = first + m

    def pick(self, group: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Keys of one group as float32, a copy: [q, c, d] for `ids` [q, c]."""
        found = self.array[group][ids]
        return found if self.dtype == "float32" else decode(found)

    def float32(self, group: int, first: int = 0, end: int | None = None) -> NDArray[np.float32]:
        """Keys from `first` to `end` of one group as float32: a view where they are float32 already."""
        part = self.array[group, first:end]
        return np.ascontiguousarray(part) if self.dtype == "float32" else decode(np.ascontiguousarray(part))


def from_bits(array: Array, dtype: str) -> Vectors:
    """The inverse of `as_bits`; ValueError if the stored array does not fit the dtype's name."""
    if dtype not in _BITS or array.dtype != _BITS[dtype]:
        raise ValueError(dtype)
    if dtype == "bfloat16":
        return torch.from_numpy(array).view(torch.bfloat16)
    return array.view(np.float16) if dtype == "float16" else array
