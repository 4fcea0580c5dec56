"""Fixtures: a tiny student with its teacher, a database, and training data made by the library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle", "cat", "dog", "boat")
PROMPTS = [f"a {c} {s} on a {g}" for c in COLOURS for s in SHAPES for g in ("boat", "photo")]


@dataclass(frozen=True)
class World:
    model: Path
    data: Path
    real: Path
    database: Path

    def settings(self, **changes: Any) -> dict[str, Any]:
        """A configuration as a mapping; changes are "loop__batch"=… for loop.batch."""
        values: dict[str, Any] = {
            "model": str(self.model),
            "database": str(self.database),
            "data": {"sources": [{"path": str(self.data)}]},
            "student": {"lora": {"rank": 2, "alpha": 2.0}},
            "discriminator": {"width": 8, "optim": {"lr": 1e-3}},
            "loss": {"beta": 0.0},
            "optim": {"lr": 1e-3},
            "loop": {"batch": 4, "micro_batch": 2, "max_steps": 4, "precision": "fp32", "ema": 0.9,
                     "log_every": 1, "save_every": 2, "sample_every": 0, "samples": 2},
        }  # fmt: skip
        for name, value in changes.items():
            *path, last = name.split("__")
            inner = values
            for part in path:
                inner = inner.setdefault(part, {})
            inner[last] = value
        return values

    def config(self, **changes: Any) -> Any:
        from ragturbo.train.config import from_dict

        return from_dict(self.settings(**changes))


def small_unet(tiny: Any, seed: int, **overrides: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tiny.unet("sd21", **{**UNET, **overrides})


# Two levels with a middle block, cross-attention and skips.
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 4),
}


@pytest.fixture(scope="session")
def world(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("train")
    model = tiny.make_bundle(root / "model", **UNET)
    small_unet(tiny, 1).save_pretrained(model / "teacher_unet", safe_serialization=True)
    from ragturbo.train.neighbors import make_neighbors
    from ragturbo.train.teacher import make_teacher_data

    make_teacher_data(PROMPTS, root / "data", model=str(model), steps=2, shard_size=20, dtype="float32", device="cpu")
    database = make_database(model, root / "db")
    make_neighbors(root / "data", database, model=str(model), k=2, device="cpu")
    real = real_copy(root / "data", root / "real", database, model)
    return World(model, root / "data", real, database)


def make_database(model: Path, path: Path) -> Path:
    from ragturbo.model.bundle import Bundle
    from ragturbo.retrieval.database import Database
    from ragturbo.retrieval.format import Geometry
    from ragturbo.retrieval.pairs import Record

    bundle = Bundle.load(model, device="cpu")
    captions = [f"a {c} {s}" for c in COLOURS for s in SHAPES] + PROMPTS[:8]
    with torch.no_grad():
        keys = bundle.text.encode(bundle.text.tokenize(captions).input_ids).key.numpy()
    channels, tokens = bundle.unet.channels, 16
    features = np.random.default_rng(0).standard_normal((len(captions), tokens, channels)).astype(np.float16)
    records = [Record(i, caption) for i, caption in enumerate(captions)]
    geometry = Geometry(height=4, width=4, channels=channels, dtype="float16", key_dim=keys.shape[1])
    Database.write(path, [(records, keys, features)], geometry=geometry, encoder=bundle.fingerprint())
    return path


def real_copy(source: Path, target: Path, database: Path, model: Path) -> Path:
    """The same samples without their noise, as real images are."""
    from ragturbo.train.folder import Plan
    from ragturbo.train.neighbors import make_neighbors
    from ragturbo.train.shards import Shards, write_shard

    shards = Shards(source)
    Plan("encoded", 20, 20, {"test": True}).write_or_check(target)
    tensors = {name: shards.tensor(0, name) for name in ("latents", "input_ids")}
    write_shard(target, 0, tensors, list(shards.records(0)))
    make_neighbors(target, database, model=str(model), k=2, device="cpu")
    return target


@pytest.fixture
def make(world, tmp_path):
    """Make a trainer; each call has its own output folder."""
    count = iter(range(100))

    from ragturbo.train.ladd import LADDTrainer

    def trainer(**changes):
        return LADDTrainer(world.config(**changes), tmp_path / str(next(count)), device="cpu")

    return trainer


def _grown(trainer):
    """Move adapter and LoRA away from zero, so that all parameters get gradients."""
    state = trainer.masters.state()
    generator = torch.Generator().manual_seed(1)
    moved = {name: v + 0.05 * torch.randn(v.shape, generator=generator) for name, v in state.items()}
    trainer.masters.load(moved)
    return trainer


def _batches(trainer, count=None):
    numbers = trainer.sample_numbers(10)
    return [trainer.load_batch(next(numbers)) for _ in range(count or trainer.accumulation)]


def _gradients(trainer, parts):
    """The accumulated gradients of one step, without the update."""
    trainer.student.train()
    trainer.discriminator.train()
    for m, batch in enumerate(parts):
        trainer.objective.backward(batch, trainer.generator(m), trainer.accumulation)
        trainer.masters.accumulate()
    g = {name: p.grad.clone() for name, p in trainer.masters.parameters.items()}
    return g, {name: p.grad.clone() for name, p in trainer.discriminator.named_parameters()}


def _copies(state):
    return {name: value.detach().clone() for name, value in state.items()}


@pytest.fixture
def grown():
    return _grown


@pytest.fixture
def batches():
    return _batches


@pytest.fixture
def gradients():
    return _gradients


@pytest.fixture
def copies():
    return _copies
