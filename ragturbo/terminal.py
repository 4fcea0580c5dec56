"""Terminal output: results go to stdout, progress to stderr, and only if that is a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def interactive() -> bool:
    return sys.stderr.isatty()


def quiet_libraries() -> None:
    """Turn off the progress bars of transformers and diffusers. Call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()


@contextmanager
def loading(model: object) -> Iterator[None]:
    """Show on a terminal that torch is imported or that the model is loaded, with the seconds so far."""
    quiet_libraries()
    if not interactive():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Stage(TextColumn):
        def render(self, task: Task) -> Text:
            return Text("importing torch" if _importing("torch") else f"loading {model}")

    with Progress(SpinnerColumn(), Stage(""), TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        bar.add_task("", total=None)
        yield


def _importing(name: str) -> bool:
    """Whether another frame is in the middle of importing a module."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))
