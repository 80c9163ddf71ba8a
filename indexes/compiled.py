"""What all compiled kernels share: the compiler, and the reading of rows of vectors.

Rows are float32, the bits of float16 (uint16) or of bfloat16 (int16), or SQ8 codes (uint8); `widen` reads one number.
Every kernel gives the same result for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from kvbench.indexes.compiled_cache import kernel_cache

P = ParamSpec("P")
R = TypeVar("R")
Rows = NDArray[Any]
Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

# Sums may be reordered and fused (SIMD needs it); infinities and NaN keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function that holds no lock and is cached on disk until a file in its folder changes."""
    compiled = numba.njit(nogil=True, fastmath=_FAST, error_model="numpy")(function)
    compiled._cache = kernel_cache(function)
    return cast(Callable[P, R], compiled)


def widen(bits: Any) -> Any:
    """One stored number as float32."""
    raise NotImplementedError


@overload(widen, inline="always")  # type: ignore[untyped-decorator]
def _widen(bits: Any) -> Any:
    # numba compares these signatures with the stub's, annotations included.
    if bits == types.float32:

        def read(bits: Any) -> Any:
            return bits

    elif bits == types.uint8:

        def read(bits: Any) -> Any:
            return np.float32(bits)

    elif bits == types.int16:

        def read(bits: Any) -> Any:
            return np.uint32(np.uint32(np.uint16(bits)) << np.uint32(16)).view(np.float32)

    elif bits == types.uint16:

        def read(bits: Any) -> Any:
            magnitude = np.uint32(np.uint32(bits & np.uint16(0x7FFF)) << np.uint32(13))
            sign = np.uint32(np.uint32(bits & np.uint16(0x8000)) << np.uint32(16))
            return np.uint32(magnitude | sign).view(np.float32) * np.float32(2.0**112)

    else:
        return None
    return read


@intrinsic  # type: ignore[untyped-decorator]
def prefetch_row(context: Any, rows: Any, row: Any) -> Any:
    """Ask for the cache lines of a row before it is read."""
    signature = types.void(rows, row)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type, _ = signature.args
        array = context.make_array(array_type)(context, builder, arguments[0])
        word = ir.IntType(64)
        byte = ir.IntType(8).as_pointer()
        stride = builder.extract_value(array.strides, 0)
        start = builder.add(builder.ptrtoint(array.data, word), builder.mul(builder.sext(arguments[1], word), stride))
        void = ir.VoidType()
        integer = ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(void, [byte, integer, integer, integer])
        )
        for line in range(4):
            address = builder.inttoptr(builder.add(start, ir.Constant(word, 64 * line)), byte)
            builder.call(prefetch, [address, integer(0), integer(3), integer(1)])
        return context.get_dummy_value()

    return signature, codegen


@kernel
def inner(rows: Rows, row: int, query: Float32) -> np.float32:
    """Inner product of one row and a float32 query [d]."""
    total = np.float32(0)
    for j in range(query.shape[0]):
        total += widen(rows[row, j]) * query[j]
    return total


@kernel
def squared_distance(rows: Rows, first: int, second: int) -> np.float32:
    """Squared Euclidean distance of two rows."""
    total = np.float32(0)
    for j in range(rows.shape[1]):
        difference = widen(rows[first, j]) - widen(rows[second, j])
        total += difference * difference
    return total


@kernel
def decode(array: Rows) -> Float32:
    """Rows [h, n, d] of any stored format as float32."""
    out = np.empty(array.shape, np.float32)
    source, target = array.reshape(-1), out.reshape(-1)
    for i in range(source.shape[0]):
        target[i] = widen(source[i])
    return out


@kernel
def find_beyond(rows: Rows, stride: int, groups: int, first: int, n: int, limit: float) -> int:
    """Number (`group * n + key`) of the first key from `first` on with NaN or a magnitude above `limit`, or -1."""
    for group in range(groups):
        for i in range(first, n):
            beyond = 0
            for j in range(rows.shape[1]):
                beyond += not abs(widen(rows[group * stride + i, j])) <= limit
            if beyond:
                return group * n + i
    return -1


@kernel
def read_row(rows: Rows, row: int, out: Float32) -> None:
    """One row as float32 [d]."""
    for j in range(out.shape[0]):
        out[j] = widen(rows[row, j])


@kernel
def half_squares(rows: Rows, base: int, n: int) -> Float32:
    """Half the squared norm of each of n rows."""
    half_norms = np.empty(n, np.float32)
    row = np.empty(rows.shape[1], np.float32)
    for node in range(n):
        read_row(rows, base + node, row)
        norm = np.float32(0)
        for j in range(row.shape[0]):
            norm += row[j] * row[j]
        half_norms[node] = norm / np.float32(2)
    return half_norms


@kernel
def quantize_rows(rows: Float32, low: Float32, scale: Float32) -> NDArray[np.uint8]:
    """Rows [n, d] as 8-bit steps of `scale` [d] above `low` [d], clipped."""
    codes = np.empty(rows.shape, np.uint8)
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            step = np.rint((rows[i, j] - low[j]) / scale[j])
            codes[i, j] = np.uint8(min(max(step, 0.0), 255.0))
    return codes
