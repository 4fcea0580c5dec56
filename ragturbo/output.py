"""What a Generator returns."""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ragturbo.errors import InvalidRequest
from ragturbo.messages import many
from ragturbo.neighbor import Neighbor

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from ragturbo.engine.request import Request
    from ragturbo.engine.result import Result

log = logging.getLogger("ragturbo")


@dataclass
class Output:
    """`images` as `output_type` says; the other lists have one entry per image."""

    images: Any
    """A list of PIL images or of encoded files, or an array or tensor with a batch dimension."""
    neighbors: list[list[Neighbor]]
    lam: list[float]
    seeds: list[int | None]
    mode: str
    bucket: int
    """Rows of the batch the images were computed in. The same prompt, seed and bucket give the same bytes."""
    timings: dict[str, float]
    """Seconds by stage."""
    notes: list[str] = field(default_factory=list)
    """Warnings about the prompts: tokens cut off, words the model does not know and where they were found."""

    def __repr__(self) -> str:
        count = len(self.lam)
        images = many(count, "image")
        seeds = "" if None in self.seeds else f", seed {_few(self.seeds)}"
        lam = "" if self.mode == "none" else f", λ {_few([round(value, 3) for value in self.lam])}"
        notes = f", notes {self.notes}" if self.notes else ""
        return f"Output({images} {_describe(self.images)}, mode {self.mode!r}{seeds}{lam}, {self._milliseconds}{notes})"

    @property
    def _milliseconds(self) -> str:
        return f"{1e3 * self.timings['total']:.1f} ms" if "total" in self.timings else "no timings"

    @classmethod
    def make(cls, request: Request, result: Result) -> Output:
        """Convert a request's result to the requested output type."""
        images = _images(result, request.output_type, request.postprocess)
        neighbors = _neighbors(request, result)
        notes = _notes(request, neighbors)
        now = time.perf_counter()
        timings = request.timings | result.timings
        timings |= {"answer": now - result.ended, "total": now - request.started}
        seeds, lam = list(request.seeds), result.lam.tolist()
        return cls(images, neighbors, lam, seeds, request.mode, result.bucket, timings, notes)


def _few(values: list[Any]) -> str:
    shown = ", ".join(map(str, values[:4]))
    return shown if len(values) <= 4 else f"{shown}, …"


def _describe(images: Any) -> str:
    if hasattr(images, "shape"):
        return f"as {type(images).__name__} {tuple(images.shape)}"
    first = images[0] if images else None
    size = getattr(first, "size", None)
    return f"of {size[0]}x{size[1]}" if isinstance(size, tuple) else f"as {type(first).__name__}"


def _neighbors(request: Request, result: Result) -> list[list[Neighbor]]:
    if request.mode == "none":
        return [[] for _ in request.seeds]
    # The cosine of a key with itself may be above 1 by a rounding error. Neighbours of the caller have no other score.
    cosine = result.cosine.clamp(-1.0, 1.0)
    score = result.scores if request.neighbors is None else cosine
    if request.database is not None and request.database.scores_are_cosines:
        score = score.clamp(max=1.0)
    tables = {"score": score, "lam": result.lams, "used": result.valid, "cosine": cosine}
    columns = zip(*(table.tolist() for table in tables.values()), strict=True)
    rows = [[dict(zip(tables, values, strict=True)) for values in zip(*row, strict=True)] for row in columns]
    for row, found in zip(rows, result.bm25.tolist(), strict=True):
        for scores, bm25 in zip(row, found, strict=True):
            scores["bm25"] = None if math.isnan(bm25) else bm25
    if request.neighbors is None:
        assert request.database is not None
        make, ids = request.database.neighbor, result.ids.tolist()
        return [
            [make(id, **scores) for id, scores in zip(found, row, strict=True) if id >= 0]
            for found, row in zip(ids, rows, strict=True)
        ]
    given = [request.neighbors[i // request.repeats] for i in range(len(rows))]
    return [
        [replace(n, **scores) for n, scores in zip(own, row, strict=True)] for own, row in zip(given, rows, strict=True)
    ]


def _notes(request: Request, neighbors: list[list[Neighbor]]) -> list[str]:
    if not request.notes:
        return []
    from ragturbo.engine.notes import lines

    of_prompts = None if request.mode == "none" else neighbors[:: request.repeats]
    notes = lines(request.notes, of_prompts, request.database)
    if request.log_notes:
        for note in notes:
            log.warning("%s", note)
    return notes


def _images(result: Result, output_type: str, postprocess: Callable[[Any], Any] | None) -> Any:
    if output_type == "latent":
        return result.latents
    if output_type in ("np", "pt"):
        assert result.image is not None
        return result.image if output_type == "pt" else result.image.permute(0, 2, 3, 1).contiguous().numpy()
    assert result.uint8 is not None
    batch = result.uint8.numpy()
    if postprocess is not None:
        import numpy as np

        shape, returned = batch.shape, postprocess(batch)
        batch = np.asarray(returned)
        if batch.shape != shape or batch.dtype != np.uint8:
            what = "nothing" if returned is None else f"{batch.dtype} {batch.shape}"
            raise InvalidRequest(f"postprocess returned {what}, and must return uint8 {shape}", option="postprocess")
    if output_type == "uint8":
        return batch
    if output_type == "pil":
        return to_pil(batch)
    if len(batch) == 1:
        return [encode(batch[0], output_type)]
    return list(_encoders().map(encode, batch, [output_type] * len(batch)))


@lru_cache(maxsize=1)
def _encoders() -> ThreadPoolExecutor:
    """Encodes several files at once. Separate from the pool that finishes futures, whose threads wait for this one."""
    return ThreadPoolExecutor(max_workers=4, thread_name_prefix="ragturbo-encode")


def to_pil(batch: np.ndarray) -> list[Image]:
    """(B, H, W, 3) uint8 -> PIL images."""
    from PIL import Image

    return [Image.fromarray(row) for row in batch]


ENCODINGS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},
    "jpeg": {"quality": 95, "subsampling": 0},
    # Pillow's default, method 4, takes twice the time for a tenth fewer bytes (docs/images/grid.png at 512x512).
    "webp": {"quality": 90, "method": 1},
}


def encode(row: np.ndarray, kind: str) -> bytes:
    """(H, W, 3) uint8 -> the bytes of a PNG, JPEG or WebP file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(row).save(buffer, kind.upper(), **ENCODINGS[kind])
    return buffer.getvalue()
