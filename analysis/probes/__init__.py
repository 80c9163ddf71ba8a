"""Probes: what is measured while a run is under way."""
