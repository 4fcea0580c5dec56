"""What a Generator gives back."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from ragturbo.retrieval.pairs import Record


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Neighbor:
    """A text-image pair that was blended in. `score` is the retriever's own, `lam` the cosine of the two text keys.

    One from a database reads `caption`, `source` and `metadata` when one of them is first looked at.
    """

    id: int
    score: float
    lam: float
    # Factories leave no attribute on the class, which would be found before `__getattr__` is asked.
    caption: str | None = field(default_factory=_nothing)
    source: str | None = field(default_factory=_nothing)
    used: bool = True
    """False where it stayed under min_score."""
    metadata: dict[str, Any] = field(default_factory=dict)
    read_thumbnail: Callable[[], bytes | None] | None = field(default=None, repr=False, compare=False)
    """From the generation it was found in. Few look at it, and reading takes as long as a stage of the image."""

    @classmethod
    def stored(cls, id: int, score: float, lam: float, used: bool, read: Callable[[bool], Record]) -> Neighbor:
        """read(thumbnail) gives the record: not now, for that takes a tenth of a millisecond of every request."""
        neighbor = cls.__new__(cls)
        neighbor.__dict__.update(
            id=id, score=score, lam=lam, used=used, _read=read, read_thumbnail=lambda: read(True).thumbnail
        )
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
        """WebP bytes, read at every call; None where the database keeps none."""
        return None if self.read_thumbnail is None else self.read_thumbnail()

    def image(self) -> Image | None:
        """The stored thumbnail, or None where the database keeps none."""
        if (thumbnail := self.thumbnail) is None:
            return None
        from PIL import Image

        return Image.open(io.BytesIO(thumbnail)).convert("RGB")

    def __getstate__(self) -> dict[str, Any]:
        # Another process has no database open.
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return own | {"read_thumbnail": _Kept(self.thumbnail)}


@dataclass(frozen=True)
class _Kept:
    thumbnail: bytes | None

    def __call__(self) -> bytes | None:
        return self.thumbnail


@dataclass
class Output:
    """`images` in the asked-for type; the other lists have one entry an image."""

    images: Any
    neighbors: list[list[Neighbor]]
    lam: list[float]
    seeds: list[int | None]
    mode: str
    bucket: int
    """Rows of the batch the images were computed in: same prompt, seed and bucket give the same bytes."""
    timings: dict[str, float]
    """Seconds by stage."""
    notes: list[str] = field(default_factory=list)
    """What the caller should know: tokens cut off, words the model has never seen."""


def to_pil(batch: np.ndarray) -> list[Image]:
    """(B, H, W, 3) uint8 -> PIL images."""
    from PIL import Image

    return [Image.fromarray(row) for row in batch]


ENCODINGS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},
    "jpeg": {"quality": 95, "subsampling": 0},
    # Method 4, Pillow's default, takes twice the time to save a tenth of the bytes (docs/images/grid.png at 512 x 512).
    "webp": {"quality": 90, "method": 1},
}


def encode(row: np.ndarray, kind: str) -> bytes:
    """(H, W, 3) uint8 -> the bytes of a PNG, JPEG or WebP file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(row).save(buffer, kind.upper(), **ENCODINGS[kind])
    return buffer.getvalue()
