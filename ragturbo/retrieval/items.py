"""One pair of an input, the columns of a table it may come from, and the checks that need no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# CLIP reads 77 tokens; a caption of megabytes is a mistake or an attack.
MAX_CAPTION = 16_384


@dataclass(frozen=True)
class Item:
    """One pair to encode, or the `problem` that prevents it."""

    caption: str = ""
    image: Any = None
    source: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns of a table.

    `image` is a column, or a pattern such as "train/{image_id}.jpg" or "images/{url:name}", where `:name` and `:stem`
    take the file name of a URL or path. Image paths are under `root`.
    """

    caption: str = "caption"
    image: str = "image"
    root: Path | None = None
    keep: Sequence[str] | None = None
    """The user's own columns to store; None: all."""

    def extra(self, row: Mapping[Any, Any], used: set[str]) -> dict[str, Any]:
        names = [name for name in row if name not in used and name is not None] if self.keep is None else self.keep
        return {str(name): row.get(name) for name in names}


def check_caption(caption: Any) -> str | None:
    """Return why a caption cannot be stored, or None."""
    if not isinstance(caption, str):
        return f"the caption is {type(caption).__name__}, not text"
    if not caption.strip():
        return "the caption is empty"
    if len(caption) > MAX_CAPTION:
        return f"the caption has {len(caption)} characters, more than {MAX_CAPTION}"
    try:
        caption.encode()
    except UnicodeEncodeError:
        return "the caption is not valid Unicode; is the file UTF-8?"
    return None


def utf16(start: bytes) -> bool:
    """Whether a file starts with the byte-order mark of UTF-16 or UTF-32."""
    return start.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
