"""Policies of a third party that keep things between steps, each in another place and of another kind."""

import random
from collections import deque

import numpy as np
import torch

import kvbench
from kvbench.contract.storage import Storage


class _Blocks(Storage):
    """Tokens in blocks, as they came."""

    def __init__(self, keys, values):
        self._blocks = [(keys, values)]

    @property
    def length(self):
        return sum(keys.shape[2] for keys, _ in self._blocks)

    @property
    def nbytes(self):
        return sum(keys.nbytes + values.nbytes for keys, values in self._blocks)

    @property
    def keys(self):
        return torch.cat([keys for keys, _ in self._blocks], dim=2)

    @property
    def values(self):
        return torch.cat([values for _, values in self._blocks], dim=2)

    def append(self, keys, values):
        self._blocks.append((keys, values))


class Ledger(kvbench.Saveable):
    """How often each token was chosen, read through the layer's own rotary embedding."""

    def __init__(self, layer):
        self.counts: dict[int, int] = {}
        self.turn, self.store, self.lots = layer.rotate, layer.store, np.random.default_rng(7)


class Notes(kvbench.KVCachePolicy):
    """Chooses tokens by lot, with odds that follow its notes; all that it keeps lies in `layer.state`."""

    name = "notes"
    summary = "Chooses tokens at random, and again what it chose before."
    query_window = 0
    kept = 3

    def static_tokens(self, context):
        """The newest tokens."""
        return 0, self.kept

    def prefill(self, layer, queries, keys, values):
        """Set all but the newest tokens aside."""
        layer.store.set_aside(0, layer.tokens - self.kept, offload=False, storage=_Blocks)
        layer.state |= {
            "ledger": Ledger(layer), "random": random.Random(layer.ordinal), "torch": torch.Generator().manual_seed(3),
            "sizes": (layer.tokens, {"least": float("inf"), (1, 2): {3, 4}}), "dtype": keys.dtype, "on": keys.device,
            "half": keys[:, :, ::2], "same": keys, "none": None, "word": "yes", "scalar": np.float32(0.1),
        }  # fmt: skip

    def insert(self, layer, keys, values):
        """Set the oldest token of the window aside."""
        layer.store.advance(layer.store.static_tokens - self.kept)

    def select(self, layer, queries, budget):
        """Draw."""
        state, held = layer.state, layer.store.aside_stop
        ledger = state["ledger"]
        assert ledger.store is layer.store
        assert state["sizes"][1][(1, 2)] == {3, 4}
        assert state["sizes"][1]["least"] == float("inf")
        assert state["half"].data_ptr() == state["same"].data_ptr()
        odds = torch.rand(held, generator=state["torch"]) + torch.from_numpy(ledger.lots.random(held))
        odds[state["random"].randrange(held)] += 1
        for token, count in ledger.counts.items():
            odds[token] += 0.1 * count
        chosen = odds.topk(min(budget.beside(self.kept, held), held)).indices
        for token in chosen.tolist():
            ledger.counts[token] = ledger.counts.get(token, 0) + 1
        turned = ledger.turn(queries, torch.tensor([0]))
        return kvbench.Selection(chosen.expand(layer.rows, layer.kv_heads, -1), queries=turned)


class Diary(kvbench.KVCachePolicy):
    """Evicts the oldest tokens; how many stay lies on the policy itself, in a kind of object that is nobody's."""

    name = "diary"
    summary = "Keeps recent tokens, fewer at every step."
    query_window = 0

    def __init__(self, options=None):
        super().__init__(options)
        self.pages = {}

    def static_tokens(self, context):
        """The newest token."""
        return 0, 1

    def prefill(self, layer, queries, keys, values):
        """Keep the newest tokens."""
        layer.store.keep(torch.arange(layer.tokens - layer.budget.tokens, layer.tokens))
        self.pages[layer.number] = deque(range(layer.tokens - layer.budget.tokens, layer.tokens))

    def insert(self, layer, keys, values):
        """Evict the oldest, and every other time one more."""
        page = self.pages[layer.number]
        page.append(layer.tokens - 1)
        for _ in range(1 + layer.tokens % 2):
            layer.store.evict(page.popleft(), 1)

    def save_state(self, layer):
        """The layer's page."""
        return {"page": torch.tensor(self.pages[layer.number])}

    def load_state(self, layer, state):
        """Put it back."""
        self.pages[layer.number] = deque(state["page"].tolist())


class Scribbles(kvbench.KVCachePolicy):
    """Keeps something on itself that is not saved."""

    name = "scribbles"
    summary = "Keeps all tokens and counts them where it must not."
    takes_budget = False
    query_window = 0

    def prefill(self, layer, queries, keys, values):
        """Count."""
        self.seen = layer.tokens


class Lambdas(kvbench.KVCachePolicy):
    """Keeps something in `layer.state` that cannot be saved."""

    name = "lambdas"
    summary = "Keeps all tokens and a function."
    takes_budget = False
    query_window = 0

    def prefill(self, layer, queries, keys, values):
        """Keep a function."""
        layer.state["rank"] = lambda x: x


@kvbench.hookimpl
def kvbench_policies():
    """Register the policies."""
    return [Notes, Diary, Scribbles, Lambdas]
