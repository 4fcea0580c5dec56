"""The field `size`."""

from __future__ import annotations

import re

from ragturbo.messages import short
from ragturbo.serve.api_errors import APIError

# What people write: 512, 512x512, 512X512, 512 x 512, 512×512, 512*512, -1x0.
WRITTEN = re.compile(r"\s*(-?[0-9]+)\s*(?:[xX×*]\s*(-?[0-9]+)\s*)?")
# Digits of a side, after which the number itself does not matter.
LONGEST = 6


def parse_size(size: str | None, *, step: int, default: int, most: int) -> tuple[int, int]:
    """Return width and height in pixels.

    Args:
        size: "auto" and None are `default` by `default`.
        step: both sides have to be multiples of it.
        most: the largest side.

    Raises:
        APIError: with what this server accepts.
    """
    if size in (None, "auto"):
        return default, default
    sizes = f"sides are multiples of {step} from {step} to {most} pixels, and 'auto' is {default}x{default}"
    match = WRITTEN.fullmatch(size)
    if match is None:
        message = f"size={short(size)} must be 'auto' or '<width>x<height>', such as '{default}x{default}'; {sizes}"
        raise _invalid(message)
    sides = [match[1], match[2] or match[1]]
    if any(len(side.lstrip("-0")) > LONGEST for side in sides):
        raise _invalid(f"size={short(size)} is not possible: {sizes}")
    width, height = map(int, sides)
    if not (step <= width <= most and step <= height <= most):
        raise _invalid(f"size={short(size)} is not possible: {sizes}")
    if width % step or height % step:
        near = "x".join(str(max(step, round(side / step) * step)) for side in (width, height))
        raise _invalid(f"size={short(size)} is not possible; the nearest is '{near}': {sizes}")
    if size != (exact := f"{width}x{height}"):
        raise _invalid(f"size={short(size)} must be written '{exact}'")
    return width, height


def _invalid(message: str) -> APIError:
    return APIError(400, message, code="invalid_value", param="size")
