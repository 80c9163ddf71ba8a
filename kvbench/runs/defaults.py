"""What a run has where nothing else was asked for; names alone, so that commands that only print need no torch."""

PROBE_TOKENS = 32
"""Of the answer that an example is given again with probes."""
