"""The `kvbench` command, a file for each command."""

from __future__ import annotations

import importlib.metadata
import io
import os
import sys
from typing import Annotated

import typer

from kvbench.cli import (  # noqa: F401  importing them registers the commands
    analyze,
    capture,
    check,
    compare,
    export,
    export_vectors,
    fit,
    history,
    index,
    leaderboard,
    lists,
    lm_eval,
    new,
    recommend,
    report,
    results,
    run,
    sweep,
    trace,
    verify,
)
from kvbench.cli.common import app, err
from kvbench.contract.errors import KVBenchError, out_of_memory, sentence

__all__ = ["app", "main"]


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"kvbench {importlib.metadata.version('kvbench')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command; errors that a user can mend are one sentence on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text that can be printed
    try:
        app()
    except KVBenchError as error:
        _fail(str(error))
    except Exception as error:
        if not out_of_memory(error):
            raise
        _fail(sentence(error))


def _fail(message: str) -> None:
    err.print(f"Error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(2)
