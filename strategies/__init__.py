"""The built-in policies, one file each, and the built-in budget allocators."""

from kvbench.budget import BudgetAllocator
from kvbench.hookspecs import hookimpl
from kvbench.policy import KVCachePolicy
from kvbench.strategies.ada import Ada
from kvbench.strategies.duo_attention import DuoAttention
from kvbench.strategies.expected_attention import ExpectedAttention
from kvbench.strategies.flat import Flat
from kvbench.strategies.full import Full
from kvbench.strategies.full_no_cache import FullNoCache
from kvbench.strategies.h2o import H2O
from kvbench.strategies.hnsw import HNSW
from kvbench.strategies.infinigen import InfiniGen
from kvbench.strategies.infllm import InfLLM
from kvbench.strategies.ivf import IVF
from kvbench.strategies.ivfpq import IVFPQ
from kvbench.strategies.keydiff import KeyDiff
from kvbench.strategies.kivi import KIVI
from kvbench.strategies.knorm import KNorm
from kvbench.strategies.kvzip import KVzip
from kvbench.strategies.magicpig import MagicPIG
from kvbench.strategies.oracle_topk import OracleTopK
from kvbench.strategies.oracle_topp import OracleTopP
from kvbench.strategies.pqcache import PQCache
from kvbench.strategies.profile import Profile
from kvbench.strategies.pyramid import Pyramid
from kvbench.strategies.quest import Quest
from kvbench.strategies.random import Random
from kvbench.strategies.retrieval import Retrieval
from kvbench.strategies.retroinfer import RetroInfer
from kvbench.strategies.robust_vamana import RobustVamana
from kvbench.strategies.shadowkv import ShadowKV
from kvbench.strategies.snapkv import SnapKV
from kvbench.strategies.squeeze import Squeeze
from kvbench.strategies.squeezed_attention import SqueezedAttention
from kvbench.strategies.streaming_llm import StreamingLLM
from kvbench.strategies.think import ThinK
from kvbench.strategies.tova import TOVA
from kvbench.strategies.uniform import Uniform
from kvbench.strategies.vamana import Vamana


@hookimpl
def kvbench_policies() -> list[type[KVCachePolicy]]:
    """Register the built-in policies."""
    return [
        Full, FullNoCache,
        StreamingLLM, H2O, TOVA, SnapKV, KeyDiff, KNorm, ExpectedAttention, KVzip, DuoAttention,
        Quest, InfLLM, InfiniGen, ShadowKV, SqueezedAttention, PQCache, MagicPIG, RetroInfer,
        Flat, Retrieval, RobustVamana, Vamana, IVF, HNSW, IVFPQ,
        KIVI, ThinK,
        Random, OracleTopK, OracleTopP,
    ]  # fmt: skip


@hookimpl
def kvbench_budgets() -> list[type[BudgetAllocator]]:
    """Register the built-in budget allocators."""
    return [Uniform, Pyramid, Ada, Squeeze, Profile]
