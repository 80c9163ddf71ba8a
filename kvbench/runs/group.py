"""Runs that go over a task's examples together; one that fails leaves the others alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from kvbench.runs.results import Run, RunConfig

Failed = Callable[[RunConfig, Exception], None]
"""Is told of a run that failed, and how."""


@contextmanager
def telling(failed: Failed | None, config: RunConfig) -> Iterator[None]:
    """Tell `failed`, where there is one, of an error of the block instead of raising it."""
    try:
        yield
    except Exception as error:  # a plugin may raise anything
        if failed is None:
            raise
        failed(config, error)


class Group:
    """Runs that go over a task's examples together, each with its open folder; one that fails leaves the group."""

    def __init__(self, failed: Failed | None) -> None:
        self._failed = failed
        self._folders: dict[str, ExitStack] = {}
        self._runs: dict[str, Run] = {}

    @property
    def runs(self) -> list[Run]:
        """Those that have not failed."""
        return list(self._runs.values())

    def open(self, run: Run, folders: ExitStack) -> None:
        """Open a run's folder for writing, until the run is closed or fails, or `folders` ends."""
        self._runs[run.config.hash] = run
        folder = self._folders[run.config.hash] = folders.enter_context(ExitStack())
        folder.enter_context(run.writing())

    def close(self, run: Run) -> None:
        """Finish a run, unless that was done before."""
        if (folder := self._folders.pop(run.config.hash, None)) is not None:
            folder.close()

    @contextmanager
    def alone(self, run: Run) -> Iterator[None]:
        """Let an error of the block end this run only."""
        with telling(self._failed, run.config):
            try:
                yield
            except Exception as error:
                del self._runs[run.config.hash]
                folder = self._folders.pop(run.config.hash, None)
                if folder is not None:
                    folder.__exit__(type(error), error, error.__traceback__)
                raise

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error of the block, which is no single run's, end all that are left."""
        try:
            yield
        except Exception as error:
            if self._failed is None:
                raise
            for run in self.runs:
                with self.alone(run):
                    raise error from None
