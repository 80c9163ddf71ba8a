"""The residual stream around a model's attention layers, through PyTorch's forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from kvbench.contract.errors import KVBenchError

Seen = Callable[[int, Tensor, Tensor], None]
"""Is given a layer's place in the model, and the hidden states [B, m, D] before and after its attention."""


def watch_residual(model: nn.Module, numbers: Sequence[int], seen: Seen) -> list[Any]:
    """Call `seen` in every forward pass, for each of the layers `numbers`; returns the hooks' handles.

    The stream after attention is the input of the decoder layer plus the attention's output, where that passes through
    further modules of the layer (a norm, a dropout) plus theirs. Raises KVBenchError for a model whose attention
    modules do not say which layer they belong to.
    """
    found: dict[int, list[tuple[nn.Module, nn.Module]]] = {}
    for name, module in model.named_modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and "Attention" in type(module).__name__ and "." in name:
            found.setdefault(number, []).append((model.get_submodule(name.rpartition(".")[0]), module))
    handles: list[Any] = []
    for number in numbers:
        if len(found.get(number, ())) != 1:
            raise KVBenchError(
                f"{type(model).__name__} has {len(found.get(number, ()))} attention modules for layer {number}, so "
                "its hidden states cannot be told apart: choose a budget that does not look at them."
            )
        layer, attention = found[number][0]
        handles += _Watch(number, layer, attention, seen).handles
    return handles


class _Watch:
    """The hooks of one decoder layer."""

    def __init__(self, number: int, layer: nn.Module, attention: nn.Module, seen: Seen) -> None:
        self._number, self._seen = number, seen
        self._before: Tensor | None = None
        self._added: Tensor | None = None
        others = [child for child in layer.children() if child is not attention]
        self.handles: list[Any] = [
            layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            attention.register_forward_hook(self._attended),
            *(child.register_forward_hook(self._passed) for child in others),
            layer.register_forward_hook(self._leave),
        ]

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._before, self._added = args[0] if args else kwargs["hidden_states"], None

    def _attended(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._added = output[0] if isinstance(output, tuple) else output

    def _passed(self, child: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._added is not None and args and args[0] is self._added and isinstance(output, Tensor):
            self._added = output

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        before, added, self._before, self._added = self._before, self._added, None, None
        if before is not None and added is not None:
            before = before.to(added.device)  # a layer on another device is given what the layer before it had
            self._seen(self._number, before, before + added)
