"""TurboQuant (arXiv 2504.19874): rotate each vector at random and round its channels to a Gaussian's best levels."""

import math
from functools import lru_cache

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.errors import KVBenchError
from kvbench.contract.policy import Place
from kvbench.kernels.codes import Layout
from kvbench.strategies.compressing.coded_tokens import CodedTokens, CodingPolicy
from kvbench.strategies.compressing.kivi_storage import pack


@lru_cache
def rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix [d, d]: Hadamard's with random signs where d is a power of two, else a Gaussian's."""
    random = torch.Generator().manual_seed(seed)
    if size & (size - 1):
        found: Tensor = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))[0]
        return found.float()
    made = torch.ones(1, 1)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], dim=1), torch.cat([made, -made], dim=1)])
    signs = torch.randint(0, 2, (size, 1), generator=random) * 2 - 1
    return signs * made / math.sqrt(size)


@lru_cache
def levels(bits: int) -> Tensor:
    """The 2^bits levels of least squared error for a standard normal number (Lloyd 1982, Max 1960), in order."""
    count = 2**bits
    found: Tensor = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinity = torch.tensor([torch.inf], dtype=torch.float64)
    for _ in range(5000):
        edges = torch.cat([-infinity, (found[1:] + found[:-1]) / 2, infinity])
        density, mass = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi), torch.special.ndtr(edges)
        moved = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
        if float((moved - found).abs().max()) < 1e-12:
            break
        found = moved
    return found.float()


class TurboTokens(CodedTokens):
    """The codes of the rotated unit vector's channels, and a float16 that gives the decoded vector x's own norm."""

    def _prepare(self, device: torch.device) -> None:
        for size in self.sizes:
            if size % 8:
                raise KVBenchError(
                    f"Policy 'turboquant' met heads of {size} channels: its codes need a multiple of 8 (int8 doesn't)."
                )
        self.turns = [rotation(size, self.options.seed).to(device) for size in self.sizes]
        self.levels = levels(self.options.bits).to(device)
        self.edges = (self.levels[1:] + self.levels[:-1]) / 2

    def turn(self, size: int) -> Tensor:
        """The rotation."""
        return self.turns[self.sizes.index(size)]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate, scale to a standard normal's range, and take the nearest levels."""
        size, bits, wide = x.shape[-1], self.options.bits, x.float()
        norm = wide.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        turned = wide @ self.turn(size)
        codes = torch.bucketize(turned * (size**0.5 / norm), self.edges, out_int32=True).to(torch.uint8)
        scale = norm / self.levels[codes.int()].norm(dim=-1, keepdim=True)
        if bits == 3:
            return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=-1), scale.half()
        return pack(codes, bits), scale.half()

    @property
    def layout(self) -> Layout:
        """Levels of a standard normal number."""
        return Layout("levels", self.options.bits, self.levels)


class TurboQuant(CodingPolicy):
    """Keeps every token in `bits` a number and a norm of 16 bits: rotation spreads a vector over all channels.

    The paper's quantiser of least mean squared error; its variant whose inner products are unbiased, by one bit of the
    residual's signs, and its channels of more bits are left out. The decoded vector has the norm of the vector itself.
    The first and last `full_layers` of the model's layers keep their numbers (at most a quarter of the layers).
    """

    name = "turboquant"
    summary = "Keeps every token in a few bits a number, after a random rotation, at a Gaussian's best levels."
    reference = (
        "Zandieh et al., TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate, arXiv 2504.19874"
    )
    never_exact = "keys and values are held in few bits"
    codes = TurboTokens

    class Options(extension.Options):
        """Options of TurboQuant."""

        bits: int = Field(4, ge=1, le=4, description="bits of a number: 1, 2, 3 or 4")
        full_layers: int = Field(2, ge=0, description="first and last layers that keep their numbers, each so many")
        seed: int = Field(0, ge=0, description="seed of the rotation")

    def governs(self, place: Place) -> bool:
        """All but the first and last layers."""
        full: int = min(self.options.full_layers, place.count // 4)
        return full <= place.ordinal < place.count - full
