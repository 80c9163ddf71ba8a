"""Doors from other tools: pytest and lm-evaluation-harness."""
