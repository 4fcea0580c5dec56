"""Load images as squares for the encoder, in the same way for builds and for requests."""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ragturbo.errors import InvalidRequest
from ragturbo.retrieval.items import kind_of

# A file of a few kilobytes can claim billions of pixels. The size is checked before pixels are decoded.
MAX_PIXELS = 100_000_000
MAX_BYTES = 256 << 20
THUMBNAIL = 128


def load(image: Any, size: int | None = None) -> Image.Image:
    """PIL image, path or bytes -> RGB, upright by EXIF, transparency on white, the first frame.

    With `size`, a JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 that keeps both sides ≥ 2 · `size`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = _open(image)
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise InvalidRequest(f"the image is too large: {width}x{height} is more than {MAX_PIXELS} pixels")
            if size is not None:
                picture.draft("RGB", (2 * size, 2 * size))
            picture = ImageOps.exif_transpose(picture)
            return _rgb(picture)
    except InvalidRequest:
        raise
    except FileNotFoundError as error:
        raise InvalidRequest("the image cannot be read: there is no such file") from error
    except UnidentifiedImageError as error:
        raise InvalidRequest("the image cannot be read: it is damaged or of no known format") from error
    # Pillow raises many types on damaged files: OSError, ValueError, SyntaxError, struct.error, …
    except Exception as error:
        # Without addresses in memory, so that two builds write the same report.
        why = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))[:200]
        raise InvalidRequest(f"the image cannot be read: {type(error).__name__}: {why}") from error


def _check_size(path: str | os.PathLike[str]) -> None:
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise InvalidRequest(f"the image has {size} bytes, more than {MAX_BYTES}")
    if size == 0 and os.path.isfile(path):
        raise InvalidRequest("the image cannot be read: the file is empty")


def _open(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (str, os.PathLike)):
        _check_size(image)
        return Image.open(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(image))
    hint = "; PIL.Image.fromarray makes one of an array" if hasattr(image, "shape") else ""
    raise InvalidRequest(f"an image must be a PIL image, a path or bytes, not {kind_of(image)}{hint}")


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode == "I":
        # 16 bits per channel: Pillow would clip at 255 instead of scaling.
        return Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(ground, picture).convert("RGB")
    return picture.convert("RGB")


def square(image: Any, size: int) -> np.ndarray:
    """PIL image, path or bytes -> (size, size, 3) uint8: the centred square, resized with antialiased bicubic."""
    return _square(load(image, size), size)


def _square(picture: Image.Image, size: int) -> np.ndarray:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == size:
        return np.asarray(picture.crop(box))
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))


def prepare(image: Any, size: int, thumbnail: bool) -> tuple[np.ndarray, str, bytes | None]:
    """Return the square, the SHA-256 of the file (of the pixels of a PIL image), and a WebP of at most 128 pixels."""
    if isinstance(image, (str, os.PathLike)):
        try:
            _check_size(image)
            image = Path(image).read_bytes()
        except IsADirectoryError as error:
            raise InvalidRequest(f"the image cannot be read: {image}: it is a folder") from error
        except OSError as error:
            raise InvalidRequest(f"the image cannot be read: {image}: {error.strerror}") from error
    picture = load(image, size)
    data = image if isinstance(image, (bytes, bytearray, memoryview)) else picture.tobytes()
    small = None
    if thumbnail:
        copy = picture.copy()
        copy.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        copy.save(buffer, "WEBP", quality=80, method=2)
        small = buffer.getvalue()
    return _square(picture, size), hashlib.sha256(data).hexdigest(), small
