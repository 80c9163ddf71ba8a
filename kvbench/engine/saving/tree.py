"""What is saved, as a tree of plain data that names tensors: `Writer` makes it, `Reader` undoes it.

A node is None, a bool, a whole number, a finite float or a text, or an object whose `is` names its kind. Tensors that
share memory share it again after loading.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvbench.contract.saved import Saveable
from kvbench.engine.saving.memory import View, device_of, place_of

Node = Any


class Unsaveable(Exception):  # noqa: N818  becomes a sentence where the policy is known
    """A value that cannot be saved, and where it lies."""

    def __init__(self, place: str, value: Any, reason: str = "") -> None:
        kind = type(value)
        named = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        self.place, self.told = place, reason or f"an object of type {named}"
        super().__init__(f"{place}: {self.told}")


@dataclass(frozen=True)
class Surroundings:
    """What is not saved but named, since it belongs to the model or the session; `device` is the layer's."""

    device: torch.device
    named: Mapping[str, Any] = field(default_factory=dict)


class Writer:
    """Makes nodes of values and notes the tensors that they name, `views` in the order of their numbers."""

    def __init__(self) -> None:
        self.views: list[View] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []
        self._open: set[int] = set()

    def node(self, value: Any, place: str, around: Surroundings) -> Node:
        """The node of a value; `place` says where it lies. Raises Unsaveable."""
        if value is None or isinstance(value, bool | str):
            return value
        for name, held in around.named.items():
            if value is held and held is not None:
                return {"is": "named", "name": name}
            if inspect.ismethod(value) and value.__self__ is held:
                return {"is": "method", "of": name, "name": value.__name__}
        for kind, make in _KINDS:
            if isinstance(value, kind):
                return make(self, value, place, around)
        raise Unsaveable(place, value)

    def _int(self, value: int, place: str, around: Surroundings) -> Node:
        number = int(value)
        return number if -(2**63) <= number < 2**64 else {"is": "int", "of": str(number)}

    def _float(self, value: float, place: str, around: Surroundings) -> Node:
        return float(value) if math.isfinite(value) else {"is": "float", "of": str(float(value))}

    def _tensor(self, value: Tensor, place: str, around: Surroundings) -> Node:
        if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_complex():
            raise Unsaveable(place, value, f"a tensor of layout {value.layout}, dtype {value.dtype} on {value.device}")
        self.views.append(View(place, value.detach()))
        return {"is": "tensor", "view": len(self.views) - 1, "place": place_of(value, around.device)}

    def _array(self, value: Any, place: str, around: Surroundings) -> Node:
        array = np.asarray(value)
        if any(stride < 0 for stride in array.strides) or not array.flags.writeable or not array.dtype.isnative:
            array = np.array(array, order="C", dtype=array.dtype.newbyteorder("="))
        try:
            tensor = torch.from_numpy(array)
        except (TypeError, ValueError):
            raise Unsaveable(place, value, f"an array of dtype {array.dtype}") from None
        self._alive.append(array)
        self.views.append(View(place, tensor))
        kind = "scalar" if isinstance(value, np.generic) else "array"
        return {"is": kind, "view": len(self.views) - 1}

    def _tuple(self, value: tuple[Any, ...], place: str, around: Surroundings) -> Node:
        if type(value) is not tuple:  # a named tuple is a class of somebody's
            raise Unsaveable(place, value)
        return {"is": "tuple", "of": [self.node(part, f"{place}[{i}]", around) for i, part in enumerate(value)]}

    def _list(self, value: list[Any], place: str, around: Surroundings) -> Node:
        with self._once(value, place) as (node, new):
            if new:
                node |= {"is": "list", "of": [self.node(part, f"{place}[{i}]", around) for i, part in enumerate(value)]}
        return node

    def _dict(self, value: dict[Any, Any], place: str, around: Surroundings) -> Node:
        with self._once(value, place) as (node, new):
            if new:
                pairs = [
                    [self.node(key, f"a key of {place}", around), self.node(part, f"{place}[{key!r}]", around)]
                    for key, part in value.items()
                ]
                node |= {"is": "dict", "of": pairs}
        return node

    def _set(self, value: set[Any], place: str, around: Surroundings) -> Node:
        with self._once(value, place) as (node, new):
            if new:
                node |= {"is": "set", "of": [self.node(part, f"an element of {place}", around) for part in value]}
        return node

    def _object(self, value: Saveable, place: str, around: Surroundings) -> Node:
        with self._once(value, place) as (node, new):
            if new:
                parts = {name: self.node(part, f"{place}.{name}", around) for name, part in value.saved().items()}
                node |= {"is": "object", "class": class_name(type(value)), "parts": parts}
        return node

    def _class(self, value: type[Any], place: str, around: Surroundings) -> Node:
        if not issubclass(value, Saveable):
            raise Unsaveable(place, value, f"the class {value.__name__}")
        return {"is": "class", "name": class_name(value)}

    def _partial(self, value: partial[Any], place: str, around: Surroundings) -> Node:
        return {
            "is": "partial", "of": self.node(value.func, f"{place}.func", around),
            "args": [self.node(part, f"{place}.args[{i}]", around) for i, part in enumerate(value.args)],
            "keywords": {
                name: self.node(part, f"{place}.keywords[{name!r}]", around) for name, part in value.keywords.items()
            },
        }  # fmt: skip

    def _torch_generator(self, value: torch.Generator, place: str, around: Surroundings) -> Node:
        with self._once(value, place) as (node, new):
            if new:
                state = self.node(value.get_state(), place, around)
                on = "host" if value.device.type == "cpu" else "device"
                node |= {"is": "torch.Generator", "on": on, "state": state}
        return node

    def _numpy_generator(self, value: np.random.Generator, place: str, around: Surroundings) -> Node:
        with self._once(value, place) as (node, new):
            if new:
                node |= {"is": "numpy.Generator", "state": self.node(value.bit_generator.state, place, around)}
        return node

    def _random(self, value: random.Random, place: str, around: Surroundings) -> Node:
        if type(value) is not random.Random:
            raise Unsaveable(place, value)
        with self._once(value, place) as (node, new):
            if new:
                node |= {"is": "random.Random", "state": self.node(value.getstate(), place, around)}
        return node

    @contextmanager
    def _once(self, value: Any, place: str) -> Iterator[tuple[dict[str, Any], bool]]:
        """A node with a number, and whether it is the value's first: later ones only name that."""
        key = id(value)
        if key in self._open:
            raise Unsaveable(place, value, "an object that contains itself")
        if key in self._numbers:
            yield {"is": "same", "number": self._numbers[key]}, False
            return
        self._numbers[key] = len(self._numbers)
        self._alive.append(value)  # as long as this lives, so that no other object gets its id
        self._open.add(key)
        yield {"number": self._numbers[key]}, True
        self._open.discard(key)


_KINDS: tuple[tuple[Any, Any], ...] = (
    (Saveable, Writer._object),
    (np.ndarray | np.generic, Writer._array),
    (int, Writer._int),
    (float, Writer._float),
    (Tensor, Writer._tensor),
    (tuple, Writer._tuple),
    (list, Writer._list),
    (dict, Writer._dict),
    (set, Writer._set),
    (type, Writer._class),
    (partial, Writer._partial),
    (torch.dtype, lambda writer, value, place, around: {"is": "dtype", "of": str(value).removeprefix("torch.")}),
    (torch.device, lambda writer, value, place, around: {"is": "device", "of": device_of(value, around.device)}),
    (torch.Generator, Writer._torch_generator),
    (np.random.Generator, Writer._numpy_generator),
    (random.Random, Writer._random),
)


class Reader:
    """Makes values of nodes that `Writer` made; ValueError or KeyError for others."""

    def __init__(self, views: Any) -> None:
        """`views` gives the tensor of a number: `kvbench.engine.saving.memory.Views`."""
        self._views = views
        self._made: dict[int, Any] = {}

    def value(self, node: Node, around: Surroundings) -> Any:
        """The value of a node."""
        if node is None or isinstance(node, bool | int | float | str):
            return node
        kind = node["is"]
        if kind == "same":
            return self._made[node["number"]]
        found = self._of(kind, node, around)
        if "number" in node:
            self._made[int(node["number"])] = found
        return found

    def _of(self, kind: str, node: dict[str, Any], around: Surroundings) -> Any:
        match kind:
            case "int":
                return int(node["of"])
            case "float":
                return float(node["of"])
            case "tensor":
                return self._views.tensor(node["view"], node["place"], around.device)
            case "array":
                return self._views.tensor(node["view"], "host", around.device).numpy()
            case "scalar":
                return self._views.tensor(node["view"], "host", around.device).numpy()[()]
            case "tuple":
                return tuple(self.value(part, around) for part in node["of"])
            case "list":
                return [self.value(part, around) for part in node["of"]]
            case "set":
                return {self.value(part, around) for part in node["of"]}
            case "dict":
                return {self.value(key, around): self.value(part, around) for key, part in node["of"]}
            case "dtype":
                return _checked(getattr(torch, str(node["of"]), None), torch.dtype)
            case "device":
                return _checked(device_of(str(node["of"]), around.device), torch.device)
            case "named":
                return around.named[node["name"]]
            case "method":
                name = str(node["name"])
                method = getattr(around.named[node["of"]], name, None)
                if name.startswith("_") or not inspect.ismethod(method):
                    raise ValueError(f"there is no method {name}")
                return method
            case "object":
                parts = {str(name): self.value(part, around) for name, part in node["parts"].items()}
                return saveable_class(str(node["class"])).restored(parts)
            case "class":
                return saveable_class(str(node["name"]))
            case "partial":
                made = self.value(node["of"], around)
                if node["of"]["is"] not in ("class", "method"):
                    raise ValueError("a partial of something else than a class or a method")
                keywords = {str(name): self.value(part, around) for name, part in node["keywords"].items()}
                return partial(made, *(self.value(part, around) for part in node["args"]), **keywords)
            case "torch.Generator":
                generator = torch.Generator(device="cpu" if node["on"] == "host" else around.device)
                return generator.set_state(_checked(self.value(node["state"], around), Tensor))
            case "numpy.Generator":
                return _numpy_generator(self.value(node["state"], around))
            case "random.Random":
                drawn = random.Random()
                drawn.setstate(self.value(node["state"], around))
                return drawn
        raise ValueError(f"{kind!r} is no kind of value")


def _checked(value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected a {kind.__name__}")
    return value


def _numpy_generator(state: dict[str, Any]) -> np.random.Generator:
    kinds = {kind.__name__: kind for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937,
                                              np.random.Philox, np.random.SFC64)}  # fmt: skip
    bits: Any = kinds[state["bit_generator"]]()
    bits.state = state
    return np.random.Generator(bits)


def class_name(cls: type[Any]) -> str:
    """How a file names a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def saveable_class(name: str) -> type[Saveable]:
    """The class that a file names, among those that are imported already; ValueError where there is none."""
    waiting: list[type[Saveable]] = [Saveable]
    seen: set[type[Saveable]] = set()
    while waiting:
        cls = waiting.pop()
        if class_name(cls) == name:
            return cls
        fresh = [sub for sub in cls.__subclasses__() if sub not in seen]
        seen.update(fresh)
        waiting += fresh
    raise ValueError(f"there is no class {name} here that can be loaded")
