"""Devices that are not there: tensors of the CPU that say where they lie, and refuse company as CUDA's would."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

HOST = torch.device("cpu")
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


def place_of(tensor: Tensor) -> torch.device:
    """Where a tensor says that it lies."""
    return tensor.__dict__.get("place", HOST)


class FakeDevices(TorchFunctionMode):
    """While it is entered, CPU tensors may lie on `cuda:0`, `cuda:1`, ..., and never meet there.

    PyTorch's own rules: an operation's tensors lie on one device, but for tensors without dimensions that lie on the
    host, indices on the host, and what is copied (`copy_`, `x[a:b] = y`). NumPy reads from the host only.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return place_of(args[0])
        if func == Tensor.is_cuda.__get__:
            return place_of(args[0]).type == "cuda"
        if name in ("numpy", "__array__", "pin_memory") and place_of(args[0]) != HOST:
            raise TypeError(f"can't convert {place_of(args[0])} device type tensor to numpy")
        if name == "cpu":
            return self._moved(args[0], HOST, copy=False)
        if name == "to":
            return self._to(func, args, kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs["device"] = HOST
            place = torch.device(wanted)
        else:
            place = self._common(func, name, args, tensors)
        result = func(*args, **kwargs)
        if name in ("__setitem__", "copy_"):
            return result
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                leaf.__dict__["place"] = place
        return result

    def _common(self, func: Any, name: str, args: Any, tensors: list[Tensor]) -> torch.device:
        if func in _INDEXING:
            target, index = args[0], args[1]
            place, strict = place_of(target), False
            for leaf in pytree.tree_leaves(index, is_leaf=lambda leaf: isinstance(leaf, Tensor)):
                if isinstance(leaf, Tensor) and leaf.dim():
                    strict = True
                    if place_of(leaf) not in (place, HOST):
                        raise RuntimeError(f"indices on {place_of(leaf)} for a tensor on {place}")
            if (
                len(args) > 2
                and strict
                and isinstance(args[2], Tensor)
                and args[2].dim()
                and place_of(args[2]) != place
            ):
                raise RuntimeError(f"a value on {place_of(args[2])} is put into a tensor on {place}")
            return place
        if name == "copy_":
            return place_of(args[0])
        places = {place_of(tensor) for tensor in tensors if tensor.dim() or place_of(tensor) != HOST}
        if len(places) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} found {sorted(map(str, places))}"
            )
        return places.pop() if places else HOST

    def _to(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        tensor, rest = args[0], list(args[1:])
        place = place_of(tensor)
        for number, value in enumerate(rest):
            if isinstance(value, str | torch.device):
                place, rest[number] = torch.device(value), HOST
            elif isinstance(value, Tensor):
                place = place_of(value)
        if kwargs.get("device") is not None:
            place, kwargs["device"] = torch.device(kwargs["device"]), HOST
        result: Tensor = func(tensor, *rest, **kwargs)
        if result is tensor:
            return self._moved(tensor, place, copy=False)
        result.__dict__["place"] = place
        return result

    @staticmethod
    def _moved(tensor: Tensor, place: torch.device, *, copy: bool) -> Tensor:
        if place_of(tensor) == place and not copy:
            return tensor
        with torch._C.DisableTorchFunction():
            moved = tensor.clone()
        moved.__dict__["place"] = place
        return moved


def spread(model: Any, devices: dict[str, str]) -> None:
    """Lay the model's modules on devices, as accelerate's `dispatch_model` does: inputs follow their module.

    `devices` maps names of modules to devices; a module's weights and its parts' lie where it lies.
    """
    for name, device in devices.items():
        module, place = model.get_submodule(name), torch.device(device)
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.__dict__["place"] = place
        for part in module.modules():
            aligned = functools.partial(_aligned, part.forward, place)
            part.forward = functools.update_wrapper(aligned, part.forward)


def _aligned(forward: Any, place: torch.device, *args: Any, **kwargs: Any) -> Any:
    def move(leaf: Any) -> Any:
        return leaf.to(place) if isinstance(leaf, Tensor) else leaf

    return forward(*pytree.tree_map(move, args), **pytree.tree_map(move, kwargs))
