"""The prompt's attention in a policy's hands (`attend_prompt`), where it has the hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import PromptView
from kvbench.engine.validation import named, told

if TYPE_CHECKING:
    from kvbench.engine.cached_layer import PolicyCacheLayer


def prompt_attention(
    cached: PolicyCacheLayer, module: nn.Module, queries: Tensor, scaling: float, exact: Callable[[], Tensor]
) -> Tensor:
    """Attention of a part of the prompt, output [B, m, H, d], for `queries` [B, H, m, d] of its newest tokens.

    `exact` gives the model's own, which stands where the hook leaves it.
    """
    assert cached.prompt is not None
    cache, governor = cached.cache, cached.session
    keys, values = cached.decode(*cached.prompt.raw)
    new, before = queries.shape[2], keys.shape[2] - queries.shape[2]
    output: Tensor | None = None
    found: list[tuple[slice | Tensor, int, Tensor]] = []
    for lane in cache.lanes:
        padding = max(lane.padding - before, 0)
        rows = slice(None) if lane.rows is None else lane.rows.to(queries.device)
        mine = lane.take(queries)[:, :, padding:]
        answer = None
        if padding < new:
            key = None if lane.rows is None else tuple(lane.rows.tolist())
            view = PromptView(
                ordinal=cached.ordinal, count=len(cache.governed), number=cached.number, heads=queries.shape[1],
                kv_heads=keys.shape[1], head_dim=keys.shape[3], scaling=scaling, rows=mine.shape[0], module=module,
                state=cached.prompt_states.setdefault(key, {}),
            )  # fmt: skip
            answer = governor.call(
                "attend_prompt", layer=view, queries=mine, keys=lane.take(keys, padded=True),
                values=lane.take(values, padded=True),
            )  # fmt: skip
        if answer is None:
            output = exact() if output is None else output
            continue
        shape = [*mine.shape[:3], values.shape[3]]
        if not isinstance(answer, Tensor) or list(answer.shape) != shape:
            raise KVBenchError(
                f"{named(governor.policy)} at layer {cached.number}: attend_prompt gave {told(answer)}; expected a "
                f"tensor {shape}, or None for exact attention."
            )
        found.append((rows, padding, answer.transpose(1, 2)))
    if output is None:
        output = queries.new_zeros(queries.shape[0], new, queries.shape[1], values.shape[3])
    for rows, padding, answer in found:
        output[rows, padding:] = answer.to(output.dtype)
    return output
