"""Draw the images of an evaluation and store them with notes.

    DIR/images/<system>/<prompt id>.png    DIR/images/<system>/notes-<rank>.jsonl    DIR/run.json
    DIR/images/neighbors/<pair id>.webp

Images that exist are not drawn again, so a killed run can be continued. Under torchrun every process draws every
world-size-th prompt.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ragturbo.errors import InvalidRequest
from ragturbo.evaluate.suites import Prompt, Suite
from ragturbo.evaluate.systems import LoadOptions, SystemSpec, open_system
from ragturbo.folders import check_writable, make_folder, read_json

Progress = Callable[[str, int, int], None]
"""(current work, items done, items in total)"""


def rank_and_world_size() -> tuple[int, int]:
    """Return torchrun's rank and world size; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_folder(out: Path, suite: Suite, options: LoadOptions) -> None:
    """Write DIR/run.json, or raise InvalidRequest if the folder holds images of another suite or model."""
    facts = {"suite": suite.name}
    facts |= {name: str(getattr(options, name)) for name in ("model", "database", "adapter", "dtype")}
    path = out / "run.json"
    check_writable(out)
    # A run that failed before its first image does not keep others from the folder.
    if not path.exists() or not any((out / "images").glob("*/*.png")):
        make_folder(out)
        write_file(path, json.dumps(facts, indent=2) + "\n")
        return
    found = read_json(path)
    if differ := sorted(name for name in facts if found.get(name) != facts[name]):
        name = differ[0]
        raise InvalidRequest(
            f"{out} holds a run with {_in_words(name, str(found.get(name)))}, this one has "
            f"{_in_words(name, facts[name])}; choose another --out"
        )


def _in_words(name: str, value: str) -> str:
    """A setting of run.json, in which None is the default and False is "off"."""
    if value == "False":
        return f"no {name}"
    if value == "None":
        return "the device's own dtype" if name == "dtype" else f"the model's own {name}"
    return f"{name}={value!r}"


def draw_images(
    suite: Suite,
    spec: SystemSpec,
    options: LoadOptions,
    out: Path,
    *,
    batch: int = 8,
    scorer: Callable[[Prompt, Image.Image], float] | None = None,
    progress: Progress | None = None,
) -> None:
    """Draw every image of a suite by one system that does not exist yet.

    batch: prompts per call of the system; scorer: scores single images, required by best-of systems.
    """
    rank, world = rank_and_world_size()
    folder = out / "images" / spec.slug
    folder.mkdir(parents=True, exist_ok=True)
    mine = suite.prompts[rank::world]
    missing = [prompt for prompt in mine if not image_path(out, spec, prompt).exists()]
    if not missing:
        return

    if progress is not None:
        # While the model is loaded.
        progress(spec.text, len(mine) - len(missing), len(mine))
    system = open_system(spec, options)
    try:
        write_file(folder / "system.json", json.dumps({"title": system.title, "steps": system.steps}) + "\n")
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]

            def score(i: int, image: Image.Image, part: list[Prompt] = part) -> float:
                if scorer is None:
                    raise InvalidRequest("a best-of system needs a suite that can score single images")
                return scorer(part[i], image)

            drawn = system.draw([p.text for p in part], [p.seed for p in part], score)
            # Notes are written first, so that every image has its note even if the process is killed here.
            with open(folder / f"notes-{rank}.jsonl", "a", encoding="utf-8") as file:
                for prompt, one in zip(part, drawn, strict=True):
                    note = {"id": prompt.id, "prompt": prompt.text, "seed": prompt.seed}
                    note |= {"neighbors": [n.caption or "" for n in one.neighbors], "chosen": one.chosen}
                    note["neighbor_ids"] = [n.id for n in one.neighbors]
                    file.write(json.dumps(note) + "\n")
            for neighbor in {n.id: n for one in drawn for n in one.neighbors}.values():
                path = neighbor_path(out, neighbor.id)
                if not path.exists() and (thumbnail := neighbor.thumbnail) is not None:
                    path.parent.mkdir(exist_ok=True)
                    write_file(path, thumbnail)
            for prompt, one in zip(part, drawn, strict=True):
                png = io.BytesIO()
                one.image.save(png, "PNG", compress_level=1)
                write_file(image_path(out, spec, prompt), png.getvalue())
            if progress is not None:
                progress(system.title, len(mine) - len(missing) + start + len(part), len(mine))
    finally:
        system.close()


def image_path(out: Path, spec: SystemSpec, prompt: Prompt) -> Path:
    return out / "images" / spec.slug / f"{prompt.id}.png"


def neighbor_path(out: Path, id: int) -> Path:
    """The thumbnail of a pair; all systems of a run have one database."""
    return out / "images" / "neighbors" / f"{id}.webp"


def read_notes(out: Path, spec: SystemSpec) -> dict[str, dict[str, Any]]:
    """Return the notes by prompt id; the last one of a prompt that was drawn twice."""
    paths = sorted((out / "images" / spec.slug).glob("notes-*.jsonl"))
    return {row["id"]: row for path in paths for row in json_lines(path)}


def read_images(prompts: Iterable[Prompt], spec: SystemSpec, out: Path) -> Iterator[Image.Image]:
    for prompt in prompts:
        with Image.open(image_path(out, spec, prompt)) as image:
            yield image.convert("RGB")


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON Lines file, without lines that a killed process left incomplete."""
    for line in path.read_text("utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)
