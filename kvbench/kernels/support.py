"""What all kernels share: the choice between Triton and torch, checks of tensors, and sizes of tiles and grids."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError

try:
    import triton
except ImportError:  # the torch twins remain
    triton = None

Implementation = Literal["auto", "triton", "torch"]
Observer = Callable[[str], AbstractContextManager[None]]
_chosen: list[Implementation] = ["auto"]
_observers: list[Observer] = []
_P = ParamSpec("_P")
_R = TypeVar("_R")


def kernel(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Mark an entry point: one operation for `observing`, whatever its torch twin is made of."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not _observers:
            return function(*args, **kwargs)
        observer = _observers.pop()  # entry points that it calls are part of it
        try:
            with observer(function.__name__):
                return function(*args, **kwargs)
        finally:
            _observers.append(observer)

    return call


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Enter `observer(name)` around each outermost call of a kernel's entry point in the block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.pop()


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function with Triton at its first launch; without Triton nothing ever launches it."""
    return function if triton is None else triton.jit(function)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, as TRITON_INTERPRET=1 asks before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@contextmanager
def using(implementation: Implementation) -> Iterator[None]:
    """Run kernels in the block as `triton` or as their `torch` twins; `auto` takes Triton for queries on a GPU."""
    _chosen.append(implementation)
    try:
        yield
    finally:
        _chosen.pop()


def compiled(tensor: Tensor) -> bool:
    """Whether a kernel launched for `tensor` is Triton's.

    Raises KVBenchError where Triton was asked for and can't run.
    """
    chosen = _chosen[-1]
    if chosen == "torch" or (chosen == "auto" and not tensor.is_cuda):
        return False
    if triton is None:
        if chosen == "triton":
            raise KVBenchError("Triton's kernels were asked for, but triton is not installed: pip install triton.")
        _warn_without_triton()
        return False
    if not tensor.is_cuda and not interpreting():
        raise KVBenchError(
            f"Triton's kernels need tensors on a GPU, not on {tensor.device}, "
            "unless TRITON_INTERPRET=1 is set before Triton is imported."
        )
    return True


@cache
def _warn_without_triton() -> None:
    warnings.warn("triton is not installed, so kernels run as slower chains of torch operations", stacklevel=3)


@contextmanager
def device_of(tensor: Tensor) -> Iterator[None]:
    """Launch on the GPU of `tensor`."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def split_count(device: torch.device, programs: int, blocks: int) -> int:
    """Into how many parts `programs` rows of at most `blocks` tiles are split, so that few rows fill the GPU."""
    if device.type != "cuda":
        return min(3, max(blocks, 1))
    return max(1, min(-(-4 * _multiprocessors(device) // programs), -(-blocks // 2), 128))


def tile(row_bytes: int, gathered: bool, in_float32: bool) -> tuple[int, int, int]:
    """Tokens in a tile, warps and pipeline stages for keys and values of `row_bytes` a token, within shared memory."""
    if in_float32:  # no matrix unit: larger tiles a warp spill registers
        return 32 if row_bytes <= 1024 else 16, 8, 2
    tokens = 32 if gathered or row_bytes > 1024 else 64
    return tokens, 4, min(4, max(2, 100_000 // (tokens * row_bytes)))


def dots_in_float32(queries: Tensor, *others: Tensor) -> bool:
    """Whether products are computed in float32: float32 queries, or rows of another type that are not uint8 codes.

    On the CPU also wherever they would be computed in bfloat16, which Triton's interpreter does wrong.
    """
    coded = any(other.dtype == torch.uint8 for other in others)
    mixed = any(other.dtype not in (queries.dtype, torch.uint8) for other in others)
    brain = (queries.dtype == torch.bfloat16 or coded) and not queries.is_cuda
    return queries.dtype == torch.float32 or mixed or brain


def per_group(numbers: Tensor, batch: int, groups: int, what: str) -> Tensor:
    """Device integers [B] or [B, G] as [B, G], with no copy."""
    if tuple(numbers.shape) not in ((batch,), (batch, groups)):
        raise KVBenchError(f"{what} {list(numbers.shape)} fit neither [{batch}] nor [{batch}, {groups}].")
    if numbers.dtype not in (torch.int32, torch.int64):
        raise KVBenchError(f"{what} are {numbers.dtype}, not torch.int32.")
    return (numbers if numbers.dim() == 2 else numbers[:, None]).expand(batch, groups)


def check_rows(what: str, rows: Tensor, batch: int, groups: int, dim: int | None = None) -> None:
    """Raise KVBenchError unless `rows` is [B, G, t, d] with d contiguous."""
    shape = tuple(rows.shape)
    if len(shape) != 4 or shape[:2] != (batch, groups) or (dim is not None and shape[3] != dim):
        raise KVBenchError(f"{what} {list(shape)} are not [{batch}, {groups}, t, {dim or 'd'}].")
    if rows.stride(3) != 1 and shape[3] > 1:
        raise KVBenchError(f"{what} have strides {list(rows.stride())}: the last dimension must be contiguous.")


def check_grouped(queries: Tensor, groups: int) -> tuple[int, int, int]:
    """Batch, heads and head dimension of `queries` [B, H, 1, d]; KVBenchError unless H is a multiple of `groups`."""
    if queries.dim() != 4 or queries.shape[2] != 1 or queries.shape[1] % groups:
        raise KVBenchError(f"queries {list(queries.shape)} are not [B, H, 1, d] with H a multiple of {groups}.")
    if queries.stride(3) != 1 and queries.shape[3] > 1:
        raise KVBenchError(f"queries have strides {list(queries.stride())}: the last dimension must be contiguous.")
    return queries.shape[0], queries.shape[1], queries.shape[3]


def empty_or(given: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The preallocated tensor that was given, checked, or a new one."""
    if given is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if tuple(given.shape) != shape or given.device != device or not given.is_contiguous():
        raise KVBenchError(
            f"the preallocated {list(given.shape)} on {given.device} is not a contiguous {list(shape)} on {device}."
        )
    return given
