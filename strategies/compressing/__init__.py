"""Policies that hold all tokens in fewer bytes."""
