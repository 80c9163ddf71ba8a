"""Yardsticks: exact attention, chance and oracles."""
