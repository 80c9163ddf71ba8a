"""Counts what a decoding step of a tiny model asks of the device: tensor operations, and waits for their results.

One operation is one that reaches the dispatcher, or one call of a kernel of `kvbench.kernels`, which is one launch on a
GPU. A synchronisation is what makes the host wait for a GPU: a tensor's number asked for (`item`, `tolist`, `bool`), a
copy to the host (`cpu`, `numpy`), and shapes that depend on values (`nonzero`, indexing by truth values, ...).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from tiny import fitted_options, small_options, tiny_model, tokens
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kvbench
from kvbench.contract.budget import Budget
from kvbench.engine import fixed
from kvbench.engine.fixed import FixedDecoder
from kvbench.kernels.support import observing
from kvbench.plugins import registry

PROMPT, STEPS, BUDGET = 120, 32, 40
LAYERS = 2, 4
"""Of the two models whose difference says what a layer takes."""
_WAITS = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "equal", "_unique2", "unique_dim",
    "unique_consecutive", "is_nonzero",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_TO_THE_HOST = {"cpu", "tolist", "numpy", "__array__"}


class Counter(TorchDispatchMode):
    """Counts operations and synchronisations while it is entered through `counting`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.synchronisations = 0
        self._hidden = 0

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Count the block as one operation."""
        self.operations += not self._hidden
        with self.hidden():
            yield

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Count nothing of the block."""
        self._hidden += 1
        try:
            yield
        finally:
            self._hidden -= 1

    def wait(self) -> None:
        """Count a synchronisation."""
        self.synchronisations += not self._hidden

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._hidden:
            self.operations += 1
            name = func.overloadpacket.__name__
            sized = "Tensor" not in func._overloadname or (kwargs or {}).get("output_size") is not None
            waits = name in _WAITS or (name in _INDEXING and _by_truth(args[1]))
            self.synchronisations += waits or (name == "repeat_interleave" and not sized)
        return func(*args, **(kwargs or {}))


class _ToTheHost(TorchFunctionMode):
    """Sees what a CPU's tensors do without the dispatcher."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _TO_THE_HOST and isinstance(args[0] if args else None, Tensor):
            self._counter.wait()
            with self._counter.hidden():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _by_truth(indices: Any) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in pytree.tree_leaves(indices))


@contextmanager
def counting() -> Iterator[Counter]:
    """Count what the block does."""
    counter = Counter()
    with ExitStack() as stack:
        waits = patch.object(fixed, "wait", lambda event: counter.wait())
        for context in (observing(counter.one), _ToTheHost(counter), waits, counter):
            stack.enter_context(context)
        yield counter


class Count(NamedTuple):
    """Operations of one more layer, those that a step takes apart from its layers, and waits per layer and step."""

    a_layer: float
    a_step: float
    synchronisations: float
    mode: str = "eager"

    def beyond(self, other: Count) -> dict[str, Any]:
        """The difference in operations, rounded, as a row of the table."""
        return {
            "mode": self.mode, "a_layer": round(self.a_layer - other.a_layer, 2),
            "a_step": round(self.a_step - other.a_step, 2), "synchronisations": round(self.synchronisations, 3),
        }  # fmt: skip


def plain() -> Count:
    """What plain transformers takes, the next token's choice included."""
    return _count([_plain(layers) for layers in LAYERS])


def measured(name: str) -> Count:
    """What a policy takes: in its fixed steps where it has them, hook by hook otherwise."""
    return _count([_measured(name, layers) for layers in LAYERS])


@torch.inference_mode()
def _plain(layers: int) -> tuple[str, Counter]:
    model = tiny_model(num_hidden_layers=layers)
    out = model(tokens(1, PROMPT), use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    with counting() as counter:
        for _ in range(STEPS):
            out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
    return "eager", counter


@torch.inference_mode()
def _measured(name: str, layers: int) -> tuple[str, Counter]:
    model, policy = tiny_model(num_hidden_layers=layers), registry().find("policy", name)
    budget = Budget(tokens=BUDGET) if policy.takes_budget else None
    options = small_options(policy) | fitted_options(name, model)
    with kvbench.attach(model, policy=name, budget=budget, options=options) as session:
        out = model(tokens(1, PROMPT), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        decoder = session.fixed(token[:, 0], STEPS, graph=False)
        if isinstance(decoder, FixedDecoder):
            with counting() as counter:
                for _ in range(STEPS):
                    decoder.step()
            return decoder.mode, counter
        with counting() as counter:
            for _ in range(STEPS):
                out = model(token, past_key_values=session.cache, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
    return "eager", counter


def _count(found: list[tuple[str, Counter]]) -> Count:
    (_, few), (mode, many) = found
    a_layer = (many.operations - few.operations) / (LAYERS[1] - LAYERS[0])
    a_step = many.operations - LAYERS[1] * a_layer
    return Count(a_layer / STEPS, a_step / STEPS, many.synchronisations / (LAYERS[1] * STEPS), mode)


_COPIES = {
    "cat", "stack", "clone", "copy_", "_to_copy", "gather", "index", "index_select", "index_put_", "_index_put_impl_",
    "scatter", "scatter_", "masked_scatter_", "contiguous", "repeat", "constant_pad_nd", "roll", "index_copy_",
}  # fmt: skip


class Copies(TorchDispatchMode):
    """Counts the bytes that copying operations write to tensors [.., d] of floating numbers."""

    def __init__(self, dim: int, least: int) -> None:
        super().__init__()
        self.bytes, self._dim, self._least = 0, dim, least

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _COPIES and isinstance(found, Tensor) and found.is_floating_point():
            # in place only what is put there is written
            written = args[-1] if name.endswith("_") and isinstance(args[-1], Tensor) else found
            fits = written.dim() and written.shape[-1] == self._dim and written.numel() >= self._least
            self.bytes += written.nbytes if fits else 0
        return found


@contextmanager
def copying(dim: int = 8, least: int = 0) -> Iterator[Copies]:
    """Count the bytes of keys and values, of `dim` channels, that the block copies."""
    counter = Copies(dim, least)
    with counter:
        yield counter
