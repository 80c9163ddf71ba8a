"""The built-in policies, one file each, and the built-in budget allocators."""

from kvbench.budget import BudgetAllocator
from kvbench.hookspecs import hookimpl
from kvbench.policy import KVCachePolicy
from kvbench.strategies.flat import Flat
from kvbench.strategies.full import Full
from kvbench.strategies.full_no_cache import FullNoCache
from kvbench.strategies.hnsw import HNSW
from kvbench.strategies.ivf import IVF
from kvbench.strategies.ivfpq import IVFPQ
from kvbench.strategies.pyramid import Pyramid
from kvbench.strategies.quest import Quest
from kvbench.strategies.retrieval import Retrieval
from kvbench.strategies.robust_vamana import RobustVamana
from kvbench.strategies.snapkv import SnapKV
from kvbench.strategies.streaming_llm import StreamingLLM
from kvbench.strategies.uniform import Uniform
from kvbench.strategies.vamana import Vamana


@hookimpl
def kvbench_policies() -> list[type[KVCachePolicy]]:
    """Register the built-in policies."""
    return [Full, FullNoCache, StreamingLLM, SnapKV, Quest, Flat, Retrieval, RobustVamana, Vamana, IVF, HNSW, IVFPQ]


@hookimpl
def kvbench_budgets() -> list[type[BudgetAllocator]]:
    """Register the built-in budget allocators."""
    return [Uniform, Pyramid]
