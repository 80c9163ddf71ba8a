"""Counts what a decoding step of a tiny model asks of the device: tensor operations, and waits for their results.

One operation is one that reaches the dispatcher, or one call of a kernel of `kvbench.kernels`, which is one launch on a
GPU. A synchronisation is what makes the host wait for a GPU: a tensor's number asked for (`item`, `tolist`, `bool`), a
copy to the host (`cpu`, `numpy`), and shapes that depend on values (`nonzero`, indexing by truth values, ...).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from tiny import small_options, tiny_model, tokens
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kvbench
from kvbench.contract.budget import Budget
from kvbench.engine.fixed import FixedDecoder
from kvbench.kernels.support import observing
from kvbench.plugins import registry

PROMPT, STEPS, BUDGET = 120, 40, 40
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
        for context in (observing(counter.one), _ToTheHost(counter), counter):
            stack.enter_context(context)
        yield counter


@torch.inference_mode()
def plain() -> tuple[float, float]:
    """Operations and synchronisations per layer and step of plain transformers, the next token's choice included."""
    model = tiny_model()
    out = model(tokens(1, PROMPT), use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    with counting() as counter:
        for _ in range(STEPS):
            out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
    return _each(counter, model)


@torch.inference_mode()
def measured(name: str) -> tuple[str, float, float]:
    """Mode, operations and synchronisations per layer and step of a policy: its fixed steps where it has them."""
    model, policy = tiny_model(), registry().find("policy", name)
    budget = Budget(tokens=BUDGET) if policy.takes_budget else None
    with kvbench.attach(model, policy=name, budget=budget, options=small_options(policy)) as session:
        out = model(tokens(1, PROMPT), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        decoder = session.fixed(token[:, 0], STEPS, graph=False)
        if isinstance(decoder, FixedDecoder):
            with counting() as counter:
                for _ in range(STEPS):
                    decoder.step()
            return (decoder.mode, *_each(counter, model))
        with counting() as counter:
            for _ in range(STEPS):
                out = model(token, past_key_values=session.cache, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
    return ("eager", *_each(counter, model))


def _each(counter: Counter, model: Any) -> tuple[float, float]:
    steps = STEPS * model.config.num_hidden_layers
    return round(counter.operations / steps, 3), round(counter.synchronisations / steps, 3)
