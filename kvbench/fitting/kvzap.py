"""Fits KVzap's surrogate: KVzip's replay of texts gives the scores, and the inputs of attention what predicts them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvbench.capture.record import SourceText
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.policy import Replay
from kvbench.engine.attach import attach
from kvbench.engine.generation import generate
from kvbench.engine.saving.identify import weights_fingerprint
from kvbench.engine.survey import survey
from kvbench.models import LoadedModel, check_context
from kvbench.strategies.evicting.criticalkv import output_projection
from kvbench.strategies.evicting.kvzap import NAMES, Surrogate
from kvbench.strategies.evicting.kvzip import KVzip

Kind = Literal["linear", "mlp"]
Progress = Callable[[str, int, int], None]
LEAST = 1e-9
"""Scores below it count as it: their logarithm is to be finite."""
RIDGE = 0.1
"""Weight of the penalty on a linear surrogate's weights, for inputs of variance 1: some channels are far larger."""
UNITS, EPOCHS, BATCH, RATE = 512, 15, 512, 5e-3
"""An MLP's hidden units, and how it is trained, as by the authors' code."""


class _Teacher(KVzip):
    """KVzip+: KVzip's weights times ‖W_O v‖ of the key's value, over the length of the asking token's input."""

    name = "kvzip"
    reads_hidden = True

    def __init__(self) -> None:
        super().__init__(KVzip.Options.model_validate({}))
        self.lengths: dict[nn.Module, Tensor] = {}
        """By attention module, the lengths [B, m] of its latest inputs."""
        self.found: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        """By layer, inputs [n, D] and scores [n, G] of each text."""

    def reduce_hidden(self, number: int, hidden: Tensor) -> Tensor:
        """All of it."""
        return hidden

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Note the inputs."""
        layer.state["hidden"] = layer.prompt_hidden

    def after_prompt(self, layers: list[Layer], ids: Tensor, replay: Replay) -> None:
        """Score and evict nothing."""
        system = self.score(layers, ids, replay)
        for layer in layers:
            hidden, scores = layer.state.pop("hidden")[0, system:], layer.state.pop("importance")[0].T
            self.found[layer.number].append((hidden.cpu(), scores.clamp_min(LEAST).log().cpu()))

    def importance(self, layer: Layer, queries: Tensor, replayed: Tensor, start: int, stop: int, system: int) -> Tensor:
        """KVzip's, each weight times its key's and over its query's length."""
        values = layer.store.static_parts()[0][1][:, :, start:stop].float()
        projection = output_projection(layer, values.shape[3], "KVzap's surrogate").float()
        share = layer.heads // layer.kv_heads
        norms = [(values[:, head // share] @ own).norm(dim=-1) for head, own in enumerate(projection)]
        columns = torch.stack(norms, dim=1).view(layer.rows, layer.kv_heads, share, 1, -1)
        asking = self.lengths[layer.module].float().clamp_min(LEAST)

        def weigh(weights: Tensor, first: int) -> Tensor:
            rows = asking[:, first : first + weights.shape[3]]
            return weights * columns / rows[:, None, None, :, None]

        return self.highest(layer, queries, replayed, (start, stop, system), weigh)

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Note the lengths of attention modules' inputs within the block."""
        with ExitStack() as stack:
            for layer in survey(model).layers.values():
                stack.callback(layer.modules[0].register_forward_pre_hook(self._note, with_kwargs=True).remove)
            yield

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self.lengths[module] = hidden.float().norm(dim=-1)


@dataclass(frozen=True)
class Fitted:
    """A surrogate, and how much of the scores' variance on `held_out` tokens of other texts each layer explains."""

    surrogate: Surrogate
    explained: Mapping[int, float]
    tokens: int
    held_out: int


def fit(
    loaded: LoadedModel, text: SourceText, *, kind: Kind = "linear", samples: int = 16, length: int = 1024,
    seed: int = 0, progress: Progress = lambda *_: None,
) -> Fitted:  # fmt: skip
    """Fit a surrogate on pieces of a text, `samples` of `length` tokens, an eighth of which (one at least) test it.

    `progress` is told what is done of how many. Raises KVBenchError for a text that is too short, for lengths that the
    model cannot replay, and for a model whose output projections are not found.
    """
    if samples < 2:
        raise KVBenchError(f"{samples} samples leave none to fit or none to test: give 2 or more.")
    check_context(loaded, 2 * length + 64)  # the prompt, what asks for its repetition, and this
    teacher, pieces = _Teacher(), _pieces(loaded.tokenizer, text, samples, length, seed)
    session = attach(loaded.model, policy=teacher, budget=Budget(ratio=1.0), tokenizer=loaded.tokenizer)
    with teacher.watching(loaded.model), session:
        for number, ids in enumerate(pieces):
            generate(session, ids, max_new_tokens=0)
            progress("texts", number + 1, samples)
    tested = max(samples // 8, 1)
    layers: dict[int, dict[str, Tensor]] = {}
    explained, train, model = {}, 0, weights_fingerprint(loaded.model)
    for done, (layer, found) in enumerate(sorted(teacher.found.items())):
        inputs, scores = (torch.cat(part) for part in zip(*found[:-tested], strict=True))
        make = _linear if kind == "linear" else _mlp
        layers[layer] = dict(zip(NAMES[kind], make(inputs, scores, seed), strict=True))
        train = len(inputs)
        progress("layers", done + 1, len(teacher.found))
    surrogate = Surrogate(kind, layers, model, type(loaded.model).__name__)
    for layer, found in teacher.found.items():
        inputs, scores = (torch.cat(part) for part in zip(*found[-tested:], strict=True))
        wrong = (surrogate(layer, inputs) - scores).square().sum(0)
        explained[layer] = float((1 - wrong / (scores - scores.mean(0)).square().sum(0).clamp_min(LEAST)).mean())
    return Fitted(surrogate, explained, train, len(inputs))


def _pieces(tokenizer: Any, text: SourceText, count: int, length: int, seed: int) -> list[list[int]]:
    """Token ids of `count` pieces that begin at random lines of the text."""
    rng, found = random.Random(seed), []
    for _ in range(20 * count):
        start = text.text.find("\n", rng.randrange(len(text.text) + 1)) + 1
        piece = text.text[start : start + 12 * length]
        ids: list[int] = tokenizer.encode(piece, add_special_tokens=False, verbose=False)
        if start and len(ids) >= length:
            found.append(ids[:length])
        if len(found) == count:
            return found
    raise KVBenchError(
        f"The text {text.name} has no {count} pieces of {length} tokens: give a longer one, or ask for less."
    )


def _linear(inputs: Tensor, scores: Tensor, seed: int) -> Sequence[Tensor]:
    """Ridge regression in float64: weight [G, D] and bias [G]."""
    x, y = inputs.double(), scores.double()
    mean, scale, middle = x.mean(0), x.std(0).clamp_min(1e-6), y.mean(0)
    x, y = (x - mean) / scale, y - middle
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * len(x))
    weight = torch.linalg.solve(gram, x.T @ y).T / scale
    return weight.float(), (middle - weight @ mean).float()


@torch.inference_mode(False)
@torch.enable_grad()
def _mlp(inputs: Tensor, scores: Tensor, seed: int) -> Sequence[Tensor]:
    """Two layers with a GELU between, trained by AdamW on squared errors: weight, bias, and the outer layer's."""
    x, y = inputs.float().clone(), scores.float().clone()
    mean, scale, middle, spread = x.mean(0), x.std(0).clamp_min(1e-6), y.mean(0), y.std(0).clamp_min(1e-6)
    x, y = (x - mean) / scale, (y - middle) / spread
    random_ = torch.Generator().manual_seed(seed)
    units = min(UNITS, x.shape[1])
    weights = [
        (torch.randn(*shape, generator=random_) / shape[-1] ** 0.5).requires_grad_()
        for shape in ((units, x.shape[1]), (y.shape[1], units))
    ]
    biases = [torch.zeros(size, requires_grad=True) for size in (units, y.shape[1])]
    steps = EPOCHS * -(-len(x) // BATCH)
    optimiser = torch.optim.AdamW([*weights, *biases], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(EPOCHS):
        for chosen in torch.split(torch.randperm(len(x), generator=random_), BATCH):
            hidden = functional.gelu(functional.linear(x[chosen], weights[0], biases[0]))
            loss = (functional.linear(hidden, weights[1], biases[1]) - y[chosen]).square().mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    inner, outer = (weight.detach() for weight in weights)
    first, last = (bias.detach() for bias in biases)
    inner = inner / scale
    return inner, first - inner @ mean, outer * spread[:, None], last * spread + middle


def told(fitted: Fitted) -> str:
    """How well a surrogate fits, in a sentence."""
    each = fitted.explained
    worst = min(each, key=lambda layer: each[layer])
    return (
        f"fitted on {fitted.tokens} tokens; explains {100 * fmean(each.values()):.0f}% of the variance of the scores "
        f"of {fitted.held_out} others, layer {worst} the least, {100 * each[worst]:.0f}%"
    )
