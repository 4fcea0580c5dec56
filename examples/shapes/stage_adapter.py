"""Add the aligned student's adapter to the bundle; train others on the finished student, to compare.

There is no decoder LoRA in the bundle: it would be active in every mode, and mode "none" should be the student.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from settings import Settings
from stage_align import ADAPTER
from stage_bundle import provenance
from stage_names import NAMED, SOURCES, K, Names
from stage_student import PAIRS, REAL, train

from ragturbo import Database
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.info import BundleInfo
from ragturbo.train.data import database_name

# By name: settings of the training of an adapter and a decoder LoRA on the frozen student.
ARMS = {
    "adapter": ["student.lora.rank=0", "loss.hspace=1", f"student.phrases={K}"],
    "paper": [],
    "lora": ["student.adapter=none"],
    "wrong": ["student.lora.rank=0", "loss.hspace=1", "student.neighbors=random"],
}


def add_adapter(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Write the adapter to work/bundle, in fp16, with the search that it was trained for."""
    bundle = work / "bundle"
    adapter = HSpaceAdapter.load(work / ADAPTER)
    adapter.to(torch.float16).save(bundle)
    info = BundleInfo.read(bundle)
    assert info is not None
    search = {"retriever": "hybrid", "compose": True, "num_neighbors": 1}
    replace(info, adapter_kind=adapter.kind, provenance=provenance(work, s), **search).write(bundle)


def prepare_arms(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Build work/arms/database of the lessons, and the training data with its rows as neighbours."""
    names, database = Names(work, s), work / "arms" / "database"
    if not (database / "CURRENT").exists():
        Database.build(
            names.lessons(), database, model=work / "bundle", feature_dtype="int8", index=False, batch_size=64
        )
    folders = {}
    for name in SOURCES:
        folders[name] = work / "arms" / name
        folders[name].mkdir(exist_ok=True)
        for file in (work / name).glob("*.*"):
            if not (folders[name] / file.name).exists():
                (folders[name] / file.name).symlink_to(file.resolve())
    names.write_neighbors(folders, database_name(Database.open(database)))


def train_arm(work: Path, s: Settings, arm: str, seed: int) -> Path:
    """Train one of ARMS in work/arms; returns the folder of its adapter or LoRA."""
    folder = work / "arms"
    # As many named samples as ordinary ones, and the discriminator's pictures.
    shares = {PAIRS: 35, NAMED: 40, REAL: 25}
    sources = ", ".join(f"{{path: {folder / name}, weight: {share}}}" for name, share in shares.items())
    changes = [
        f"model={work / 'bundle'}", f"database={folder / 'database'}", f"seed={seed}", f"data.sources=[{sources}]",
        f"loss.lpips_weights={work / 'vgg.safetensors'}", f"student.num_neighbors={K}", f"optim.lr={s.arm_rate}",
        f"student.heads={s.adapter_heads}", f"loop.max_steps={s.arm_steps}", "loop.precision=bf16",
        "loop.compile=true", "loop.sample_every=0", *ARMS[arm],
    ]  # fmt: skip
    return train(f"{arm}-{seed}", folder, changes)
