"""What retrieval brings for words that the weights do not know: `python examples/shapes/compare_names.py --out FILE`.

Every prompt has one or two made-up names (`ragturbo/evaluate/names.py`), and the database a picture of each named kind
with a caption that only names it. All arms draw a prompt from the same noise. A prompt counts as right if a thing of
the kind of each of its names is in the picture. The JSON holds the score of every prompt.

`--adapter TITLE=FOLDER` adds arms for other adapters, such as those of other training seeds or of a LoRA alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from settings import Settings
from stage_bundle import database_scenes

from ragturbo import Database, Generator
from ragturbo.evaluate.faithfulness import Question, answer, count_answers
from ragturbo.evaluate.names import describe_names, lesson, named, sample_named_scene
from ragturbo.evaluate.recognition import recognise
from ragturbo.evaluate.rendering import render
from ragturbo.evaluate.scores import right_share
from ragturbo.evaluate.table import estimate, verdict
from ragturbo.evaluate.world import Noun, Scene, sample_scene
from ragturbo.machine import describe
from ragturbo.model.find import resolve

log = logging.getLogger("ragturbo.recipe")
BATCH = 8
GROUPS: dict[str, dict[str, Any]] = {
    "one name": {"names": 1, "taught": True},
    "one name, of a kind never named in training": {"names": 1, "taught": False},
    "two names": {"names": 2, "taught": True},
}
ONE, ORDINARY = "one name", "no name"


class Prompts:
    """The prompts of one group, with the rows of their lessons in the database."""

    def __init__(self, title: str, scenes: list[Scene], first_row: int, seed: int) -> None:
        self.title, self.scenes, self.seed = title, scenes, seed
        self.nouns = [named(scene.meaning) for scene in scenes]
        count = 0
        self.rows: list[list[int]] = []
        for nouns in self.nouns:
            self.rows.append([first_row + count + j for j in range(len(nouns))])
            count += len(nouns)
        self.lessons = [
            lesson(noun, seed * 1_000_000 + row)
            for nouns, rows in zip(self.nouns, self.rows, strict=True)
            for noun, row in zip(nouns, rows, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.scenes)

    @property
    def names(self) -> list[str]:
        """The captions, with names."""
        return [scene.caption for scene in self.scenes]

    @cached_property
    def described(self) -> list[str]:
        """The same captions with colour and shape in place of each name."""
        return [describe_names(scene.caption, nouns) for scene, nouns in zip(self.scenes, self.nouns, strict=True)]

    @property
    def wrong(self) -> list[list[int]]:
        """The rows of the lessons of the next prompt whose kinds are all others."""
        kinds, count = [{noun.kind for noun in nouns} for nouns in self.nouns], len(self)
        rows = []
        for i, own in enumerate(kinds):
            others = (j % count for j in range(i + 1, i + count) if own.isdisjoint(kinds[j % count]))
            if (other := next(others, None)) is None:
                raise SystemExit(f"{self.title}: no other prompt has other kinds; use a larger --count")
            rows.append(self.rows[other])
        return rows

    def score(self, pictures: np.ndarray) -> list[float]:
        if self.title == ORDINARY:
            shares = (count_answers(s.meaning, recognise(p)) for s, p in zip(self.scenes, pictures, strict=True))
            return [right_share(counts) for counts in shares]
        return [float(_all_shown(nouns, picture)) for nouns, picture in zip(self.nouns, pictures, strict=True)]


def _all_shown(nouns: Sequence[Noun], picture: np.ndarray) -> bool:
    seen = recognise(picture)
    return all(answer(Question("colour", "yes", (Noun(noun.shape, noun.colour),)), seen) == "yes" for noun in nouns)


def make_prompts(count: int, seed: int) -> list[Prompts]:
    groups, row, used = [], 0, set[str]()
    for title, options in GROUPS.items():
        some, scenes = count if title == ONE else count // 2, []
        for i in itertools.count():
            scene = sample_named_scene(seed * 1_000_000 + i, **options)
            own = {str(noun.name) for noun in named(scene.meaning)}
            # A name stands for one kind.
            if used.isdisjoint(own):
                scenes.append(scene)
                used |= own
            if len(scenes) == some:
                break
        groups.append(Prompts(title, scenes, row, seed))
        row += len(groups[-1].lessons)
    ordinary = [sample_scene(seed * 1_000_000 + i, "eval") for i in range(count)]
    return [*groups, Prompts(ORDINARY, ordinary, row, seed)]


def make_database(folder: Path, groups: list[Prompts], size: int, model: str, *, described: bool = False) -> Path:
    """Build a database of all lessons, filled with ordinary pairs to `size`; described: lessons say what a name is."""

    def pairs() -> Iterator[tuple[str, Image.Image]]:
        lessons = [scene for group in groups for scene in group.lessons]
        for scene in lessons:
            told = f"{scene.caption}, {describe_names(scene.caption, scene.meaning.nouns)}"
            yield told if described else scene.caption, Image.fromarray(render(scene))
        for scene in database_scenes(size - len(lessons), Settings()):
            yield scene.caption, Image.fromarray(render(scene))

    if not (folder / "CURRENT").exists():
        Database.build(pairs(), folder, model=model, feature_dtype="int8", index=False, batch_size=64)
    return folder


class Comparison:
    def __init__(self, model: str, groups: list[Prompts], databases: dict[str, Path], only: str | None = None) -> None:
        """only: run the arms whose title contains it."""
        self.model, self.groups, self.databases, self.only = model, groups, databases, only
        self.scores: dict[str, dict[str, list[float]]] = {}
        self.found: dict[str, dict[str, float]] = {}
        self.first: dict[str, list[np.ndarray]] = {}
        """Of every group and arm, the first pictures."""

    def run(
        self, arm: str, prompts: Callable[[Prompts], list[str]] | None = None, *, database: str = "4,000 pairs",
        groups: Sequence[str] | None = None, options: Callable[[Prompts, int], dict[str, Any]] | None = None,
        seeds: int = 0, **settings: Any,
    ) -> None:  # fmt: skip
        """Draw and score every group.

        Args:
            prompts: a group's prompts; the captions with names by default.
            options: the options of prompt i, merged into the call; lists for `neighbors`.
            seeds: added to the seeds of the noise.
            settings: of the Generator; `call` holds options of every call.
        """
        if self.only is not None and self.only not in arm:
            return
        call = settings.pop("call", {})
        settings = {"adapter": None, **settings}
        with Generator.from_pretrained(self.model, database=self.databases[database], **settings) as gen:
            for group in self.groups:
                if groups is not None and group.title not in groups:
                    continue
                texts = (prompts or (lambda g: g.names))(group)
                pictures, found, asked = [], 0, 0
                for start in range(0, len(texts), BATCH):
                    rows = range(start, min(start + BATCH, len(texts)))
                    own = dict(call)
                    if options is not None:
                        each = [options(group, i) for i in rows]
                        own |= {name: [one[name] for one in each] for name in each[0]}
                    noise = [group.seed * 1_000_000 + i + seeds * 100_000 for i in rows]
                    out = gen([texts[i] for i in rows], seed=noise, output_type="uint8", **own)
                    pictures.append(out.images)
                    for i, neighbors in zip(rows, out.neighbors, strict=True):
                        asked += len(group.rows[i])
                        found += len({n.id for n in neighbors} & set(group.rows[i]))
                self.scores.setdefault(group.title, {})[arm] = group.score(np.concatenate(pictures))
                self.first.setdefault(group.title, []).append(np.concatenate(pictures)[:10])
                # With one neighbour for each phrase or prompt, what is found is at rank 1.
                if asked and found and "num_neighbors" not in call and options is None:
                    self.found.setdefault(group.title, {})[arm] = found / asked
                mean = float(np.mean(self.scores[group.title][arm]))
                log.info("%-48s %-44s %.3f", arm, group.title, mean)

    def write_grid(self, file: Path, title: str) -> None:
        """Write the lessons of a group's first prompts, a row for each name, and the pictures of three arms."""
        group = next(group for group in self.groups if group.title == title)
        lessons = [render(scene) for scene in group.lessons]
        names, count = len(group.nouns[0]), len(self.first[title][0])
        rows = [lessons[name : names * count : names] for name in range(names)] + self.first[title][:3]
        picture = Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)

    def best_of(self, arm: str, others: list[str]) -> None:
        """The best of several arms for each prompt, chosen by the score itself."""
        for scores in self.scores.values():
            if all(other in scores for other in others):
                scores[arm] = np.max([scores[other] for other in others], 0).tolist()

    def summary(self, reference: str) -> dict[str, Any]:
        """Mean, 95 % interval and paired difference to `reference`, of every arm in every group."""
        rows: dict[str, Any] = {}
        for title, scores in self.scores.items():
            for arm, values in scores.items():
                row: dict[str, Any] = asdict(estimate(values))
                if reference in scores and arm != reference:
                    difference = estimate((np.array(values) - scores[reference]).tolist())
                    row["difference"] = {**asdict(difference), "verdict": verdict(difference)}
                rows.setdefault(title, {})[arm] = row
        return rows


ADAPTER, NONE, DESCRIBED = "adapter, hybrid search by phrase", "no retrieval", "told by description"
NAMED = tuple(GROUPS)


def compare(c: Comparison, adapters: dict[str, Path], *, quick: bool = False) -> None:
    """Run all arms; quick: the first five alone."""
    hybrid: dict[str, Any] = {"retriever": "hybrid", "call": {"compose": True}}
    c.run(DESCRIBED, lambda g: g.described, call={"mode": "none"}, groups=NAMED)
    c.run(NONE, call={"mode": "none"})
    c.run(ADAPTER, **hybrid)
    c.run("adapter, hybrid search by whole prompt", retriever="hybrid", call={"compose": False})
    c.run("adapter, wrong neighbours", groups=NAMED, options=lambda g, i: {"neighbors": g.wrong[i]}, call={"lam": 1.0})
    for title, folder in adapters.items():
        if not any((folder / name).exists() for name in ("adapter.safetensors", "decoder_lora")):
            raise SystemExit(f"{folder} holds neither adapter.safetensors nor decoder_lora/")
        if (folder / "adapter.safetensors").exists():
            c.run(title, adapter=folder, **hybrid)
        if (folder / "decoder_lora").exists():
            c.run(f"{title}, no retrieval", adapter=folder, call={"mode": "none"})
    if quick:
        return
    right = {"options": lambda g, i: {"neighbors": g.rows[i]}, "groups": (ONE, NAMED[1])}
    c.run("adapter, dense search by phrase", retriever="exact", call={"compose": True}, groups=NAMED)
    c.run("adapter, BM25 by phrase", retriever="bm25", call={"compose": True}, groups=NAMED)
    # Neighbours given by id bring no words, so λ is the cosine.
    c.run("adapter, right neighbours, λ = cosine of the keys", **right)
    for lam in (0.25, 0.5, 0.75):
        c.run(f"adapter, λ = {lam}", retriever="hybrid", call={"compose": True, "lam": lam})
    for k in (2, 4):
        c.run(f"adapter, k = {k}", retriever="hybrid", call={"compose": True, "num_neighbors": k})
    weights = (0.8, 0.6, 0.4, 0.2)
    for kind in ("names", "described"):
        database = "4,000 pairs" if kind == "names" else "4,000 pairs, lessons described"
        for w in weights:
            c.run(f"slerp, w = {w}, pairs {kind}", database=database, call={"mode": "slerp", "w": w},
                  **right)  # fmt: skip
        c.best_of(f"slerp, best w for each prompt, pairs {kind}", [f"slerp, w = {w}, pairs {kind}" for w in weights])
    c.run("adapter, pairs described", database="4,000 pairs, lessons described", **hybrid)
    for i in range(1, 10):
        c.run(f"no retrieval, noise {i}", call={"mode": "none"}, groups=(ONE,), seeds=i)
    c.best_of("no retrieval, best of nine noises", [f"no retrieval, noise {i}" for i in range(1, 10)])
    for size in ("1,000 pairs", "10,000 pairs", "20,000 pairs"):
        c.run(f"adapter, {size}", database=size, groups=(ONE,), **hybrid)


def teach(model: str, folder: Path, database: Path, words: int, seed: int) -> dict[str, float]:
    """Teach fresh words through the API, draw prompts with them, take them back, and draw again."""
    scenes = [sample_named_scene(seed * 1_000_000 + 500_000 + i) for i in range(words)]
    group = Prompts(ONE, scenes, 0, seed + 1)
    copy = folder / "taught"
    if copy.exists():
        raise SystemExit(f"{copy} exists from an earlier run: remove it")
    Database.copy(database, copy)
    results: dict[str, float] = {}
    with Generator.from_pretrained(model, database=copy, retriever="hybrid", compose=True) as gen:

        def right(what: str) -> None:
            noise = [seed * 1_000_000 + i for i in range(words)]
            parts = [gen(group.names[i : i + BATCH], seed=noise[i : i + BATCH], output_type="uint8").images
                     for i in range(0, words, BATCH)]  # fmt: skip
            results[what] = float(np.mean(group.score(np.concatenate(parts))))
            log.info("%-48s %.3f", what, results[what])

        right("before")
        started = time.monotonic()
        ids = [gen.teach(scene.caption, Image.fromarray(render(scene))) for scene in group.lessons]
        results["seconds to teach a word"] = (time.monotonic() - started) / words
        right("taught")
        for id in ids:
            gen.forget(id)
        right("forgotten")
    return {"words": words, **results}


def table(result: dict[str, Any]) -> str:
    """A Markdown table of all arms: the score in every group and, against no retrieval, its difference."""
    summary = result["summary"]
    titles = list(summary)
    lines = ["| arm | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for arm in dict.fromkeys(arm for rows in summary.values() for arm in rows):
        cells = []
        for title in titles:
            row = summary[title].get(arm)
            cells.append("" if row is None else f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help="a bundle's folder, or the embedded model")
    parser.add_argument(
        "--count", type=int, default=1000, help="prompts with one name, and without; half as many of the other groups"
    )
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--work", type=Path, default=Path("build/names"), help="folder for the databases")
    parser.add_argument("--adapter", action="append", default=[], metavar="TITLE=FOLDER")
    parser.add_argument("--quick", action="store_true", help="the main arms alone")
    parser.add_argument("--grid", type=Path, help="write the first prompts with two names as a picture")
    parser.add_argument("--only", help="the arms whose title contains this")
    parser.add_argument("--words", type=int, default=200, help="words to teach through the API; 0: none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("ragturbo").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    begun, model = time.monotonic(), str(resolve(args.model))
    groups = make_prompts(args.count, args.seed)
    lessons = sum(len(group.lessons) for group in groups)
    databases = {"4,000 pairs": make_database(args.work / "pairs-4000", groups, max(4_000, lessons), model)}
    if not args.quick:
        databases["1,000 pairs"] = make_database(args.work / "pairs-1000", groups[:1], args.count, model)
        for size in (10_000, 20_000):
            databases[f"{size:,} pairs"] = make_database(args.work / f"pairs-{size}", groups, size, model)
        title = "4,000 pairs, lessons described"
        databases[title] = make_database(args.work / "described", groups, max(4_000, lessons), model, described=True)
    comparison = Comparison(model, groups, databases, args.only)
    compare(comparison, dict(_titled(text) for text in args.adapter), quick=args.quick)
    if args.grid:
        comparison.write_grid(args.grid, NAMED[2])
    taught = teach(model, args.work, databases["4,000 pairs"], args.words, args.seed) if args.words else None
    result = {
        "prompts": args.count, "seed": args.seed, "lessons": lessons, "summary": comparison.summary(NONE),
        "found at rank 1": comparison.found, "teaching": taught, "scores": comparison.scores,
        "seconds": round(time.monotonic() - begun), "context": describe(),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def _titled(text: str) -> tuple[str, Path]:
    title, _, folder = text.rpartition("=")
    return title, Path(folder)


if __name__ == "__main__":
    main()
