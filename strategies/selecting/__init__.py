"""Policies that keep everything and select from it at each step."""
