"""What is in a picture of the shapes world, by segmentation and by fitting the exact shapes: nothing is learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..errors import InvalidRequest
from .drawing import PALETTE, coverage, inside
from .world import COLOURS, GROUNDS, SHAPES, SIDE, SIZES

# Farther than this from the ground, in RGB, a pixel belongs to a thing.
_APART = 45.0
# Fewer pixels than this are a speck; the smallest thing of the world, a small star, has 60.
_SPECK = 25
# A blob that no shape covers better than this (intersection over union) has no shape.
_FIT = 0.7


@dataclass(frozen=True)
class Seen:
    """One blob: `shape` and `size` are None where nothing of the world fits it."""

    shape: str | None
    colour: str
    size: str | None
    x: float
    y: float
    fit: float


@dataclass(frozen=True)
class Picture:
    ground: str | None
    things: tuple[Seen, ...]


def look(image: np.ndarray) -> Picture:
    """image: (64, 64, 3) uint8."""
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        wanted = f"({SIDE}, {SIDE}, 3) uint8"
        raise InvalidRequest(f"a picture of the shapes world is {wanted}, not {image.shape} {image.dtype}")
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3),
                             pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    ground = np.median(border, axis=0)
    name, distance = nearest(ground, GROUNDS)
    foreground = np.linalg.norm(pixels - ground, axis=-1) > _APART
    things = []
    for blob in components(foreground):
        if blob.sum() >= _SPECK:
            things += [_recognise(part, pixels, ground) for part in _by_colour(blob, pixels)]
    return Picture(name if distance < 60 else None, tuple(things))


def components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """The four-connected parts of a mask, one boolean mask each."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        wide = np.pad(label, 1)
        top = np.maximum.reduce([label, wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]]) * mask
        # Jump to the label of the label: a long blob settles in a few rounds, not one round a pixel.
        top = np.where(mask, np.concatenate([[0], top.ravel()])[top], 0)
        if (top == label).all():
            break
        label = top
    for value in np.unique(label[mask]):
        yield label == value


def nearest(colour: np.ndarray, names: tuple[str, ...]) -> tuple[str, float]:
    distances = np.linalg.norm(np.array([PALETTE[name] for name in names]) - colour, axis=-1)
    return names[int(distances.argmin())], float(distances.min())


def _by_colour(blob: np.ndarray, pixels: np.ndarray) -> list[np.ndarray]:
    """The blob, or two parts of it where two things of different colours touch."""
    inner = _eroded(blob)
    palette = np.array([PALETTE[name] for name in COLOURS], np.float32)
    labels = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(-1)
    counts = np.bincount(labels[inner], minlength=len(COLOURS))
    first, second = np.argsort(-counts)[:2]
    if counts[second] < max(12, 0.3 * counts[first]):
        return [blob]
    closer = np.linalg.norm(pixels - palette[first], axis=-1) <= np.linalg.norm(pixels - palette[second], axis=-1)
    parts = [part for side in (blob & closer, blob & ~closer) for part in components(side) if part.sum() >= _SPECK]
    return parts or [blob]


def _recognise(blob: np.ndarray, pixels: np.ndarray, ground: np.ndarray) -> Seen:
    inner = _eroded(blob)
    core = inner if inner.sum() >= 6 else blob
    colour = np.median(pixels[core], axis=0)
    # Coverage, back from the mixture of thing and ground at the blob's edge.
    way = colour - ground
    share = np.clip((pixels - ground) @ way / max(float(way @ way), 1.0), 0, 1) * _dilated(blob)
    area = float(share.sum())
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    centre = np.array([(share * columns).sum(), (share * rows).sum()]) / area
    fits = [_fit(shape, share, area, centre) for shape in SHAPES]
    best = max(range(len(SHAPES)), key=lambda i: fits[i][0])
    fit, radius, x, y = fits[best]
    if fit < _FIT:
        return Seen(None, nearest(colour, COLOURS)[0], None, float(centre[0]), float(centre[1]), fit)
    size = min(SIZES, key=lambda name: abs(np.log(SIZES[name] / radius)))
    return Seen(SHAPES[best], nearest(colour, COLOURS)[0], size, x, y, fit)


def _fit(shape: str, share: np.ndarray, area: float, centre: np.ndarray) -> tuple[float, float, float, float]:
    """How well the shape of the blob's area and centroid covers it: (intersection over union, half extent, x, y)."""
    unit_area, offset = _unit(shape)
    radius = max(1.0, round(4 * np.sqrt(area / unit_area)) / 4)
    x, y = (round(4 * float(c - radius * o)) / 4 for c, o in zip(centre, offset, strict=True))
    left, top = int(np.floor(x)), int(np.floor(y))
    mask = coverage(shape, radius, x - left, y - top)
    half = mask.shape[0] // 2
    # On a canvas wide enough for any blob: what falls outside the picture counts against the fit.
    canvas = np.zeros((3 * SIDE, 3 * SIDE), np.float32)
    canvas[SIDE : 2 * SIDE, SIDE : 2 * SIDE] = share
    window = canvas[SIDE + top - half : SIDE + top + half, SIDE + left - half : SIDE + left + half]
    shared = float(np.minimum(window, mask).sum())
    return shared / (area + float(mask.sum()) - shared), radius, x, y


@cache
def _unit(shape: str) -> tuple[float, tuple[float, float]]:
    """Area and centroid (x, y) of a shape of half extent 1."""
    line = (np.arange(512) + 0.5) / 256 - 1
    u, v = np.meshgrid(1.1 * line, 1.1 * line)
    hit = inside(shape, u, v)
    return float(hit.mean() * 2.2**2), (float(u[hit].mean()), float(v[hit].mean()))


def _eroded(mask: np.ndarray) -> np.ndarray:
    wide = np.pad(mask, 1)
    return mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]


def _dilated(mask: np.ndarray) -> np.ndarray:
    wide = np.pad(mask, 1)
    return mask | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
