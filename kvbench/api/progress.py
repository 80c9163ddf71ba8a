"""Says how far a call is: a live bar on a terminal, a line that is written over in a notebook or a log."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from kvbench.runs.results import RunConfig


class Reporter(Protocol):
    """Is told what happens while a call works."""

    def warn(self, message: str) -> None:
        """Something was amiss and has been dealt with."""

    def say(self, message: str) -> None:
        """Something that a user may want to know."""


class RunReporter(Reporter, Protocol):
    """Is told how far runs are; a context, entered while they work."""

    def begin(self, configs: Sequence[RunConfig]) -> None:
        """These runs start."""

    def __call__(self, config: RunConfig, done: int, of: int, note: str) -> None:
        """`done` of `of` examples of a run are finished."""

    def __enter__(self) -> Self:
        """Start to show it."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop to show it."""


class Told:
    """What Python's callers get: warnings, and with `shown` one line on stderr that is written over."""

    def __init__(self, shown: bool | None) -> None:
        self._shown = _seen() if shown is None else shown
        self._length = 0

    def warn(self, message: str) -> None:
        """Warn, as Python does."""
        warnings.warn(message, stacklevel=4)

    def say(self, message: str) -> None:
        """Write a line."""
        if self._shown:
            self._clear()
            print(message, file=sys.stderr)

    def show(self, message: str) -> None:
        """Write over the line."""
        if self._shown:
            self._clear()
            print(message, end="", file=sys.stderr, flush=True)
            self._length = len(message)

    def _clear(self) -> None:
        if self._length:
            print("\r" + " " * self._length, end="\r", file=sys.stderr)
            self._length = 0

    def begin(self, configs: Sequence[RunConfig]) -> None:
        """Say that it begins."""
        self.show(f"{', '.join(config.policy for config in configs)}: {configs[0].examples} examples each")

    def __call__(self, config: RunConfig, done: int, of: int, note: str) -> None:
        """Show how far a policy is."""
        self.show(f"{config.policy}: {done} of {of} examples{f' ({note})' if note else ''}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()


def _seen() -> bool:
    """Whether somebody looks at stderr: a terminal, or a notebook."""
    shell = sys.modules.get("IPython")
    notebook = shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None
    return notebook or sys.stderr.isatty()
