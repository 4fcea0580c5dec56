"""The wording that messages share: singular and plural, and shortened texts and values."""

from __future__ import annotations

import re
from typing import Any

_SHOWN = 80


def many(count: int, noun: str) -> str:
    """many(1, "pair") is "1 pair", many(2, "pair") "2 pairs"."""
    return f"{count} {noun if count == 1 else noun + 's'}"


def cut(text: str, most: int = _SHOWN) -> str:
    """Return a text on one line, cut to `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def cut_path(path: str, most: int = _SHOWN) -> str:
    """Return a path whose start is cut off if it is long: its end says which file it is."""
    return path if len(path) <= most else f"…{path[1 - most :]}"


def short(value: Any, most: int = 80) -> str:
    """repr(value) for a message, cut in the middle if it is long."""
    if hasattr(value, "shape") and not isinstance(value, type):
        return f"<{type(value).__name__} of shape {tuple(value.shape)}>" if tuple(value.shape) else repr(value)[:most]
    # Without addresses in memory.
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return text if len(text) <= most else f"{text[: most - 20]} … {text[-17:]}"
