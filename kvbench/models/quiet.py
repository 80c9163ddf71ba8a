"""Keeps what transformers writes off the terminal."""

import contextlib
import io
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*, gguf: bool) -> Iterator[None]:
    """Keep the progress bars and the reports of transformers off the terminal."""
    from transformers.utils import logging  # noqa: PLC0415

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # The bar of the GGUF reader listens to no setting.
        with contextlib.redirect_stderr(io.StringIO()) if gguf else contextlib.nullcontext():
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
