"""One pair of an input, the columns of a table it may come from, and the checks that need no model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragturbo.errors import InvalidRequest
from ragturbo.messages import cut, short

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# CLIP reads 77 tokens; a caption of megabytes is a mistake or an attack.
MAX_CAPTION = 16_384
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_WORDS: dict[type, str] = {str: "a text", list: "a list", tuple: "a list", dict: "a dictionary"}


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

    def __post_init__(self) -> None:
        for name in ("caption", "image"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise InvalidRequest(f"{name}={short(value)} must be the name of a column", option=name)
        if self.keep is not None:
            names = () if isinstance(self.keep, (str, bytes)) or not isinstance(self.keep, Iterable) else self.keep
            kept = tuple(names)
            if names is not self.keep or not all(isinstance(name, str) for name in kept):
                raise InvalidRequest(f"columns={short(self.keep)} must be a list of names of columns", option="columns")
            object.__setattr__(self, "keep", kept)

    def refuse(self, where: str, names: Sequence[str] = ("caption", "image", "image_root", "columns")) -> None:
        """Raise InvalidRequest if one of these options is given, for an input of which it selects nothing."""
        given = {"caption": self.caption, "image": self.image, "image_root": self.root, "columns": self.keep}
        default = Columns()
        unset = {"caption": default.caption, "image": default.image}
        for name in names:
            value = given[name]
            if not value or value == unset.get(name):
                continue
            kept = ", ".join(self.keep or ())
            shown = f"the choice of columns ({kept})" if name == "columns" else f"{name}={str(value)!r}"
            raise InvalidRequest(f"{shown} has no effect on {where}: it is for tables", option=name)

    def extra(self, row: Mapping[Any, Any], used: set[str]) -> dict[str, Any]:
        names = [name for name in row if name not in used and name is not None] if self.keep is None else self.keep
        return {str(name): row.get(name) for name in names}


def check_caption(caption: Any) -> str | None:
    """Return why a caption cannot be stored, or None."""
    if not isinstance(caption, str):
        return f"the caption is {kind_of(caption)}, not text"
    if not caption.strip():
        return "the caption is empty"
    if len(caption) > MAX_CAPTION:
        return f"the caption has {len(caption)} characters, more than {MAX_CAPTION}"
    if "\0" in caption:
        return "the caption has a NUL character"
    try:
        caption.encode()
    except UnicodeEncodeError:
        return "the caption is not valid Unicode; is the file UTF-8?"
    return None


def check_place(image: str) -> str | None:
    """Return why a text does not name an image file, or None."""
    if not image.strip():
        return "the image is empty"
    if _URL.match(image):
        return f"the image {cut(image)!r} is a URL: download the images first"
    return None


def kind_of(value: Any) -> str:
    """Say what a value is, in words, for messages."""
    if value is None:
        return "nothing"
    if hasattr(value, "shape"):
        return "an array"
    name = type(value).__name__
    if name.endswith("Image") or name.endswith("ImageFile"):
        return "an image"
    return _WORDS.get(type(value), name)


def utf16(start: bytes) -> bool:
    """Whether a file starts with the byte-order mark of UTF-16 or UTF-32."""
    return start.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
