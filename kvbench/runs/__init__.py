"""Runs: policies on a task's examples, their results on disk, and sweeps of them."""
