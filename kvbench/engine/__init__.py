"""Carries the contract inside an unchanged model."""
