"""Captures: real query and key vectors, recorded and read."""
