"""Tensors as pieces of memory: what is saved of them, named by views, and laid out again as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbench.contract.host import host_empty


@dataclass(frozen=True)
class View:
    """A tensor that is to be saved, and where it lies."""

    place: str
    tensor: Tensor

    @property
    def span(self) -> int:
        """Bytes from its first to its last number."""
        if not self.tensor.numel():
            return 0
        extent = sum((size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        return (extent + 1) * self.tensor.element_size()

    @property
    def start(self) -> int:
        """The address of its first number."""
        return self.tensor.data_ptr()

    @property
    def stop(self) -> int:
        """The address after its last number."""
        return self.start + self.span

    @property
    def form(self) -> tuple[Any, ...]:
        """The same for two views of the same numbers."""
        return self.start, self.tensor.dtype, self.tensor.shape, self.tensor.stride()


def pack(views: Sequence[View]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The contiguous tensors, on the host, to be saved for views, by name; and for each view where it is in which.

    What several views share is saved once; a view alone, without the gaps of its memory, in the same order of strides.
    """
    tensors: dict[str, Tensor] = {}
    places: list[dict[str, Any]] = [{} for _ in views]
    for numbers in _groups(views):
        first = views[numbers[0]]
        name = _name(first.place, tensors)
        if len({views[number].form for number in numbers}) == 1:
            tensors[name], strides = compact(first.tensor)
            offsets = dict.fromkeys(numbers, 0)
            found = dict.fromkeys(numbers, strides)
        else:
            start = min(views[number].start for number in numbers)
            tensors[name] = _memory([views[number] for number in numbers], start)
            offsets = {number: views[number].start - start for number in numbers}
            found = {number: list(views[number].tensor.stride()) for number in numbers}
        for number in numbers:
            tensor = views[number].tensor
            places[number] = {
                "tensor": name, "offset": offsets[number], "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape), "strides": found[number],
            }  # fmt: skip
    return tensors, places


def _groups(views: Sequence[View]) -> list[list[int]]:
    """The numbers of views whose memory overlaps."""
    order = sorted(range(len(views)), key=lambda number: (str(views[number].tensor.device), views[number].start))
    groups: list[list[int]] = []
    stop, device = 0, None
    for number in order:
        view = views[number]
        if groups and view.span and view.start < stop and view.tensor.device == device:
            groups[-1].append(number)
            stop = max(stop, view.stop)
        else:
            groups.append([number])
            stop, device = view.stop, view.tensor.device
    return groups


def _memory(views: Sequence[View], start: int) -> Tensor:
    """All the memory of overlapping views, as numbers where they agree in their type, else as bytes."""
    stop = max(view.stop for view in views)
    for view in views:
        storage = view.tensor.untyped_storage()
        if storage.data_ptr() <= start and stop <= storage.data_ptr() + storage.nbytes():
            break
    else:
        raise ValueError("memory that belongs to several allocations")
    whole = torch.empty(0, dtype=torch.uint8, device=view.tensor.device).set_(
        storage, start - storage.data_ptr(), (stop - start,), (1,)
    )
    held = whole.cpu()
    if held.data_ptr() == whole.data_ptr():
        held = held.clone()
    dtypes = {view.tensor.dtype for view in views}
    size = view.tensor.element_size()
    return held.view(dtypes.pop()) if len(dtypes) == 1 and not held.numel() % size else held


def compact(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """A tensor's numbers without gaps or repetitions, on the host, and the strides that lay them out as they were."""
    shape, old = tensor.shape, tensor.stride()
    once = [dim for dim in range(tensor.dim()) if old[dim] == 0 and shape[dim] > 1]
    for dim in once:
        tensor = tensor.narrow(dim, 0, 1)
    order = sorted(range(tensor.dim()), key=lambda dim: -old[dim])
    moved = tensor.permute(order).cpu().contiguous()
    strides = [0] * len(order)
    for place, dim in enumerate(order):
        strides[dim] = 0 if dim in once else moved.stride(place)
    return moved, strides


def _name(place: str, taken: Mapping[str, Any]) -> str:
    plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in place)[-160:]
    return plain if plain not in taken else next(f"{plain}~{n}" for n in range(1, 2**31) if f"{plain}~{n}" not in taken)


class Views:
    """Tensors laid out again: views of what was read from a file, which they share where they shared memory."""

    def __init__(self, tensors: Mapping[str, Tensor], places: Sequence[Mapping[str, Any]]) -> None:
        """`tensors` are the caller's no more: they become the state's memory."""
        self._tensors, self._places = tensors, places
        self._placed: dict[str, Tensor] = {}

    def tensor(self, number: int, place: str, device: torch.device) -> Tensor:
        """View `number`, at a place that `place_of` named; ValueError or KeyError where it is not inside its tensor."""
        if not 0 <= number < len(self._places):
            raise ValueError("a view is missing")
        view = self._places[number]
        memory = self._memory(str(view["tensor"]), place, device)
        dtype = getattr(torch, str(view["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{view['dtype']!r} is no type of numbers")
        shape, strides, offset = ([*map(int, view["shape"])], [*map(int, view["strides"])], int(view["offset"]))
        if len(shape) != len(strides) or min([offset, *shape, *strides]) < 0:
            raise ValueError("a view's shape is not one")
        size = dtype.itemsize
        last = sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True)) if 0 not in shape else -1
        if offset % size or offset + (last + 1) * size > memory.numel():
            raise ValueError("a view is larger than its tensor")
        numbers = memory[: memory.numel() // size * size].view(dtype)
        return numbers.as_strided(shape, strides, numbers.storage_offset() + offset // size)

    def _memory(self, name: str, place: str, device: torch.device) -> Tensor:
        """A saved tensor's bytes where they shall lie."""
        if name not in self._placed:
            held = self._tensors[name].flatten()
            held = held.view(torch.uint8) if held.numel() else torch.empty(0, dtype=torch.uint8)
            if place == "pinned":
                pinned = host_empty(held.shape, held.dtype, device)
                pinned.copy_(held)
                held = pinned
            elif place != "host":
                held = held.to(device_of(place, device))
            self._placed[name] = held
        return self._placed[name]


def place_of(tensor: Tensor, device: torch.device) -> str:
    """Where a tensor of a layer on `device` lies, for a file: `device`, `host`, `pinned`, or another GPU's name."""
    return "pinned" if tensor.device.type == "cpu" and tensor.is_pinned() else str(device_of(tensor.device, device))


def device_of(found: torch.device | str, device: torch.device) -> Any:
    """A device as a file names it for a layer on `device`, and back."""
    if isinstance(found, str):
        return device if found == "device" else torch.device("cpu" if found == "host" else found)
    if found == device:
        return "device"
    return "host" if found.type == "cpu" else str(found)
