"""Goes on from a saved context: `resume` makes the session that its file describes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbench.contract.probe import Probe
from kvbench.engine.attach import attach
from kvbench.engine.saving.files import StateFile
from kvbench.engine.session import Session


def resume(model: Any, path: str | Path, *, probes: Sequence[str | Probe] = (), tokenizer: Any = None) -> Session:
    """Make `model` go on, inside a `with` block, from the context that `Session.save` wrote to `path`.

    The session has the saved policy, options, budget and dense layers; its `cache` is the saved one, to be passed as
    `past_key_values`, and `ids` and `mask` are the tokens so far. Policies that are not registered are attached as
    instances and loaded with `Session.load`. Raises KVBenchError, here or when the block is entered, for a file of
    another model, of other code, or a damaged one.
    """
    with StateFile(Path(path)) as file:
        about = file.head.about
    session = attach(
        model, policy=about.policy.name, options=about.policy.options, budget=about.budget, probes=probes,
        tokenizer=tokenizer, dense_layers=about.dense_layers,
    )  # fmt: skip
    session.saved = Path(path)
    return session
