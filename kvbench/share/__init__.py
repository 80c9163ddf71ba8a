"""Finished runs for others: files of lm-evaluation-harness's layout, data sets and cards for the Hub, trackers."""
