"""Keeps what transformers writes off the terminal, but for the bar of a model that is being read."""

import contextlib
import io
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*, gguf: bool, bar: bool = False) -> Iterator[None]:
    """Keep the reports of transformers off the terminal, and its progress bars unless `bar` asks for them there."""
    from transformers.utils import logging  # noqa: PLC0415

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if not (bar and on_terminal()):
        logging.disable_progress_bar()
    try:
        # The bar of the GGUF reader listens to no setting.
        with contextlib.redirect_stderr(io.StringIO()) if gguf else contextlib.nullcontext():
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def on_terminal() -> bool:
    """Whether stderr is a terminal that nothing else draws on: a live table of ours takes its place while it is."""
    return sys.stderr is sys.__stderr__ and sys.stderr is not None and sys.stderr.isatty()
