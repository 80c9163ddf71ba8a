"""Proof, on a run's own model, that a model runs as in transformers and a policy keeps its promises."""
