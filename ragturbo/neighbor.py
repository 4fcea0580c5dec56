"""A retrieved text-image pair, as an Output lists it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Neighbor:
    """A retrieved text-image pair.

    `score` is the retriever's own, or the cosine if the caller gave the pair. `lam` is the λ in use: the given one,
    else the cosine of the two text keys or, if larger, the share of the prompt's rare words that the caption holds.

    `caption`, `source` and `metadata` of a stored pair are read from the database on first access.
    """

    id: int
    score: float
    lam: float
    # Default factories: a default would become a class attribute, and `__getattr__` would not be called.
    caption: str | None = field(default_factory=_nothing)
    source: str | None = field(default_factory=_nothing)
    used: bool = True
    """False if its score is below min_score."""
    cosine: float = float("nan")
    """Of the two text keys."""
    bm25: float | None = None
    """With retriever="hybrid"."""
    metadata: dict[str, Any] = field(default_factory=dict)
    read_thumbnail: Callable[[], bytes | None] | None = field(default=None, repr=False, compare=False)
    """Reads from the generation it was found in."""

    @classmethod
    def stored(
        cls, id: int, read: Callable[[bool], Any], *, score: float = float("nan"), lam: float = float("nan"),
        used: bool = True, cosine: float = float("nan"), bm25: float | None = None,
    ) -> Neighbor:  # fmt: skip
        """read(with_thumbnail) returns the record. It is called on access, since it takes 0.1 ms per request."""
        neighbor = cls.__new__(cls)
        neighbor.__dict__.update(
            id=id, score=score, lam=lam, used=used, cosine=cosine, bm25=bm25, _read=read,
            read_thumbnail=lambda: read(True).thumbnail,
        )  # fmt: skip
        return neighbor

    def __getattr__(self, name: str) -> Any:
        read = self.__dict__.get("_read")
        if read is None or name not in ("caption", "source", "metadata"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        record = read(False)
        for field_, value in (("caption", record.caption), ("source", record.source), ("metadata", dict(record.extra))):
            self.__dict__.setdefault(field_, value)
        return self.__dict__[name]

    @property
    def thumbnail(self) -> bytes | None:
        """WebP bytes, read at every call; None if the database has no thumbnails."""
        return None if self.read_thumbnail is None else self.read_thumbnail()

    def image(self) -> Image | None:
        """The stored thumbnail, or None if the database has no thumbnails."""
        if (thumbnail := self.thumbnail) is None:
            return None
        from PIL import Image

        return Image.open(io.BytesIO(thumbnail)).convert("RGB")

    def __getstate__(self) -> dict[str, Any]:
        # Read everything now: the process that unpickles it may not have the database.
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return own | {"read_thumbnail": _StoredThumbnail(self.thumbnail)}


@dataclass(frozen=True)
class _StoredThumbnail:
    thumbnail: bytes | None

    def __call__(self) -> bytes | None:
        return self.thumbnail
