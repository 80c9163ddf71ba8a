"""The attention function that kvbench registers with transformers, and how it finds the model that it is called for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvbench.contract.errors import KVBenchError

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class AttentionName(str):
    """A name of an attention implementation under which transformers finds kvbench's function.

    It equals the name of the model's own implementation, since some models choose their way by it (`if
    config._attn_implementation in ("eager", "sdpa")`); transformers finds functions in a dictionary, where the hash
    decides.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(("kvbench", str(self)))


class Answers(Protocol):
    """Whoever answers a model's calls of its attention function."""

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The output [B, m, H, d] and the weights, for queries [B, H, m, d], keys and values [B, G, n, d]."""


_ANSWERS: dict[int, Answers] = {}
"""Who answers, by the identity of the text configuration that the attention modules of a model share."""

_capturing = False


class Captured(Exception):  # noqa: N818  no error: it leaves an attention module once its vectors are known
    """The queries, keys and values that an attention module handed to the attention function."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value


def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """What `module` hands to the attention function when it is called; the attention itself is not computed."""
    global _capturing  # noqa: PLW0603
    _capturing = True
    try:
        module(*args, **kwargs)
    except Captured as found:
        return found
    finally:
        _capturing = False
    raise AssertionError("an attention module that came through the attention interface left it")


def capturing() -> bool:
    """Whether an attention module is being called for its vectors alone, by `capture`."""
    return _capturing


def attached(config: Any) -> bool:
    """Whether the model with this text configuration has a policy attached."""
    return id(config) in _ANSWERS


@contextmanager
def answering(config: Any, answers: Answers) -> Iterator[None]:
    """Let `answers` answer the attention calls of the modules that share `config`."""
    own = config._attn_implementation
    name = AttentionName(own)
    AttentionInterface.register(name, _attention)
    if own in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    _ANSWERS[id(config)] = answers
    config._attn_implementation = {"": name}
    try:
        yield
    finally:
        config._attn_implementation = {"": own}
        del _ANSWERS[id(config)]


def own_attention(module: nn.Module, implementation: str) -> AttentionFunction:
    """The attention function that the model itself would call under `implementation`."""
    source = sys.modules[type(module).__module__]
    functions = getattr(source, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    function: AttentionFunction = functions.get_interface(
        str(implementation), getattr(source, "eager_attention_forward", None)
    )
    return function


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if _capturing:
        raise Captured(query, key, value)
    answers = _ANSWERS.get(id(getattr(module, "config", None)))
    if answers is None:
        raise KVBenchError(
            f"{type(module).__name__} has its own configuration object, so its attention cannot be matched to the "
            "attached model: use an architecture whose layers share the model's configuration."
        )
    return answers.attention(module, query, key, value, attention_mask, **kwargs)
