"""Draws what a suite asks for and keeps it: one PNG and one line of notes an image, written as they come.

    DIR/images/<system>/<prompt id>.png    DIR/images/<system>/notes-<rank>.jsonl    DIR/run.json

A run that was killed goes on where it stopped: an image that is there whole is not drawn again. Under torchrun every
process takes each world-size-th prompt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ragturbo.errors import InvalidRequest
from ragturbo.evaluate.suites import Prompt, Suite
from ragturbo.evaluate.systems import Drawing, Loading, Score, Spec, open_system

Progress = Callable[[str, int, int], None]
"""(what is going on, how many are done, of how many)"""


@dataclass(frozen=True)
class Place:
    """Which share of the work is this process's."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def here() -> Place:
        return Place(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def mine(self, prompts: list[Prompt]) -> list[Prompt]:
        return prompts[self.rank :: self.world]


def settle(out: Path, suite: Suite, loading: Loading) -> None:
    """A folder belongs to one suite and one model: images of another are not mixed in."""
    facts = {
        "suite": suite.name,
        "model": str(loading.model),
        "database": str(loading.database),
        "adapter": str(loading.adapter),
        "dtype": str(loading.dtype),
    }
    path = out / "run.json"
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        if found != facts:
            differ = sorted(name for name in facts if found.get(name) != facts[name])
            raise InvalidRequest(
                f"{out} holds a run with {differ[0]}={found.get(differ[0])!r}, this one has {facts[differ[0]]!r}; "
                "choose another --out"
            )
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(facts, indent=2) + "\n")


def draw(
    suite: Suite,
    spec: Spec,
    loading: Loading,
    out: Path,
    *,
    batch: int = 8,
    scorer: Callable[[Prompt, Image.Image], float] | None = None,
    progress: Progress | None = None,
    place: Place | None = None,
) -> None:
    """Every image of `suite` by one system that is not there yet."""
    place = place or Place.here()
    folder = out / "images" / spec.slug
    folder.mkdir(parents=True, exist_ok=True)
    mine = place.mine(suite.prompts)
    missing = [prompt for prompt in mine if not image_path(out, spec, prompt).exists()]
    if not missing:
        return
    system = open_system(spec, loading)
    notes = folder / f"notes-{place.rank}.jsonl"
    try:
        write_text(folder / "system.json", json.dumps({"title": system.title, "steps": system.steps}) + "\n")
        done = len(mine) - len(missing)
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            drawn = system.draw([p.text for p in part], [p.seed for p in part], _score_for(part, scorer))
            # The note first: an image that is there has its note, whenever the process is killed.
            with open(notes, "a", encoding="utf-8") as file:
                for prompt, drawing in zip(part, drawn, strict=True):
                    file.write(json.dumps(_note(prompt, drawing)) + "\n")
            for prompt, drawing in zip(part, drawn, strict=True):
                write_png(image_path(out, spec, prompt), drawing.image)
            done += len(part)
            if progress is not None:
                progress(system.title, done, len(mine))
    finally:
        system.close()


def _score_for(part: list[Prompt], scorer: Callable[[Prompt, Image.Image], float] | None) -> Score:
    def score(i: int, image: Image.Image) -> float:
        if scorer is None:
            raise InvalidRequest("this suite cannot score single images, which a best-of system needs")
        return scorer(part[i], image)

    return score


def _note(prompt: Prompt, drawing: Drawing) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "prompt": prompt.text,
        "seed": prompt.seed,
        "neighbors": list(drawing.neighbors),
        "chosen": drawing.chosen,
    }


def image_path(out: Path, spec: Spec, prompt: Prompt) -> Path:
    return out / "images" / spec.slug / f"{prompt.id}.png"


def read_notes(out: Path, spec: Spec) -> dict[str, dict[str, Any]]:
    """By prompt id. A line cut off by a kill is passed over; a prompt drawn twice keeps its last note."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((out / "images" / spec.slug).glob("notes-*.jsonl")):
        for row in json_lines(path):
            found[row["id"]] = row
    return found


def read_images(suite: Suite, spec: Spec, out: Path) -> Iterator[tuple[Prompt, Image.Image]]:
    for prompt in suite.prompts:
        with Image.open(image_path(out, spec, prompt)) as image:
            yield prompt, image.convert("RGB")


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text("utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def write_png(path: Path, image: Image.Image) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    image.save(part, "PNG", compress_level=1)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, "utf-8")
    os.replace(part, path)
