"""Measurements of attention and retrieval, the analyses made of them, and the probes that collect them during a run."""

from kvbench.analysis.probes.standard import Density, Latency, OutputError, Overlap, Recall, Recovery, Sparsity
from kvbench.analysis.studies.construction import Construction
from kvbench.analysis.studies.latency import LatencyBreakEven
from kvbench.analysis.studies.ood import OOD
from kvbench.analysis.studies.overlap import OverlapOfSets
from kvbench.analysis.studies.recall import RecallOverSteps
from kvbench.analysis.studies.recovery import RecoveryByK
from kvbench.analysis.studies.sparsity import SparsityProfile
from kvbench.contract.analysis import Analysis
from kvbench.contract.markers import hookimpl
from kvbench.contract.probe import Probe


@hookimpl
def kvbench_probes() -> list[type[Probe]]:
    """Register the built-in probes."""
    return [Recall, Recovery, Density, OutputError, Sparsity, Overlap, Latency]


@hookimpl
def kvbench_analyses() -> list[type[Analysis]]:
    """Register the built-in analyses."""
    return [OOD, RecoveryByK, RecallOverSteps, SparsityProfile, OverlapOfSets, Construction, LatencyBreakEven]
