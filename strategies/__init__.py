"""The built-in policies, one file each, and the built-in budget allocators."""

from kvbench.contract.budget import BudgetAllocator
from kvbench.contract.markers import hookimpl
from kvbench.contract.policy import KVCachePolicy
from kvbench.indexes.base import Index
from kvbench.indexes.roargraph import RoarGraph
from kvbench.strategies.baselines.full import Full
from kvbench.strategies.baselines.full_no_cache import FullNoCache
from kvbench.strategies.baselines.oracle_future import OracleFuture
from kvbench.strategies.baselines.oracle_topk import OracleTopK
from kvbench.strategies.baselines.oracle_topp import OracleTopP
from kvbench.strategies.baselines.random import Random
from kvbench.strategies.budgets.ada import Ada
from kvbench.strategies.budgets.profile import Profile
from kvbench.strategies.budgets.pyramid import Pyramid
from kvbench.strategies.budgets.squeeze import Squeeze
from kvbench.strategies.budgets.uniform import Uniform
from kvbench.strategies.compressing.fp8 import FP8
from kvbench.strategies.compressing.int8 import Int8
from kvbench.strategies.compressing.kivi import KIVI
from kvbench.strategies.compressing.think import ThinK
from kvbench.strategies.compressing.turboquant import TurboQuant
from kvbench.strategies.evicting.chunkkv import ChunkKV
from kvbench.strategies.evicting.compactor import Compactor
from kvbench.strategies.evicting.criticalkv import CriticalKV
from kvbench.strategies.evicting.duo_attention import DuoAttention
from kvbench.strategies.evicting.expected_attention import ExpectedAttention
from kvbench.strategies.evicting.h2o import H2O
from kvbench.strategies.evicting.keydiff import KeyDiff
from kvbench.strategies.evicting.knorm import KNorm
from kvbench.strategies.evicting.kvzap import KVzap
from kvbench.strategies.evicting.kvzip import KVzip
from kvbench.strategies.evicting.lagkv import LagKV
from kvbench.strategies.evicting.r_kv import RKV
from kvbench.strategies.evicting.snapkv import SnapKV
from kvbench.strategies.evicting.streaming_llm import StreamingLLM
from kvbench.strategies.evicting.tova import TOVA
from kvbench.strategies.evicting.triattention import TriAttention
from kvbench.strategies.selecting.double_sparsity import DoubleSparsity
from kvbench.strategies.selecting.index_retrieval import retrieval_policy
from kvbench.strategies.selecting.infinigen import InfiniGen
from kvbench.strategies.selecting.infllm import InfLLM
from kvbench.strategies.selecting.kascade import Kascade
from kvbench.strategies.selecting.magicpig import MagicPIG
from kvbench.strategies.selecting.minference import MInference
from kvbench.strategies.selecting.pariskv import ParisKV
from kvbench.strategies.selecting.pqcache import PQCache
from kvbench.strategies.selecting.quest import Quest
from kvbench.strategies.selecting.retroinfer import RetroInfer
from kvbench.strategies.selecting.rocketkv import RocketKV
from kvbench.strategies.selecting.shadowkv import ShadowKV
from kvbench.strategies.selecting.squeezed_attention import SqueezedAttention
from kvbench.strategies.selecting.twilight import Twilight
from kvbench.strategies.selecting.vattention import VAttention


@hookimpl
def kvbench_policies(indexes: list[type[Index]]) -> list[type[KVCachePolicy]]:
    """Register the built-in policies, and a retrieval policy for every index that has none of its own."""
    return [
        Full, FullNoCache,
        StreamingLLM, H2O, TOVA, SnapKV, KeyDiff, KNorm, ExpectedAttention, KVzip, KVzap, DuoAttention,
        LagKV, ChunkKV, CriticalKV, Compactor, RKV, TriAttention,
        Quest, InfLLM, InfiniGen, ShadowKV, SqueezedAttention, PQCache, MagicPIG, RetroInfer,
        DoubleSparsity, VAttention, Twilight, Kascade, RocketKV, ParisKV, MInference,
        RETRIEVAL,
        KIVI, ThinK, Int8, FP8, TurboQuant,
        Random, OracleTopK, OracleTopP, OracleFuture,
        *(retrieval_policy(index) for index in indexes if index is not RoarGraph),
    ]  # fmt: skip


RETRIEVAL = retrieval_policy(
    RoarGraph,
    name="retrieval",
    summary="RetrievalAttention: top-k over offloaded keys by a graph built from the prompt's queries.",
    reference=(
        "Liu et al., RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval, arXiv 2409.10516"
    ),
)


@hookimpl
def kvbench_budgets() -> list[type[BudgetAllocator]]:
    """Register the built-in budget allocators."""
    return [Uniform, Pyramid, Ada, Squeeze, Profile]
