"""Pairs and an encoder without torch, so that a child process is up in a fraction of a second and can be killed often.

As a program: `plain.py build|append|add_pair|remove|compact FOLDER SEED`, the changes whose crashes are tested.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ragturbo.retrieval import Database, Geometry, Record, writer
from ragturbo.retrieval.build import append, build
from ragturbo.retrieval.one_pair import add_pair

SMALL = Geometry(2, 3, 40, "float16", 16)


class PixelEncoder:
    """Keys from a caption's letters, features from an image's blocks: crude, but a function of its input alone."""

    size, height, width, channels, key_dim = 16, 4, 4, 48, 32
    key_kind = "pooled"
    fingerprints = {"text_encoder": "letters", "unet": "blocks"}

    def encode(self, images: np.ndarray, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        keys = np.zeros((len(captions), self.key_dim), np.float32)
        for row, text in zip(keys, captions, strict=True):
            for i, letter in enumerate(text.encode()):
                row[(letter * 7 + i) % self.key_dim] += 1 + i % 3
        blocks = images.reshape(len(images), 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5)
        return keys, blocks.reshape(len(images), 16, 48).astype(np.float32) / 255


def pairs(n: int, seed: int = 0) -> list[tuple[str, Image.Image, dict]]:
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (n, 18, 20, 3), dtype=np.uint8)
    return [
        (f"picture {seed}.{i}", Image.fromarray(pixels), {"source": f"site-{i % 3}", "rank": i})
        for i, pixels in enumerate(pictures)
    ]


def encoded(n: int, seed: int = 0, geometry: Geometry = SMALL) -> tuple[list[Record], np.ndarray, np.ndarray]:
    """n records with random keys and features, as `Database.write` takes them."""
    rng = np.random.default_rng(seed)
    records = [Record(0, f"caption {seed}.{i}", f"site-{i % 3}", None, None, {"rank": i}) for i in range(n)]
    keys = rng.standard_normal((n, geometry.key_dim)).astype(np.float32)
    return records, keys, rng.standard_normal((n, geometry.tokens, geometry.channels)).astype(np.float32)


def append_encoded(database: Database, batches: Sequence[writer.Batch]) -> None:
    """Add pairs that are encoded already to an open database."""
    writer.write_encoded(database.path, database.snapshot.manifest, batches)
    database.refresh()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a database and its bytes, the locks aside."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("LOCK"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def change(what: str, folder: Path, seed: int) -> None:
    if what == "build":
        build(pairs(60, seed), folder, encoder=PixelEncoder(), batch_size=4, segment_records=16, index=False)
    elif what == "append":
        append(pairs(40, seed + 1), folder, encoder=PixelEncoder(), batch_size=4)
    elif what == "add_pair":
        [(caption, image, _)] = pairs(1, seed + 2)
        add_pair(Database.open(folder), caption, image, encoder=PixelEncoder())
    elif what == "remove":
        Database.open(folder).remove(where={"source": "site-1"})
    elif what == "compact":
        Database.open(folder).compact()
    else:
        raise SystemExit(f"{what}?")


if __name__ == "__main__":
    change(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    assert "torch" not in sys.modules and "diffusers" not in sys.modules
