"""Kernels of a decoding step: Triton on a GPU, torch twins of the same signature elsewhere.

Shapes are fixed; lengths, positions and ids are integer tensors on the device; no function waits for the device, so
each can be captured in a CUDA graph. B is the batch, H query heads, G key/value heads, d the head dimension.
"""

from kvbench.engine.kernels.attention import Segment, attend, decode, gather, ragged
from kvbench.engine.kernels.bounds import page_bounds, update_bounds
from kvbench.engine.kernels.insert import insert
from kvbench.engine.kernels.kivi import KIVICodes, attend_kivi
from kvbench.engine.kernels.merge import merge
from kvbench.engine.kernels.pq import pq_scores
from kvbench.engine.kernels.score import page_scores, scores
from kvbench.engine.kernels.support import compiled, using

__all__ = [
    "KIVICodes",
    "Segment",
    "attend",
    "attend_kivi",
    "compiled",
    "decode",
    "gather",
    "insert",
    "merge",
    "page_bounds",
    "page_scores",
    "pq_scores",
    "ragged",
    "scores",
    "update_bounds",
    "using",
]
