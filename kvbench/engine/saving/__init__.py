"""A session's state in a file, and back."""
