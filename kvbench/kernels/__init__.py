"""Kernels of a decoding step: Triton on a GPU, torch twins of the same signature elsewhere.

Shapes are fixed; lengths, positions and ids are integer tensors on the device; no function waits for the device, so
each can be captured in a CUDA graph. B is the batch, H query heads, G key/value heads, d the head dimension.
"""

from kvbench.kernels.assign import cluster_sums, nearest
from kvbench.kernels.attention import Segment, attend, decode, gather, ragged
from kvbench.kernels.bounds import page_bounds, update_bounds
from kvbench.kernels.codes import CodedStore, Layout, attend_codes
from kvbench.kernels.columns import column_sums
from kvbench.kernels.directions import key_differences
from kvbench.kernels.evict import attention_weights, replace_worst
from kvbench.kernels.hashing import centred_cosines, hash_buckets, keep_collisions
from kvbench.kernels.hot import HotSlots, fetch, hold_hot
from kvbench.kernels.insert import insert
from kvbench.kernels.kivi import KIVICodes, attend_kivi
from kvbench.kernels.kivi_blocks import attend_kivi_blocks
from kvbench.kernels.kivi_settle import settle_kivi
from kvbench.kernels.lots import lots
from kvbench.kernels.low_rank import LowRankKeys, rebuild
from kvbench.kernels.merge import merge
from kvbench.kernels.pq import pq_encode, pq_scores
from kvbench.kernels.score import page_scores, scores
from kvbench.kernels.select import select_top
from kvbench.kernels.support import compiled, using
from kvbench.kernels.take import take_clusters
from kvbench.kernels.top_keys import top_keys
from kvbench.kernels.turn import turn
from kvbench.kernels.weigh import weigh
from kvbench.kernels.weights import group_weights

__all__ = [
    "CodedStore",
    "HotSlots",
    "KIVICodes",
    "Layout",
    "LowRankKeys",
    "Segment",
    "attend",
    "attend_codes",
    "attend_kivi",
    "attend_kivi_blocks",
    "attention_weights",
    "centred_cosines",
    "cluster_sums",
    "column_sums",
    "compiled",
    "decode",
    "fetch",
    "gather",
    "group_weights",
    "hash_buckets",
    "hold_hot",
    "insert",
    "keep_collisions",
    "key_differences",
    "lots",
    "merge",
    "nearest",
    "page_bounds",
    "page_scores",
    "pq_encode",
    "pq_scores",
    "ragged",
    "rebuild",
    "replace_worst",
    "scores",
    "select_top",
    "settle_kivi",
    "take_clusters",
    "top_keys",
    "turn",
    "update_bounds",
    "using",
    "weigh",
]
