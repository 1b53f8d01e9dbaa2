"""Silence for what diffusers and transformers say too often: bars over local files, and every caption that is cut.

Downloads keep their bars: those belong to huggingface_hub.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def quiet_bars() -> Iterator[None]:
    """No loading or saving bars inside the block."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    shown = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, was_shown in zip(libraries, shown, strict=True):
            if was_shown:
                library.enable_progress_bar()


def _is_news(record: logging.LogRecord) -> bool:
    told = str(record.msg)
    return "sequence length is longer than the specified maximum" not in told and "input was truncated" not in told


@contextmanager
def quiet_truncation(pipeline: Any) -> Iterator[None]:
    """No line for each text that is longer than the pipeline's tokenizer takes, and none of the text in it."""
    names = ("transformers.tokenization_utils_base", type(pipeline).__module__)
    with ExitStack() as stack:
        for logger in map(logging.getLogger, names):
            logger.addFilter(_is_news)
            stack.callback(logger.removeFilter, _is_news)
        yield
