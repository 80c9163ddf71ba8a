"""The one error that a user is meant to read."""


class KVBenchError(Exception):
    """Bad input or an unusable environment: one sentence that names the value, what was expected and what to do."""
