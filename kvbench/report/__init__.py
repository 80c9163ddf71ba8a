"""A report of finished runs: a page that a person can read and send on, its figures, and the data behind them."""

from kvbench.report.build import FORMATS, Report, build

__all__ = ["FORMATS", "Report", "build"]
