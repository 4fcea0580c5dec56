"""The wording that messages share: singular and plural, and shortened texts."""

from __future__ import annotations

_SHOWN = 80


def many(count: int, noun: str) -> str:
    """many(1, "pair") is "1 pair", many(2, "pair") "2 pairs"."""
    return f"{count} {noun if count == 1 else noun + 's'}"


def cut(text: str, most: int = _SHOWN) -> str:
    """Return a text on one line, cut to `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
