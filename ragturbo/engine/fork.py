"""A process that has run a model must not be forked: torch's threads do not exist in the child."""

from __future__ import annotations

import os

from ragturbo.errors import GenerationError

_used = False
_forked_after_use = False


def note_use() -> None:
    """Called before a model runs in this process."""
    global _used
    _used = True


def refuse_after_fork() -> None:
    """Raise GenerationError in a child of a process that has run a model: torch would hang, or CUDA would fail."""
    if _forked_after_use:
        raise GenerationError(
            f"process {os.getpid()} was forked from one that had already run a model, and torch cannot continue in it. "
            "Make the first Generator after forking, or start workers by 'spawn'."
        )


def _after_fork() -> None:
    global _forked_after_use
    _forked_after_use = _forked_after_use or _used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
