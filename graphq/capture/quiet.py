"""transformers without its progress bars and warnings."""

import contextlib
from collections.abc import Generator


@contextlib.contextmanager
def silent_transformers() -> Generator[None]:
    """Nothing but errors is logged by transformers, and no progress shown, while it lasts."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
