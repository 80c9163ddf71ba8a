"""Options of the walk over all models."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_addoption(parser):
    parser.addoption("--write-models", action="store_true", help="write the table of docs/models.md anew")
