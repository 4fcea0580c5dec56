"""Teach the embedded model a word by one picture, without training, and draw a prompt with it before and after.

python examples/teach.py --out docs/images/teach.png
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ragturbo import Database, Generator
from ragturbo.cli.grid import labelled
from ragturbo.evaluate.rendering import render
from ragturbo.evaluate.world import COLOURS, SHAPES, Meaning, Noun, Scene, arrange


def picture(shape: str, colour: str) -> Image.Image:
    """One thing on white, of the size that captions without a size mean."""
    meaning = Meaning((Noun(shape, colour),))
    return Image.fromarray(render(Scene(meaning, "", arrange(meaning, np.random.default_rng(0)))))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo.png"))
    parser.add_argument("--caption", default="a lorp")
    parser.add_argument("--colour", choices=COLOURS, default="red")
    parser.add_argument("--shape", choices=SHAPES, default="star")
    parser.add_argument("--prompt", default="a lorp left of a blue square")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    taught = picture(options.shape, options.colour)
    with tempfile.TemporaryDirectory() as folder:
        # The model's own pairs, in a folder that may be written.
        database = Database.copy("shapes", Path(folder) / "my-db")
        with Generator.from_pretrained("shapes", database=database) as gen:
            before = gen(options.prompt, seed=options.seed)
            id = gen.teach(options.caption, taught)
            after = gen(options.prompt, seed=options.seed)
    print(f"taught pair {id}, {options.caption!r}")
    for when, output in (("before", before), ("after", after)):
        print(f"{when}: {'; '.join(output.notes)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    labelled(
        [
            (taught, f"taught: {options.caption}"),
            (before.images[0], f"before: {options.prompt}"),
            (after.images[0], f"after: {options.prompt}"),
        ]
    ).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
