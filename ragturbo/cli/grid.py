"""Draw images in a row with labels, such as an image, the same one without retrieval, and its neighbours."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from ragturbo.neighbor import Neighbor

CELL, GAP, TEXT = 192, 12, 60


def comparison(prompt: str, image: Image, without: Image, neighbors: list[Neighbor]) -> Image:
    cells: list[tuple[Image | None, str]] = [(without, "without retrieval"), (image, f"ragturbo: {prompt}")]
    return labelled([*cells, *((n.image(), f"neighbour, λ {n.lam:.2f}: {n.caption}") for n in neighbors)])


def labelled(cells: Sequence[tuple[Image | None, str]]) -> Image:
    """Draw images in a row, each above its label; None: there is no image."""
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    page = Pillow.new("RGB", (GAP + (CELL + GAP) * len(cells), CELL + TEXT + 2 * GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for i, (cell, label) in enumerate(cells):
        left = GAP + i * (CELL + GAP)
        if cell is None:
            draw.rectangle((left, GAP, left + CELL, GAP + CELL), outline="grey")
            draw.text((left + 8, GAP + 8), "no thumbnail", fill="grey", font=font)
        else:
            # Nearest-neighbour upscaling shows the pixels that the model generated.
            scale = Pillow.Resampling.NEAREST if cell.width < CELL else Pillow.Resampling.LANCZOS
            page.paste(cell.resize((CELL, CELL), scale), (left, GAP))
        for row, line in enumerate(textwrap.wrap(label, 30)[:4]):
            draw.text((left, GAP + CELL + 4 + 14 * row), line, fill="black", font=font)
    return page
