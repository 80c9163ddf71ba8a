"""The contract: all that a plugin imports. It imports nothing else of kvbench."""
