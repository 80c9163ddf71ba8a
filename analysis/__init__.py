"""Measurements of attention and retrieval, the analyses made of them, and the probes that collect them during a run."""

from kvbench.analysis.construction import Construction
from kvbench.analysis.ood import OOD
from kvbench.analysis.overlap import OverlapOfSets
from kvbench.analysis.probes import Density, Latency, OutputError, Overlap, Recall, Recovery, Sparsity
from kvbench.analysis.recall import RecallOverSteps
from kvbench.analysis.recovery import RecoveryByK
from kvbench.analysis.sparsity import SparsityProfile
from kvbench.hookspecs import hookimpl
from kvbench.policy import Probe
from kvbench.study import Analysis


@hookimpl
def kvbench_probes() -> list[type[Probe]]:
    """Register the built-in probes."""
    return [Recall, Recovery, Density, OutputError, Sparsity, Overlap, Latency]


@hookimpl
def kvbench_analyses() -> list[type[Analysis]]:
    """Register the built-in analyses."""
    return [OOD, RecoveryByK, RecallOverSteps, SparsityProfile, OverlapOfSets, Construction]
