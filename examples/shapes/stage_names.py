"""Names for the training data: other captions for the teacher's latents, and lessons, the pictures that explain them.

Every named sample gets names that no other sample has, so a model can draw them only from its neighbours. Ordinary
samples get neighbours, too, which they do not need.
"""

from __future__ import annotations

import os
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import parallel
import torch
from device import DEVICE
from PIL import Image
from settings import Settings

from ragturbo.evaluate.names import UNNAMED, Kind, lesson, made_up_word, name_nouns, named
from ragturbo.evaluate.rendering import render
from ragturbo.evaluate.world import Meaning, Noun, parse, phrase, sample_scene
from ragturbo.train.data import pairs_name
from ragturbo.train.encode import make_encoded_data
from ragturbo.train.neighbors import write_neighbors
from ragturbo.train.relabel import relabel
from ragturbo.train.shards import Shards

NAMED, LESSONS = "named", "lessons"
# Neighbours of a sample: one for each noun.
K = 2


def make_names(work: Path, s: Settings, pairs: Path, real: Path, model: str) -> None:
    """Write work/named (the pairs with names), work/lessons (encoded pictures) and the neighbours of all samples."""
    captions = _captions(pairs)
    meanings = [_name(parse(caption), s.seed, i) for i, caption in enumerate(captions)]
    prompts = [None if m is None else phrase(m, np.random.default_rng([s.seed, 22, i])) for i, m in enumerate(meanings)]
    relabel(pairs, prompts, work / NAMED, model=model, device=str(DEVICE))

    # One lesson for each name, then ordinary pictures.
    nouns = [noun for meaning in meanings if meaning for noun in named(meaning)]
    jobs: list[tuple[Noun | None, int]] = [(noun, s.seed * 17_000_000 + i) for i, noun in enumerate(nouns)]
    jobs += [(None, s.seed * 19_000_000 + i) for i in range(s.ordinary_pairs)]
    with get_context("fork").Pool(os.cpu_count()) as pool:
        drawn = pool.map(_draw, jobs, chunksize=256)
    items = [(caption, Image.fromarray(picture)) for caption, picture in drawn]
    make_encoded_data(items, work / LESSONS, model=model, min_size=1, batch=64, store_text=True, device=str(DEVICE))
    parallel.barrier()
    if parallel.RANK == 0:
        _write_neighbors(work, s, pairs, real, meanings, captions, nouns, [caption for caption, _ in drawn])


def _name(meaning: Meaning, seed: int, i: int) -> Meaning | None:
    """Name one noun, or both of two; None if every noun is of a kind that has no name in the training data."""
    rng = np.random.default_rng([seed, 21, i])
    able = [j for j, noun in enumerate(meaning.nouns) if noun.kind not in UNNAMED]
    if not able:
        return None
    both = len(able) == 2 and rng.random() < 0.4
    which = tuple(able) if both else (able[rng.integers(len(able))],)
    return name_nouns(meaning, which, tuple(made_up_word(rng, "train") for _ in which))


def _draw(job: tuple[Noun | None, int]) -> tuple[str, np.ndarray]:
    noun, seed = job
    scene = sample_scene(seed, "train") if noun is None else lesson(noun, seed, "train")
    return scene.caption, render(scene)


def _write_neighbors(
    work: Path, s: Settings, pairs: Path, real: Path, meanings: list[Meaning | None], captions: list[str],
    nouns: list[Noun], lesson_captions: list[str],
) -> None:  # fmt: skip
    """Lessons for named nouns; for the others a picture with such a thing, a lesson of another name, or none."""
    lessons = Shards(work / LESSONS)
    ordinary: dict[Kind, list[int]] = {}
    for row in range(len(nouns), len(lesson_captions)):
        for kind in parse(lesson_captions[row]).kinds:
            ordinary.setdefault(kind, []).append(row)
    rng = np.random.default_rng([s.seed, 23])

    def other(noun: Noun) -> tuple[int, float]:
        """A neighbour that tells nothing new. Its λ is drawn, so that the adapter relies on no value of it."""
        draw, lam = rng.random(), rng.uniform(0.3, 1)
        if draw < 0.3:
            return -1, float("nan")
        rows = ordinary.get(noun.kind, [])
        return (int(rng.choice(rows)) if rows and draw < 0.75 else int(rng.integers(len(nouns)))), lam

    own = {id(noun): row for row, noun in enumerate(nouns)}
    rows_named, rows_plain = [], []
    for meaning, caption in zip(meanings, captions, strict=True):
        if meaning is not None:
            rows_named.append([(own[id(n)], 1.0) if n.name else other(n) for n in meaning.nouns])
        # Half of the ordinary samples stay without neighbours: mode "none" must not become worse.
        rows_plain.append([other(noun) for noun in parse(caption).nouns] if rng.random() < 0.5 else [])
    for folder, rows in ((work / NAMED, rows_named), (pairs, rows_plain), (real, [[]] * len(Shards(real)))):
        _write_table(Shards(folder), rows, pairs_name(lessons))


def _write_table(shards: Shards, rows: list[list[tuple[int, float]]], database: str) -> None:
    padded = [(row + [(-1, float("nan"))] * K)[:K] for row in rows]
    ids = torch.tensor([[i for i, _ in row] for row in padded])
    write_neighbors(shards, ids, torch.tensor([[lam for _, lam in row] for row in padded]), database)


def _captions(folder: Path) -> list[str]:
    shards = Shards(folder)
    return [record["caption"] for shard in range(len(shards.files)) for record in shards.records(shard)]
