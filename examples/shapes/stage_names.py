"""Names for the training data: other captions for the teacher's latents, and lessons, the pictures that explain them.

Every sample gets new names, of which a few short ones occur twice. A model can draw the named things only from its
neighbours. Ordinary samples get neighbours, too, which they do not need.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import parallel
import torch
from data import batches, to_bytes
from device import DEVICE
from diffusers import AutoencoderKL
from PIL import Image
from sampling import decode
from settings import Settings
from stage_student import PAIRS, REAL
from torch import Tensor

from ragturbo.evaluate.names import UNNAMED, Kind, describe_names, lesson, made_up_word, name_nouns, named
from ragturbo.evaluate.recognition import recognise
from ragturbo.evaluate.rendering import render
from ragturbo.evaluate.world import Meaning, Noun, Scene, parse, phrase, sample_scene
from ragturbo.train.encode import make_encoded_data
from ragturbo.train.neighbors import write_neighbors
from ragturbo.train.relabel import relabel
from ragturbo.train.shards import Shards

NAMED, LESSONS = "named", "lessons"
SOURCES = (PAIRS, NAMED, REAL)
# Neighbours of a sample: one for each noun.
K = 2


def make_names(work: Path, s: Settings, model: str) -> None:
    """Write work/named, the pairs with names, and work/lessons, the encoded pictures."""
    names = Names(work, s)
    relabel(work / PAIRS, names.prompts, work / NAMED, model=model, device=str(DEVICE))
    make_encoded_data(
        names.lessons(), work / LESSONS, model=model, min_size=1, batch=64, store_text=True, device=str(DEVICE)
    )


class Names:
    """The names of the training data: a function of the pairs' captions and the seed."""

    def __init__(self, work: Path, s: Settings) -> None:
        self.s, self.captions = s, _captions(work / PAIRS)
        made = [_name(caption, s.seed, i) for i, caption in enumerate(self.captions)]
        self.prompts: list[str | None] = [None if one is None else one[0] for one in made]
        """The captions with names; None if every noun is of a kind that has no name in the training data."""
        self.meanings = [None if one is None else one[1] for one in made]
        """Of the prompts, with the nouns in their order."""
        self.nouns = [noun for meaning in self.meanings if meaning for noun in named(meaning)]
        self._jobs: list[tuple[Noun | None, int]] = [(n, s.seed * 17_000_000 + i) for i, n in enumerate(self.nouns)]
        self._jobs += [(None, s.seed * 19_000_000 + i) for i in range(s.ordinary_pairs)]

    def lessons(self) -> list[tuple[str, Image.Image]]:
        """One lesson for each name, then ordinary pictures, as captions and pictures."""
        with get_context("fork").Pool(os.cpu_count()) as pool:
            drawn = pool.map(_draw, self._jobs, chunksize=256)
        return [(caption, Image.fromarray(picture)) for caption, picture in drawn]

    def described_lessons(self) -> list[str]:
        """The captions of all lessons, with descriptions in place of names."""
        return [describe_names(scene.caption, named(scene.meaning)) for scene in self._scenes()]

    def short_lessons(self) -> list[str]:
        """The captions of all lessons, with names and without sizes."""
        return [_without_sizes(scene.caption) if named(scene.meaning) else scene.caption for scene in self._scenes()]

    def places(self, work: Path) -> Tensor:
        """Where the things of each noun are, by the teacher's latents: (N, K, 16) bool, for every sample of NAMED."""
        path = work / "noun_places.pt"
        if not path.exists() and parallel.RANK == 0:
            vae = AutoencoderKL.from_pretrained(work / "vae").to(DEVICE).eval()
            meanings, shards = [meaning for meaning in self.meanings if meaning], Shards(work / NAMED)
            latents = torch.cat([shards.tensor(i, "latents") for i in range(len(shards.files))]).float()
            found = []
            with get_context("fork").Pool(os.cpu_count()) as pool:
                for part in batches(len(latents), 512):
                    pictures = [to_bytes(decode(vae, chunk.to(DEVICE))) for chunk in latents[part].split(64)]
                    found += pool.map(_cells, zip(meanings[part], np.concatenate(pictures), strict=True), chunksize=32)
            torch.save(torch.from_numpy(np.stack(found)), path)
        parallel.barrier()
        return torch.load(path)

    def _scenes(self) -> Iterator[Scene]:
        return map(_scene, self._jobs)

    def neighbour_rows(self) -> dict[str, list[list[tuple[int, float]]]]:
        """For every sample of NAMED and PAIRS its neighbours, rows of the lessons, and their λ, in the nouns' order.

        A named noun has its lesson. Another noun has a picture with such a thing, a lesson of another name, or none;
        mostly none beside a named one, as in a search by phrase.
        """
        ordinary: dict[Kind, list[int]] = {}
        for row in range(len(self.nouns), len(self._jobs)):
            for kind in _scene(self._jobs[row]).meaning.kinds:
                ordinary.setdefault(kind, []).append(row)
        rng = np.random.default_rng([self.s.seed, 23])

        def other(noun: Noun, share: float) -> tuple[int, float]:
            """A neighbour that tells nothing new. Its λ is drawn, so that the adapter relies on no value of it."""
            lam = rng.uniform(0.3, 1)
            if rng.random() >= share:
                return -1, 0.0
            rows = ordinary.get(noun.kind, [])
            return (int(rng.choice(rows)) if rows and rng.random() < 0.65 else int(rng.integers(len(self.nouns)))), lam

        own = {id(noun): row for row, noun in enumerate(self.nouns)}
        rows: dict[str, list[list[tuple[int, float]]]] = {NAMED: [], PAIRS: []}
        for meaning, caption in zip(self.meanings, self.captions, strict=True):
            if meaning is not None:
                rows[NAMED].append([(own[id(n)], 1.0) if n.name else other(n, 0.2) for n in meaning.nouns])
            # Half of the ordinary samples have no neighbours.
            rows[PAIRS].append([other(noun, 0.7) for noun in parse(caption).nouns] if rng.random() < 0.5 else [])
        return rows

    def write_neighbors(self, folders: Mapping[str, Path], database: str) -> None:
        """Write the neighbours of every folder of SOURCES as rows of a database of the lessons."""
        rows = self.neighbour_rows() | {REAL: [[]] * len(Shards(folders[REAL]))}
        for name, folder in folders.items():
            _write_table(Shards(folder), rows[name], database)


def _name(caption: str, seed: int, i: int) -> tuple[str, Meaning] | None:
    """A caption with the same meaning in which one noun has a name, or both of two."""
    rng, meaning = np.random.default_rng([seed, 21, i]), parse(caption)
    able = [j for j, noun in enumerate(meaning.nouns) if noun.kind not in UNNAMED]
    if not able:
        return None
    both = len(able) == 2 and rng.random() < 0.4
    which = tuple(able) if both else (able[rng.integers(len(able))],)
    words: dict[str, None] = {}
    while len(words) < len(which):
        words[made_up_word(rng, "train")] = None
    meaning = name_nouns(meaning, which, tuple(words))
    kinds = {str(noun.name): noun.kind for noun in named(meaning)}
    while True:
        prompt = phrase(meaning, rng)
        worded = parse(prompt, kinds)
        # Without a relation, the order of the nouns decides their places: see stage_align.
        if meaning.relation or worded.nouns == meaning.nouns:
            return prompt, worded


def _scene(job: tuple[Noun | None, int]) -> Scene:
    noun, seed = job
    return sample_scene(seed, "train") if noun is None else lesson(noun, seed, "train")


def _draw(job: tuple[Noun | None, int]) -> tuple[str, np.ndarray]:
    scene = _scene(job)
    return scene.caption, render(scene)


def _without_sizes(caption: str) -> str:
    caption = re.sub(r"\b(small|tiny|large|big) ", "", caption)
    caption = re.sub(r"\ban (?=[^aeiou\s])", "a ", caption)
    return re.sub(r"\ba (?=[aeiou])", "an ", caption)


def _cells(job: tuple[Meaning, np.ndarray]) -> np.ndarray:
    """(K, 16) bool: the tokens of h, 16 pixels wide, in which the centres of each noun's things lie."""
    meaning, picture = job
    cells = np.zeros((K, 16), bool)
    for j, noun in enumerate(meaning.nouns):
        for thing in recognise(picture).things:
            if (thing.shape, thing.colour) == noun.kind:
                row, column = (min(3, max(0, int(value) // 16)) for value in (thing.y, thing.x))
                cells[j, 4 * row + column] = True
    return cells


def _write_table(shards: Shards, rows: list[list[tuple[int, float]]], database: str) -> None:
    padded = [(row + [(-1, float("nan"))] * K)[:K] for row in rows]
    ids = torch.tensor([[i for i, _ in row] for row in padded])
    write_neighbors(shards, ids, torch.tensor([[lam for _, lam in row] for row in padded]), database)


def _captions(folder: Path) -> list[str]:
    shards = Shards(folder)
    return [record["caption"] for shard in range(len(shards.files)) for record in shards.records(shard)]
