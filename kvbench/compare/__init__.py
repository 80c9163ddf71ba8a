"""Comparing runs: statistics, paired differences and the leaderboard."""
