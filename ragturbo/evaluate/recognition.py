"""Find the things in a picture of the shapes world: segmentation, then a fit of the exact shapes; no learned model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from ragturbo.errors import InvalidRequest
from ragturbo.evaluate.rendering import PALETTE, coverage, inside
from ragturbo.evaluate.world import COLOURS, GROUNDS, SHAPES, SIDE, SIZES

# Smallest RGB distance between a thing and the background.
_MIN_CONTRAST = 45.0
# In pixels; the smallest thing, a small star, has 60.
_MIN_AREA = 25
# Smallest intersection over union of a blob with a shape for it to count as that shape.
_MIN_FIT = 0.7


@dataclass(frozen=True)
class RecognisedThing:
    """One blob; `shape` and `size` are None if no shape fits."""

    shape: str | None
    colour: str
    size: str | None
    x: float
    y: float


@dataclass(frozen=True)
class RecognisedPicture:
    ground: str | None
    things: tuple[RecognisedThing, ...]


def recognise(image: np.ndarray) -> RecognisedPicture:
    """Find background and things of an image, (64, 64, 3) uint8."""
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise InvalidRequest(f"expected a ({SIDE}, {SIDE}, 3) uint8 image, not {image.shape} {image.dtype}")
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3),
                             pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    ground = np.median(border, axis=0)
    name, distance = _nearest(ground, GROUNDS)
    foreground = np.linalg.norm(pixels - ground, axis=-1) > _MIN_CONTRAST
    things = []
    for blob in components(foreground):
        if blob.sum() >= _MIN_AREA:
            things += [_recognise_thing(part, pixels, ground) for part in _split_by_colour(blob, pixels)]
    return RecognisedPicture(name if distance < 60 else None, tuple(things))


def components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the four-connected components of a mask as boolean masks."""
    labels = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    while True:
        largest = np.maximum.reduce([labels, *_neighbours(labels)]) * mask
        # Follow the label of the label: long blobs converge in a few iterations instead of one per pixel.
        largest = np.concatenate([[0], largest.ravel()])[largest]
        if (largest == labels).all():
            break
        labels = largest
    for value in np.unique(labels[mask]):
        yield labels == value


def _neighbours(array: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the array shifted by one pixel in each of the four directions."""
    wide = np.pad(array, 1)
    return wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]


def _nearest(colour: np.ndarray, names: tuple[str, ...]) -> tuple[str, float]:
    distances = np.linalg.norm(np.array([PALETTE[name] for name in names]) - colour, axis=-1)
    return names[int(distances.argmin())], float(distances.min())


def _split_by_colour(blob: np.ndarray, pixels: np.ndarray) -> list[np.ndarray]:
    """Split a blob in which two things of different colours touch."""
    inner = np.logical_and.reduce([blob, *_neighbours(blob)])
    palette = np.array([PALETTE[name] for name in COLOURS], np.float32)
    labels = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(-1)
    counts = np.bincount(labels[inner], minlength=len(COLOURS))
    first, second = np.argsort(-counts)[:2]
    if counts[second] < max(12, 0.3 * counts[first]):
        return [blob]
    closer = np.linalg.norm(pixels - palette[first], axis=-1) <= np.linalg.norm(pixels - palette[second], axis=-1)
    parts = [part for side in (blob & closer, blob & ~closer) for part in components(side) if part.sum() >= _MIN_AREA]
    return parts or [blob]


def _recognise_thing(blob: np.ndarray, pixels: np.ndarray, ground: np.ndarray) -> RecognisedThing:
    inner = np.logical_and.reduce([blob, *_neighbours(blob)])
    core = inner if inner.sum() >= 6 else blob
    colour = np.median(pixels[core], axis=0)
    # Recover the coverage of edge pixels from their mixture of thing and background colour.
    way = colour - ground
    share = np.clip((pixels - ground) @ way / max(float(way @ way), 1.0), 0, 1)
    share *= np.logical_or.reduce([blob, *_neighbours(blob)])
    area = float(share.sum())
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    centre = np.array([(share * columns).sum(), (share * rows).sum()]) / area
    fits = [_fit(shape, share, area, centre) for shape in SHAPES]
    best = max(range(len(SHAPES)), key=lambda i: fits[i][0])
    fit, radius, x, y = fits[best]
    name, _ = _nearest(colour, COLOURS)
    if fit < _MIN_FIT:
        return RecognisedThing(None, name, None, float(centre[0]), float(centre[1]))
    size = min(SIZES, key=lambda name: abs(np.log(SIZES[name] / radius)))
    return RecognisedThing(SHAPES[best], name, size, x, y)


def _fit(shape: str, share: np.ndarray, area: float, centre: np.ndarray) -> tuple[float, float, float, float]:
    """Fit a shape of the blob's area and centroid; returns (intersection over union, half extent, x, y)."""
    unit_area, offset = _unit(shape)
    radius = max(1.0, round(4 * np.sqrt(area / unit_area)) / 4)
    x, y = (round(4 * float(c - radius * o)) / 4 for c, o in zip(centre, offset, strict=True))
    left, top = int(np.floor(x)), int(np.floor(y))
    mask = coverage(shape, radius, x - left, y - top)
    half = mask.shape[0] // 2
    # A canvas larger than the picture: the part of a shape outside of the picture counts against the fit.
    canvas = np.zeros((3 * SIDE, 3 * SIDE), np.float32)
    canvas[SIDE : 2 * SIDE, SIDE : 2 * SIDE] = share
    window = canvas[SIDE + top - half : SIDE + top + half, SIDE + left - half : SIDE + left + half]
    shared = float(np.minimum(window, mask).sum())
    return shared / (area + float(mask.sum()) - shared), radius, x, y


@cache
def _unit(shape: str) -> tuple[float, tuple[float, float]]:
    """Return area and centroid (x, y) of a shape with half extent 1."""
    line = (np.arange(512) + 0.5) / 256 - 1
    u, v = np.meshgrid(1.1 * line, 1.1 * line)
    hit = inside(shape, u, v)
    return float(hit.mean() * 2.2**2), (float(u[hit].mean()), float(v[hit].mean()))
