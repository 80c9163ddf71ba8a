"""Measurements of attention and retrieval, and the probes that collect them during a run."""

from kvbench.analysis.probes import Density, Latency, OutputError, Overlap, Recall, Recovery, Sparsity
from kvbench.hookspecs import hookimpl
from kvbench.policy import Probe


@hookimpl
def kvbench_probes() -> list[type[Probe]]:
    """Register the built-in probes."""
    return [Recall, Recovery, Density, OutputError, Sparsity, Overlap, Latency]
