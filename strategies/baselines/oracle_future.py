"""A yardstick: keep what the true continuation will attend to, the upper bound of evicting from the prompt."""

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy, Replay


class OracleFuture(KVCachePolicy):
    """Keeps, per key/value head, the prompt's tokens with the largest attention of the continuation, in a second pass.

    What follows the prompt is known from the run (a question that passes through the policy, given tokens) or generated
    with exact attention, `future` tokens at most; their weights over prompt and continuation are summed over the
    group's query heads. No choice of as many tokens of the prompt for each head keeps more of the mass that these
    queries give it. Generated tokens are kept. It makes passes that no server could make: a bound, not a policy.
    """

    name = "oracle_future"
    summary = "Yardstick: keeps what the true continuation, generated first with exact attention, will attend to."
    query_window = 0
    grows = True
    head_budgets = True
    query_aware = "keeps what the continuation attends to"

    class Options(extension.Options):
        """Options of the oracle."""

        future: int = Field(32, ge=1, description="tokens of the continuation that are looked at")

    def after_prompt(self, layers: list[Layer], ids: Tensor, replay: Replay) -> None:
        """Generate what follows, let it attend to the prompt, and keep what it attends to most."""
        if all(layer.budget.covers_all for layer in layers):
            return
        following = replay.continuation(self.options.future).to(ids.device)
        if not following.shape[1]:  # the answer is empty: what it would begin with is looked at
            following = ids[:, -1:]

        def observe(layer: Layer, queries: Tensor, keys: Tensor) -> None:
            layer.state["future"] = _received(layer, queries, keys, following >= 0)

        replay(following.clamp_min(0), observe)
        for layer in layers:
            layer.keep_top(layer.state.pop("future"))


def _received(layer: Layer, queries: Tensor, later: Tensor, real: Tensor) -> Tensor:
    """Weights [B, G, n] that the `real`, bool [B, m], of the queries [B, H, m, d] give to the prompt's n keys."""
    keys, count = layer.store.static_parts()[0][0], queries.shape[2]
    tokens, share = keys.shape[2], layer.heads // layer.kv_heads
    found = torch.zeros(*keys.shape[:3], device=keys.device)
    future = torch.ones(count, count, dtype=torch.bool, device=keys.device).triu(1)
    for head in range(layer.heads):  # one after the other, to spare memory
        group, asked = head // share, queries[:, head].float()
        logits = torch.cat([asked @ part[:, group].float().transpose(-1, -2) for part in (keys, later)], dim=-1)
        logits = layer.capped(logits.mul_(layer.scaling))
        logits[..., tokens:].masked_fill_(future, -torch.inf)
        weights = logits.softmax(-1)[..., :tokens]
        found[:, group] += (weights * real.to(weights.device)[..., None]).sum(1)
    return found
