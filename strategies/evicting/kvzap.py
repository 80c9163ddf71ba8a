"""KVzap (arXiv 2601.07891): a small model on hidden states predicts what KVzip's replay would find important."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from pydantic import BaseModel, Field, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from kvbench.contract import extension
from kvbench.contract.errors import KVBenchError, unwritable
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy, ModelView
from kvbench.contract.reading import check_regular, plain, read_bytes, reading
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.kernels.steps import CompressingStep, GrowingStep

FORMAT = "kvbench kvzap surrogate 1"
MAKE = "`kvbench fit kvzap --model MODEL --output FILE`"
NAMES = {"linear": ("weight", "bias"), "mlp": ("weight", "bias", "outer_weight", "outer_bias")}
"""A layer's tensors: `weight` [G or h, D] and `bias`, and of an MLP those from its h units to the G heads."""


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Predicts the logarithm of KVzip+'s scores from the inputs of attention layers.

    `layers`: by the layer's number in the model, its tensors as in `NAMES`, float32; `model` is the fingerprint of the
    weights that it was fitted on, `architecture` that model's name.
    """

    kind: str
    layers: Mapping[int, Mapping[str, Tensor]]
    model: str
    architecture: str

    def __call__(self, number: int, hidden: Tensor) -> Tensor:
        """Scores, float32 [..., G], of tokens whose inputs of layer `number` are `hidden` [..., D]."""
        moved, place = _MOVED.setdefault(self, {}), (number, hidden.device)
        if place not in moved:
            moved[place] = {name: part.to(hidden.device) for name, part in self.layers[number].items()}
        own = moved[place]
        found = functional.linear(hidden.float(), own["weight"], own["bias"])
        if self.kind == "linear":
            return found
        return functional.linear(functional.gelu(found), own["outer_weight"], own["outer_bias"])

    def save(self, file: Path) -> None:
        """Write a safetensors file; KVBenchError where it cannot be."""
        tensors = {
            f"{number}.{name}": part.contiguous() for number, own in self.layers.items() for name, part in own.items()
        }
        facts = {"format": FORMAT, "kind": self.kind, "model": self.model, "architecture": self.architecture}
        try:
            save_file(tensors, file, metadata=facts)
        except OSError as error:
            raise KVBenchError(unwritable(file, error)) from None

    @classmethod
    def load(cls, file: Path) -> "Surrogate":
        """Read what `save` wrote; KVBenchError for anything else."""
        layers: dict[int, dict[str, Tensor]] = {}
        with reading(lambda reason: f"The surrogate {file} cannot be read ({reason}). {MAKE} makes one."):
            check_regular(file)
            with safe_open(str(file), framework="pt") as opened:
                facts = opened.metadata() or {}
                if facts.get("format") != FORMAT or facts.get("kind") not in NAMES:
                    raise ValueError("it is no surrogate of this version")
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    number, _, part = name.partition(".")
                    layers.setdefault(int(number), {})[part] = opened.get_tensor(name).float()
            for number, own in layers.items():
                if set(own) != set(NAMES[facts["kind"]]) or not all(
                    bool(part.isfinite().all()) for part in own.values()
                ):
                    raise ValueError(f"layer {number} lacks tensors or has numbers that are not finite")
        return cls(facts["kind"], layers, str(facts.get("model")), str(facts.get("architecture")))


_MOVED: WeakKeyDictionary[Surrogate, dict[tuple[int, torch.device], dict[str, Tensor]]] = WeakKeyDictionary()
"""A surrogate's tensors by the layer and the device that they were asked for on."""


class KVzap(KVCachePolicy):
    """Keeps, of a layer's pairs, those of the highest scores that a surrogate predicts, and the window.

    The surrogate, linear or of two layers, sees the input of the layer's attention and predicts the logarithm of
    KVzip+: the highest weight that repeating the prompt gives the pair, times ‖W_O v‖, over the asking input's length.
    Heads share a layer's budget in the order of the scores, unless the budget gives each its own, or answers are
    compressed; the paper has one threshold for all heads and layers instead, which `threshold` adds: of the prompt,
    pairs with lower scores are evicted although the budget had room.
    """

    name = "kvzap"
    summary = "Keeps the pairs that a surrogate, fitted on the model, predicts repeating the prompt would attend to."
    reference = "Jegou and Jeblick, KVzap: Fast, Adaptive, and Faithful KV Cache Pruning, arXiv 2601.07891"
    query_window = 0
    grows = True
    head_budgets = True
    uses_hidden = True
    reads_hidden = True
    running: ClassVar[tuple[str, ...]] = ("scores",)

    class Options(extension.Options):
        """Options of KVzap."""

        surrogate: str = Field("", description="file that `kvbench fit kvzap` wrote for this model")
        window: int = Field(128, ge=1, description="most recent tokens, always kept")
        threshold: float | None = Field(
            None, description="least score of a kept pair of the prompt, a logarithm; the paper: −3 to −6"
        )
        sha256: str = Field("", description="hash of the surrogate's content, filled in, so that results name it")

        @model_validator(mode="before")
        @classmethod
        def _hash(cls, values: Any) -> Any:
            if not isinstance(values, dict) or not values.get("surrogate"):
                return values
            file = Path(str(values["surrogate"])).expanduser()
            with reading(lambda reason: f"The surrogate {file} cannot be read ({reason}). {MAKE} makes one."):
                found = hashlib.sha256(read_bytes(file)).hexdigest()
            if values.get("sha256") not in (None, "", found):
                raise KVBenchError(
                    f"{file} has changed since the run was planned (sha256 {found[:12]}…, not "
                    f"{plain(str(values['sha256']))[:12]}…): name the file under which the earlier surrogate lies."
                )
            return {**values, "sha256": found}

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        if not self.options.surrogate:
            raise KVBenchError(
                f"Policy 'kvzap' needs a surrogate that was fitted on the model: {MAKE} makes one, and -o "
                "surrogate=FILE names it."
            )
        self._file = Path(self.options.surrogate).expanduser()
        self._surrogate = Surrogate.load(self._file)

    def begin(self, model: ModelView) -> None:
        """Check that the surrogate is this model's."""
        found, here = self._surrogate, model.fingerprint()
        if found.model != here:
            raise KVBenchError(
                f"The surrogate {self._file} was fitted on another model ({plain(found.architecture)}, "
                f"{plain(found.model)}) than this one ({model.name}, {here}): fit one on it with {MAKE}."
            )
        missing = [number for number in model.numbers if number not in found.layers]
        if missing:
            raise KVBenchError(f"The surrogate {self._file} has no layer {missing[0]}: fit it again with {MAKE}.")

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The latest tokens."""
        return 0, self.options.window

    def compression_window(self, every: int) -> int:
        """No queries."""
        return 0

    def predicted(self, number: int, hidden: Tensor) -> Tensor:
        """Scores [B, m, G] of tokens by the inputs [B, m, D] of layer `number`."""
        return self._surrogate(number, hidden)

    def reduce_hidden(self, number: int, hidden: Tensor) -> Tensor:
        """Their scores are all that is kept of the prompt's inputs."""
        return self.predicted(number, hidden)

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep the best of the prompt."""
        assert layer.prompt_hidden is not None
        scores = layer.prompt_hidden.transpose(1, 2)
        if not layer.budget.covers_all:
            self._evict(layer, scores[..., : layer.tokens - self.options.window])
        if layer.budget.every:
            ids = layer.store.static_ids.expand(layer.rows, layer.kv_heads, -1)
            layer.state["scores"] = scores.gather(-1, ids.clamp_min(0))

    def _evict(self, layer: Layer, scores: Tensor) -> None:
        batch, groups, count = scores.shape
        budget, threshold = layer.budget, self.options.threshold
        if count < 1:
            return
        alike = budget.heads is not None or budget.every > 0
        if alike and threshold is None:
            layer.keep_top(scores)
            return
        if alike:
            top = budget.top(scores, layer.tokens - count)
            kept = torch.zeros(batch, groups, count + 1, dtype=torch.bool, device=scores.device)
            kept = kept.scatter_(2, torch.where(top < 0, count, top), True)[..., :count]
        else:
            room = max(budget.tokens - (layer.tokens - count), 0) * groups
            best = scores.flatten(1).topk(min(room, groups * count), dim=-1).indices
            kept = torch.zeros_like(scores.flatten(1), dtype=torch.bool).scatter_(1, best, True).view_as(scores)
        if threshold is not None:
            kept &= scores >= threshold
        layer.store.keep(torch.cat([kept, kept.new_ones(batch, groups, layer.tokens - count)], dim=2))

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Score new tokens where answers are compressed."""
        if layer.budget.every:
            assert layer.hidden is not None
            new = self.predicted(layer.number, layer.hidden).transpose(1, 2)
            layer.state["scores"] = torch.cat([layer.state["scores"], new], dim=-1)

    def score_held(self, layer: Layer, held: HeldTokens) -> Tensor:
        """The scores; the window stays."""
        return held.running["scores"].masked_fill(held.newest(self.options.window), torch.inf)

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep:
        """Every new token is kept, and scored where answers are compressed."""
        return _ScoringStep(self, parts, clock) if parts[0].layer.budget.every else GrowingStep(parts, clock)


class _ScoringStep(CompressingStep):
    """Compression between steps by scores that each token gets when it comes."""

    def __init__(self, policy: KVzap, parts: Sequence[Part], clock: Clock) -> None:
        super().__init__(policy, parts, clock)
        assert clock.inputs is not None
        self._zap, self._number, self._inputs = policy, parts[0].layer.number, clock.inputs

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Score the token, append it and attend."""
        new = self._zap.predicted(self._number, self._inputs.at(self._number)).transpose(1, 2)
        self.running["scores"].scatter_(2, self.held.lengths.long()[..., None], new)
        return super().__call__(queries, keys, values)
