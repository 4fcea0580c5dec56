"""Terminal output: results go to stdout, progress to stderr, and only if that is a terminal."""

from __future__ import annotations

import os
import sys


def interactive() -> bool:
    return sys.stderr.isatty()


def quiet_libraries() -> None:
    """Turn off the progress bars of transformers and diffusers. Call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules or not interactive():
        from transformers.utils import logging

        logging.disable_progress_bar()
