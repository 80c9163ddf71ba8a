"""Kascade (arXiv 2512.16391): exact top-k in a few anchor layers, whose choice the layers after them use again."""

from collections.abc import Sequence

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.attention import scores
from kvbench.contract.layer import Layer
from kvbench.contract.policy import Replay
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.kernels.attention import Segment
from kvbench.kernels.score import scores as all_scores
from kvbench.kernels.weights import group_weights
from kvbench.strategies.selecting.aside import AsideStep
from kvbench.strategies.selecting.tiers import SelectingPolicy


def segments(gain: Tensor, count: int) -> list[int]:
    """The first layers of `count` runs of layers, for the largest sum of gain[first, layer]; `gain` [L, L], 0 is first.

    Dynamic programming over the number of runs and the layer at which the latest one begins.
    """
    layers = len(gain)
    # worth[a, b]: what anchor a gives to itself and the layers after it, before b
    worth = torch.cat([torch.zeros(layers, 1, dtype=gain.dtype), gain.triu().cumsum(1)], dim=1)
    best, cuts = worth[0].clone(), []
    best[0] = -torch.inf
    for _ in range(min(count, layers) - 1):
        through = torch.full((layers + 1,), -torch.inf, dtype=gain.dtype)
        where = torch.zeros(layers + 1, dtype=torch.long)
        for stop in range(2, layers + 1):
            options = torch.stack([best[start] + worth[start, stop] for start in range(1, stop)])
            through[stop], where[stop] = options.max(), options.argmax() + 1
        cuts.append(where)
        best = through
    found, stop = [], layers
    for where in reversed(cuts):
        stop = int(where[stop])
        found.append(stop)
    return [0, *reversed(found)]


class Kascade(SelectingPolicy):
    """Attends, per key/value head, to the exact top-k of an anchor layer; the layers after it take the anchor's tokens.

    A group's score is the sum of its query heads' softmax weights. The first governed layer is an anchor, and further
    ones are those for which the other layers lose least: a layer's similarity to an anchor is the share of its own
    top-k's mass, averaged over heads, that the anchor's top-k has. Each head takes the tokens of the anchor's head
    that have most of its own mass. The paper measures both on a development set and weighs layers by how far their
    attention moves their input; here the prompt's last queries measure, and all layers weigh alike. It leaves layer 0
    dense: `--dense-layers 1`. Where an anchor attends to everything, the layers after it choose for themselves.
    """

    name = "kascade"
    summary = "Exact top-k in a few anchor layers, used again by the layers between, head by head."
    reference = (
        "Deshmukh et al., Kascade: A Practical Sparse Attention Method for Long-Context LLM Inference, arXiv 2512.16391"
    )
    query_aware = "chooses its anchors by the prompt's last queries"
    head_budgets = True
    batch = 1

    class Options(extension.Options):
        """Options of Kascade."""

        anchors: int = Field(5, ge=1, description="layers that choose for themselves, the first one included")
        sample: int = Field(8, ge=1, description="last queries of the prompt that measure the layers")

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        self.query_window = self.options.sample

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The newest token."""
        return 0, 1

    def build(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Note each head's mean weights for the last queries: what `after_prompt` compares."""
        count, tokens = queries.shape[2], keys.shape[2]
        future = torch.ones(count, tokens, dtype=torch.bool, device=keys.device).triu(layer.tokens - count + 1)
        share = layer.heads // layer.kv_heads
        found: list[Tensor] = []
        for head in range(layer.heads):  # one after the other, to spare memory
            own = keys[:, head // share].float().transpose(1, 2)
            logits = layer.capped((queries[:, head].float() @ own).mul_(layer.scaling))
            weights = logits.masked_fill_(future, -torch.inf).softmax(-1)
            if head % share:
                found[-1] += weights
            else:
                found.append(weights)
        layer.state["sample"] = torch.stack(found, dim=1).div_(share).half()

    def after_prompt(self, layers: list[Layer], ids: Tensor, replay: Replay) -> None:
        """Choose the anchors of each row, and the heads that follow theirs."""
        known = [layer for layer in layers if "sample" in layer.state]
        if len(known) < len(layers):
            return
        samples = [layer.state.pop("sample").float().cpu() for layer in layers]
        most = max(layer.budget.most for layer in layers)
        k = min(most, samples[0].shape[3])
        means = torch.stack([sample.mean(1) for sample in samples])  # [L, B, w, n]
        top = means.topk(k, dim=-1)
        mass = torch.stack([mean.gather(-1, best).sum(-1) for best in top.indices for mean in means])
        shape = len(layers), len(layers), *means.shape[1:3]
        gain = (mass.view(shape) / top.values.sum(-1)).mean(-1)  # [anchor, layer, B]
        chosen = [segments(gain[..., row].double(), self.options.anchors) for row in range(gain.shape[2])]
        for layer, sample in zip(layers, samples, strict=True):
            anchors = [max(first for first in own if first <= layer.ordinal) for own in chosen]
            heads = torch.zeros(layer.rows, layer.kv_heads, dtype=torch.long)
            for row, anchor in enumerate(anchors):
                theirs = samples[anchor][row].topk(k, dim=-1).indices  # [G, w, k]
                shared = torch.stack([
                    sample[row].gather(-1, one.expand(layer.kv_heads, -1, -1)).sum((1, 2)) for one in theirs
                ])  # fmt: skip
                heads[row] = shared.argmax(0)
            layer.state["anchor"], layer.state["heads"] = torch.tensor(anchors), heads.to(layer.store.device)
            layer.state["most"] = most

    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Take the exact top in an anchor layer, and the anchor's tokens elsewhere."""
        own = self._exact(layer, queries) if "anchor" not in layer.state or self._chooses(layer) else None
        if "anchor" not in layer.state:
            assert own is not None
            return Selection(own[..., :wanted], evaluations=float(layer.store.aside_stop))
        found, evaluations = [], 0
        for row, anchor in enumerate(layer.state["anchor"].tolist()):
            source = layer
            while source.ordinal > anchor and source.previous is not None:
                source = source.previous
            latest = source.state.get("latest") if source.state.get("step") == layer.tokens else None
            if source is layer or latest is None:
                own = self._exact(layer, queries) if own is None else own
                found.append(own[row, :, :wanted])
                evaluations += layer.store.aside_stop
            else:
                found.append(latest[row].to(queries.device)[layer.state["heads"][row], :wanted])
        if own is not None:
            layer.state["latest"], layer.state["step"] = own, layer.tokens
        return Selection(torch.stack(found), evaluations=evaluations / len(found))

    @staticmethod
    def _chooses(layer: Layer) -> bool:
        return bool((layer.state["anchor"] == layer.ordinal).any())

    def _exact(self, layer: Layer, queries: Tensor) -> Tensor:
        """Ids [B, G, k] of the tokens with the group's largest weights, best first, as many as any layer takes."""
        found = layer.capped(scores(queries, layer.store.aside_keys, layer.scaling)).softmax(-1)
        weights = found.view(layer.rows, layer.kv_heads, -1, found.shape[2]).sum(2)
        most = max(layer.state.get("most", 0), layer.budget.most)
        return weights.topk(min(most, weights.shape[2]), dim=-1).indices + layer.store.aside_start

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """Scores in anchor layers, and their choice on the device for the others."""
        if any("anchor" not in part.layer.state for part in parts):
            return None
        return _AnchorStep(self, parts, clock)


class _AnchorStep(AsideStep):
    per_head = False

    def __init__(self, policy: Kascade, parts: Sequence[Part], clock: Clock) -> None:
        layer, device = parts[0].layer, clock.positions.device
        anchors = torch.zeros(clock.batch, dtype=torch.long)
        self._heads = torch.zeros(clock.batch, layer.kv_heads, dtype=torch.long, device=device)
        wide = 1
        for part in parts:
            rows = slice(None) if part.rows is None else part.rows.cpu()
            anchors[rows] = part.layer.state["anchor"]
            self._heads[rows if isinstance(rows, slice) else rows.to(device)] = part.layer.state["heads"]
            wide = max(wide, part.layer.state["most"])
            part.layer.state.clear()
        super().__init__(policy, parts, clock)
        self._index, self._wide = layer.ordinal, min(wide, self.capacity)
        # what an anchor that attends to everything does not choose, a layer chooses for itself
        for row, anchor in enumerate(anchors.tolist()):
            if clock.shared.get(("kascade all", anchor), False):
                anchors[row] = layer.ordinal
        clock.shared["kascade all", layer.ordinal] = self._all
        self._sources = [(one, (anchors == one).to(device)[:, None, None]) for one in sorted(set(anchors.tolist()))]
        self._own = layer.ordinal in [one for one, _ in self._sources]
        self._rank = torch.arange(self._wide, device=device)
        self._kept = clock.shared
        self._kept["kascade", self._index] = torch.full(
            (clock.batch, self.kv_heads, self._wide), -1, dtype=torch.int32, device=device
        )

    def _exact(self, queries: Tensor) -> Tensor:
        found = all_scores(queries, self.aside_keys, self.window.aside, scaling=self.scaling)
        weights = group_weights(found, self.kv_heads, "sum", self.window.aside)
        best = weights.topk(self._wide, dim=-1)
        return torch.where(best.values > -torch.inf, best.indices, -1).int()

    def choose(self, queries: Tensor) -> Sequence[Segment]:
        """Choose, or take what the anchor chose."""
        mine: Tensor = self._kept["kascade", self._index]
        if self._own:
            mine.copy_(self._exact(queries))
        found = torch.full_like(mine, -1)
        places = self._heads[..., None].expand(-1, -1, self._wide)
        for anchor, rows in self._sources:
            ids = mine if anchor == self._index else self._kept["kascade", anchor].gather(1, places)
            found = torch.where(rows, ids, found)
        ids = torch.where(self._rank < self.window.left[..., None], found, -1)
        return [Segment(self.aside_keys, self.aside_values, ids=ids)]

    def index_reads(self, share: float) -> dict[str, int]:
        """All keys in an anchor layer, none elsewhere."""
        return {"device": int(self.aside_keys.nbytes * share) if self._own else 0, "host": 0}
