"""The door to the engine: `attach` makes a model use a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.probe import Probe
from kvbench.engine.conformance.checks import Conformance
from kvbench.engine.session import Session
from kvbench.plugins import registry


def attach(
    model: Any,
    *,
    policy: str | KVCachePolicy = "full",
    budget: Budget | int | float | None = None,
    options: Mapping[str, Any] | None = None,
    probes: Sequence[str | Probe] = (),
    prompt_tokens: int | None = None,
    tokenizer: Any = None,
    dense_layers: int = 0,
    check: bool = False,
) -> Session:
    """Make `model` use a policy inside a `with` block; leaving the block restores the model.

    `policy` is a plugin's name, with its `options`, or an instance. `budget` is a `Budget`, a number of tokens (int) or
    a ratio of the context (float); policies whose size follows from something else ignore it. The first
    `dense_layers` full-attention layers are left exact, beyond the budget, which the others share, as many papers have
    it. The first forward call is the whole prompt unless `prompt_tokens` says how many tokens belong to it: then it may
    come in chunks, and tokens beyond it go through the policy singly, but for one that takes `blocks`. `tokenizer`, a
    transformers tokenizer, is for policies that put a text of their own before the model (KVzip). `check` proves first,
    once for each model and policy, that both give what they promise (`kvbench.engine.conformance`), and raises
    KVBenchError where they do not; the session's `conformance` has what was found.
    """
    if options and not isinstance(policy, str):
        raise KVBenchError("Options go with a policy's name; an instance of a policy has its own already.")
    chosen: KVCachePolicy = registry().make("policy", policy, options) if isinstance(policy, str) else policy
    if isinstance(budget, bool) or not isinstance(budget, Budget | int | float | None):
        raise KVBenchError(f"The budget {budget!r} is not a Budget, a number of tokens (int) or a ratio (float).")
    if isinstance(budget, int):
        if budget < 1:
            raise KVBenchError(f"The budget of {budget} tokens is not a positive number of tokens.")
        budget = Budget(tokens=budget)
    elif isinstance(budget, float):
        if not 0 < budget <= 1:
            raise KVBenchError(f"The budget ratio {budget} is not between 0 and 1.")
        budget = Budget(ratio=budget)
    made = [registry().make("probe", probe) if isinstance(probe, str) else probe for probe in probes]
    if type(model).__name__ == "OptimizedModule":  # torch.compile's, whose calls and `generate` reach the model in it
        model = model._orig_mod
    session = Session(model, chosen, budget, made, prompt_tokens, tokenizer, dense_layers)
    if check:
        session.conformance = Conformance(model, tokenizer=tokenizer).prove(chosen)
    return session
