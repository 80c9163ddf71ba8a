"""KIVI (arXiv 2402.02750): 2-bit keys per channel, 2-bit values per token, recent tokens in full precision."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.budget import LayerBudget
from kvbench.contract.coded import CodedBuffer, RaggedCodes
from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import Options
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, FixedTokens, Part, rows_of
from kvbench.contract.storage import StorageFactory, TokenBuffer
from kvbench.kernels.merge import merge
from kvbench.strategies.compressing.kivi_storage import KIVIBuffer, KIVIPages, KIVITokens


class KIVI(KVCachePolicy):
    """Keeps every token: old ones in 2 bits, the last 128 or so in full precision.

    Its size follows from its options, so it takes no budget of tokens; compare by bytes. Scales and minima are float16,
    and count. Values of heads with fewer than `group` channels have one group.
    """

    name = "kivi"
    summary = "Keeps every token, old ones in 2 bits: keys quantised per channel, values per token."
    reference = "Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750"
    takes_budget = False
    never_exact = "keys and values are held in few bits"
    query_window = 0

    class Options(Options):
        """Options of KIVI."""

        bits: Literal[2, 4, 8] = Field(2, description="bits of a quantised number")
        group: int = Field(32, ge=8, multiple_of=8, description="numbers that share a scale and a minimum")
        residual: int = Field(128, ge=8, description="recent tokens in full precision; a multiple of group")

    def storage(self, layer: Layer) -> StorageFactory:
        """Codes of all but the residual, for any policy that sets tokens aside."""
        if self.options.residual % self.options.group or layer.head_dim % min(self.options.group, layer.head_dim):
            raise KVBenchError(
                f"KIVI's residual of {self.options.residual} tokens and the heads' {layer.head_dim} channels are not "
                f"both multiples of the group of {self.options.group}: choose -o group and -o residual accordingly."
            )
        return partial(KIVIBuffer, self.options)

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Quantise all but the residual."""
        layer.store.set_aside(0, layer.tokens, offload=False, storage=self.storage(layer))

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """Codes in place; late tokens in a ring."""
        return KIVIStep(parts, clock, self.options)

    def fixed_tokens(self, parts: Sequence[Part], clock: Clock, unit: int, capacity: int) -> FixedTokens | str:
        """Codes and late tokens in place."""
        return KIVIPages(self.options, parts, clock, unit, capacity)

    def static_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | str | None:
        """Codes in place, as many as the other policy kept and what is generated."""
        return KIVIStaticStep(parts, clock, self.options)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Hand the new token to the quantised storage, which keeps it in full precision for a while."""
        layer.store.advance(keys.shape[2])

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Attend to everything."""
        return Selection(everything=True)


class KIVIStep(FixedStep):
    """KIVI's step in fixed shapes: a kernel takes the token in and quantises, another attends to the codes."""

    def __init__(self, parts: Sequence[Part], clock: Clock, options: Any) -> None:
        first = parts[0].layer.store.aside
        assert isinstance(first, KIVIBuffer)
        self._scaling = parts[0].layer.scaling
        tokens = max(part.layer.tokens for part in parts) + clock.new_tokens
        # all tokens are held, so their number is the position
        self._tokens = KIVITokens(options, first, clock.positions, tokens)
        for part in parts:
            aside = part.layer.store.aside
            assert isinstance(aside, KIVIBuffer)
            aside.hand_over(self._tokens.codes, rows_of(part))
            part.layer.store.release_aside()

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Take the token in, quantise what has waited long enough, and attend to everything."""
        self._tokens.insert(keys, values)
        return self._tokens.attend(queries, self._scaling)[0]

    def bytes(self) -> dict[str, int]:
        """Codes, scales and late tokens, on the device."""
        return {"resident": self._tokens.nbytes, "offloaded": 0, "index": 0}

    def reads(self, tokens: int) -> dict[str, int]:
        """The codes of the tokens that are quantised at that length, and the late tokens."""
        return {"device": self._tokens.reads(tokens), "host": 0}

    def changed(self) -> Sequence[Tensor]:
        """Nothing: lengths follow from the positions, and a repeated step writes the same codes to the same place."""
        return []


class KIVIStaticStep(FixedStep):
    """Attends to what another policy kept, in KIVI's codes, and adds to it.

    Where heads keep different numbers of tokens their codes stay as they are, and new tokens have codes of their own.
    """

    def __init__(self, parts: Sequence[Part], clock: Clock, options: Any) -> None:
        stores = [part.layer.store for part in parts]
        device, (batch, heads) = clock.positions.device, (clock.batch, parts[0].layer.kv_heads)
        self._scaling = parts[0].layer.scaling
        like = _codes(stores[0].static_buffer)
        counts = torch.zeros(batch, dtype=torch.int32, device=device)
        kept = torch.zeros(batch, heads, dtype=torch.int32, device=device)
        for part, store in zip(parts, stores, strict=True):
            counts[list(rows_of(part))] = store.static_buffer.length
            if store.ragged_buffer is not None:
                kept[list(rows_of(part))] = store.ragged_buffer.lengths.int()
        most, self._first = int(kept.max()), int(counts.max())
        self._beyond = float(clock.positions.float().mean() - counts.float().mean())
        self._kept = KIVITokens(options, like, kept, most) if most else None
        self._tokens = KIVITokens(options, like, counts, self._first + clock.new_tokens)
        for part, store in zip(parts, stores, strict=True):
            _codes(store.static_buffer).hand_over(self._tokens.codes, rows_of(part))
            ragged = store.ragged_buffer
            if self._kept is not None and ragged is not None:
                assert isinstance(ragged, RaggedCodes)
                for place, own in enumerate(ragged.heads):
                    row, head = list(rows_of(part))[place // heads], place % heads
                    _codes(own).hand_over(self._kept.codes, [row], slice(head, head + 1))
            store.release_static(0)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Take the token in, quantise what has waited long enough, and attend to everything."""
        self._tokens.insert(keys, values)
        self._tokens.counts.add_(1)
        output, lse = self._tokens.attend(queries, self._scaling)
        if self._kept is None:
            return output
        both = self._kept.attend(queries, self._scaling), (output, lse)
        outputs, lses = (torch.stack(pair) for pair in zip(*both, strict=True))
        return merge(outputs, lses)[0].to(queries.dtype)

    def bytes(self) -> dict[str, int]:
        """Codes, scales and late tokens, on the device."""
        kept = 0 if self._kept is None else self._kept.nbytes
        return {"resident": self._tokens.nbytes + kept, "offloaded": 0, "index": 0}

    def reads(self, tokens: int) -> dict[str, int]:
        """All codes of the prompt, those of the new tokens at that length, and the late tokens."""
        kept = 0 if self._kept is None else self._kept.nbytes
        return {"device": self._tokens.reads(tokens - self._beyond) + kept, "host": 0}

    def changed(self) -> Sequence[Tensor]:
        """The number of tokens."""
        return [self._tokens.counts]


def _codes(buffer: TokenBuffer) -> KIVIBuffer:
    """The codes of a static set that nothing has left since they were made."""
    assert isinstance(buffer, CodedBuffer) and buffer.whole and isinstance(buffer.held, KIVIBuffer)
    return buffer.held
