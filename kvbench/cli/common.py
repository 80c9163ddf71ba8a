"""What the commands share: the application, its consoles, its options and their parsing."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console

from kvbench.api.formats import mib, seconds, share
from kvbench.api.given import allocation, byte_size, joined, listed, numbers, whole_or
from kvbench.contract.errors import KVBenchError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from kvbench.catalogue import Catalogue
    from kvbench.plugins import Registry

__all__ = [
    "allocation",
    "byte_size",
    "joined",
    "listed",
    "mib",
    "numbers",
    "seconds",
    "share",
    "whole_or",
]  # what the commands take from here

app = typer.Typer(
    help="Benchmark KV-cache policies of long-context language models.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
# Names of policies, models and folders are shown as they are: brackets are no markup, colons no emoji.
out = Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)

EVERY_S, MANY = 10.0, 500
"""Seconds between two lines in a log about something of more parts than so many."""

P = ParamSpec("P")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Name = Annotated[str | None, typer.Argument(help="Describe this one.")]
Model = Annotated[str, typer.Option(help="Known name, Hugging Face id or local folder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: cuda where there is one]")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16. [default: float32 on the CPU]")]


RopeScaling = Annotated[
    str | None,
    typer.Option(
        help="yarn: extend the model where its limit is shorter than the context; yarn:4: by this factor always."
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="auto: spread the model by layer over all GPUs, and over memory and disk where these are full."),
]
Layers = Annotated[list[str] | None, typer.Option(help="Layer; several by commas, or the option again. [default: all]")]
CapturedLayers = Annotated[
    list[str] | None, typer.Option(help="Layer; several by commas, or the option again. [default: all captured]")
]
Heads = Annotated[
    list[str] | None, typer.Option(help="Query head; several by commas, or the option again. [default: all]")
]


def interruptible(command: Callable[P, None]) -> Callable[P, None]:
    """Make Ctrl-C end a command with one sentence and exit code 130."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            err.print("Interrupted. What is finished is kept; the same command continues after it.", style="red")
            raise typer.Exit(130) from None

    return wrapper


def load_registry() -> Registry:
    """All plugins; those that failed are named on stderr."""
    from kvbench.catalogue import remember  # noqa: PLC0415
    from kvbench.plugins import registry  # noqa: PLC0415  torch takes seconds to import; --help stays quick

    found = registry()
    remember(found)
    warn_of(found.failures)
    return found


def load_catalogue() -> Catalogue:
    """What all plugins registered, without importing them where nothing changed; those that failed on stderr."""
    from kvbench.catalogue import catalogue  # noqa: PLC0415

    found = catalogue()
    warn_of(found.failures)
    return found


def warn_of(failures: list[str]) -> None:
    """Name the plugins that failed on stderr."""
    for failure in failures:
        err.print(f"Warning: {failure}; its extensions are missing.", style="yellow", highlight=False, soft_wrap=True)


def pairs(values: list[str] | None) -> dict[str, str]:
    """Options given as name=value."""
    found = {}
    for value in values or []:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise KVBenchError(f"Option '{value}' is not of the form name=value.")
        found[key.replace("-", "_")] = text
    return found


def grouped(values: dict[str, str], into: str) -> dict[str, Any]:
    """Options of the form part.name=value put together by part under the option `into`, the others left as they are."""
    found: dict[str, Any] = {key: text for key, text in values.items() if "." not in key}
    parts: dict[str, dict[str, str]] = {}
    for key, text in values.items():
        part, dot, name = key.partition(".")
        if dot:
            parts.setdefault(part, {})[name] = text
    return {**found, into: parts} if parts else found


def paths(values: Sequence[Path] | None) -> list[Path]:
    """Files or folders of an option given once or again and again; one that is not there is parted at its commas."""
    return [
        Path(part.strip())
        for value in values or ()
        for part in ([str(value)] if value.exists() else str(value).split(","))
        if part.strip()
    ]


class Steps:
    """A live bar on a terminal of parts that are finished and what happens now, else a line for each finished part."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

        self._bars = Progress(
            BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False), console=err,
        )  # fmt: skip
        self._bar: TaskID | None = None
        self._of = 0
        self._done, self._at = -1, 0.0

    def __enter__(self) -> Steps:
        if err.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def step(self, done: int, of: int, now: str) -> None:
        """Show it; in a log at most every ten seconds where parts are many."""
        if not err.is_terminal:
            if done != self._done and time.monotonic() - self._at >= (EVERY_S if of > MANY else 0):
                self.say(f"[{done}/{of}] {now}")
                self._done, self._at = done, time.monotonic()
            return
        if self._bar is None or of != self._of:
            if self._bar is not None:
                self._bars.remove_task(self._bar)
            self._bar, self._of = self._bars.add_task(now, total=of), of
        self._bars.update(self._bar, completed=done, description=now)

    def say(self, message: str) -> None:
        """Write a line above the bar."""
        self._bars.console.print(message, style="dim", highlight=False, markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """Write a warning above the bar."""
        self._bars.console.print(f"Warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)
