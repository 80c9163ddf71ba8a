"""Policies that evict: what they drop is gone."""
