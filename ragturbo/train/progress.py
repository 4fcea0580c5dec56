"""A progress bar on a terminal, and this process's rank and device as the launcher sets them.

Imports torch only to look for a GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun and `accelerate launch` set them; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_device() -> str:
    """This process's GPU, or "cpu"."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def loading(model: object) -> Iterator[None]:
    """Show on a terminal, in the first process, that torch is imported or that the model is loaded."""
    from ragturbo import terminal

    if rank_and_world()[0] > 0:
        terminal.quiet_libraries()
        yield
        return
    with terminal.loading(model):
        yield


def track(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """Iterate over `items` with a progress bar on stderr, if that is a terminal and this is the first process."""
    from rich.console import Console
    from rich.progress import track as bar

    hidden = not sys.stderr.isatty() or rank_and_world()[0] > 0
    return bar(items, description=what, total=total, console=Console(stderr=True), disable=hidden)
