"""Render scenes of the shapes world from exact coverage masks of the shapes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ragturbo.evaluate.world import SHAPES, SIDE, SIZES, Scene

PALETTE = {
    "red": (224, 32, 32), "orange": (255, 140, 0), "yellow": (250, 226, 30), "green": (30, 160, 50),
    "cyan": (40, 205, 225), "blue": (40, 70, 230), "purple": (140, 40, 180), "pink": (255, 130, 195),
    "white": (248, 248, 248), "gray": (128, 128, 128), "black": (14, 14, 14), "brown": (105, 65, 35),
}  # fmt: skip
# Samples along each side of a pixel: coverage has a resolution of 1/64.
_SAMPLES = 8


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether (u, v) is inside the shape; in units of the half extent, v down."""
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "ring":
        r2 = u * u + v * v
        return (r2 <= 1) & (r2 >= 0.5**2)
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.88
    if shape == "diamond":
        return abs(u) + abs(v) <= 1
    if shape == "triangle":
        return (v <= 0.8) & (abs(u) <= (v + 0.95) / 1.75)
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) <= 0.33) & (np.maximum(abs(u), abs(v)) <= 0.97)
    if shape == "heart":
        x, y = 1.18 * u, 0.12 - 1.12 * v
        return (x * x + y * y - 1) ** 3 <= x * x * y**3
    if shape == "star":
        return _inside_star(u, v)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def render(scene: Scene) -> np.ndarray:
    """Render a scene as (64, 64, 3) uint8, anti-aliased."""
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = PALETTE[scene.ground]
    for thing in scene.things:
        left, top = int(np.floor(thing.x)), int(np.floor(thing.y))
        mask = coverage(thing.shape, SIZES[thing.size], thing.x - left, thing.y - top)
        half = mask.shape[0] // 2
        window = picture[top - half : top + half, left - half : left + half]
        window += mask[..., None] * (np.array(PALETTE[thing.colour], np.float32) - window)
    return np.rint(picture).astype(np.uint8)


@lru_cache(maxsize=4096)
def coverage(shape: str, radius: float, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """Return the covered fraction of every pixel, float32; the centre is offset by (x, y) from the mask's middle."""
    half = int(np.ceil(radius)) + 1
    line = (np.arange(2 * half * _SAMPLES) + 0.5) / _SAMPLES - half
    hit = inside(shape, ((line - x) / radius)[None, :], ((line - y) / radius)[:, None])
    return hit.reshape(2 * half, _SAMPLES, 2 * half, _SAMPLES).mean((1, 3), dtype=np.float32)


def _inside_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Fold the angle into half a sector, then test against the edge from the tip to the inner corner.
    v = v - 0.06
    angle = np.arctan2(u, -v)
    sector = 2 * np.pi / 5
    folded = abs((angle + sector / 2) % sector - sector / 2)
    r = np.hypot(u, v)
    tip, corner = np.array([1.04, 0.0]), 0.47 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    edge = corner - tip
    a, b = r * np.cos(folded) - tip[0], r * np.sin(folded) - tip[1]
    return edge[0] * b - edge[1] * a >= 0
