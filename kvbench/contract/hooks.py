"""Every pluggy hook of kvbench: what a plugin may register, and the `KVCachePolicy` contract.

Shapes: B batch rows, H query heads, G key/value heads (H a multiple of G), n tokens, d head dimension.
Queries and keys are after rotary embedding. Rows that a hook sees together have the same length: the session
calls the hooks once for each lane (rows of one length), so no policy ever meets padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvbench.contract.markers import hookspec

if TYPE_CHECKING:
    from torch import Tensor

    from kvbench.contract.attention import Attention
    from kvbench.contract.budget import BudgetAllocator, LayerBudget
    from kvbench.contract.extension import Extension
    from kvbench.contract.layer import Layer, PromptView
    from kvbench.contract.policy import KVCachePolicy, Replay
    from kvbench.contract.probe import Probe
    from kvbench.contract.selection import Selection
    from kvbench.contract.task import ForcedTask, Task


class Registration:
    """Called once, on the modules that the entry-point group `kvbench` names."""

    @hookspec
    def kvbench_policies(self, indexes: list[type[Extension]]) -> list[type[KVCachePolicy]]:  # type: ignore[empty-body]
        """Return the policy classes of this plugin.

        `indexes` are the index classes of all plugins, for policies that are made from them; most plugins leave the
        argument out.
        """

    @hookspec
    def kvbench_budgets(self) -> list[type[BudgetAllocator]]:  # type: ignore[empty-body]
        """Return the budget allocator classes of this plugin."""

    @hookspec
    def kvbench_indexes(self) -> list[type[Extension]]:  # type: ignore[empty-body]
        """Return the vector index classes of this plugin."""

    @hookspec
    def kvbench_tasks(self) -> list[type[Task] | type[ForcedTask]]:  # type: ignore[empty-body]
        """Return the task classes of this plugin."""

    @hookspec
    def kvbench_probes(self) -> list[type[Probe]]:  # type: ignore[empty-body]
        """Return the probe classes of this plugin."""

    @hookspec
    def kvbench_analyses(self) -> list[type[Extension]]:  # type: ignore[empty-body]
        """Return the analysis classes of this plugin."""


class PolicyHooks:
    """Called by the session while the model runs; probes wrap these same hooks."""

    @hookspec(firstresult=True)
    def attend_prompt(self, layer: PromptView, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        """Compute the prompt's attention in a layer in place of the model's own, which is exact: output [B, H, m, d].

        `keys` and `values` [B, G, n, d] are the prompt's tokens so far, `queries` [B, H, m, d] those of the last m:
        all n, or with a prompt in chunks the chunk's. Query i belongs to token n - m + i and may see no later token.
        None leaves the attention exact. A policy with this hook reads every prompt itself: none is shared with others.
        """

    @hookspec
    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Take over the prompt, once per layer, after its attention.

        `queries` [B, H, m, d] are the last m of the prompt (`KVCachePolicy.query_window`; all by default), `keys`
        and `values` [B, G, n, d] the whole prompt, which `layer.store` already holds. The policy evicts
        (`layer.store.keep`), sets tokens aside (`layer.store.set_aside`) or builds its index.
        """

    @hookspec
    def after_prompt(self, layers: list[Layer], ids: Tensor, replay: Replay) -> None:
        """Take over the prompt of all layers at once, after its last forward call and every layer's `prefill`.

        `ids` [B, n] are the prompt's token ids. `replay(more_ids, observe)` runs further ids [B, m] through the model,
        after the stored prompt and without adding to it, and calls `observe(layer, queries, keys)` in each layer; only
        while nothing has been evicted or set aside. For choices across layers, and for extra passes (KVzip).
        """

    @hookspec(firstresult=True)
    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:  # type: ignore[empty-body]
        """Choose the set-aside tokens that each head attends to, for `queries` [B, H, 1, d], at each decoding step.

        With `KVCachePolicy.blocks` a call may bring m queries [B, H, m, d], those of the newest m tokens.

        The static set (all that was neither evicted nor set aside) is attended in any case and counts towards
        `budget`. The first plugin's answer wins; without one, only the static set is attended.
        """

    @hookspec(firstresult=True)
    def attend(self, layer: Layer, queries: Tensor, selection: Selection) -> Attention:  # type: ignore[empty-body]
        """Compute the attention of `queries` [B, H, 1, d], or m of them, over the static set and the selection.

        The first plugin's answer wins; the default (`kvbench.contract.attend.attend`) merges the partial attentions.
        """

    @hookspec
    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Take note of m new tokens, `keys` and `values` [B, G, m, d], which `layer.store` already holds.

        Called before the new tokens' own `select`. The policy evicts, sets older tokens aside or updates its index.
        """
