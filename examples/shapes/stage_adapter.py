"""Train the H-space adapter with the library's trainer and add it to the bundle.

There is no decoder LoRA: it would be active in every mode, and mode "none" should be the distilled student.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import parallel
import torch
from device import DEVICE
from settings import Settings
from stage_bundle import provenance
from stage_student import PAIRS, REAL, data_settings, train

from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.info import BundleInfo
from ragturbo.train.neighbors import make_neighbors


def train_adapter(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Train in work/adapter and write the averaged weights to work/bundle/adapter.safetensors, in fp16."""
    bundle = work / "bundle"
    parallel.start()
    for source in (PAIRS, REAL):
        make_neighbors(work / source, bundle / "database", model=str(bundle), k=1, device=str(DEVICE))
    parallel.barrier()
    changes = [
        f"model={bundle}", f"database={bundle / 'database'}", f"seed={s.seed}", *data_settings(work),
        "student.lora.rank=0", f"optim.lr={s.adapter_rate}", f"loop.max_steps={s.adapter_steps}",
        f"loop.micro_batch={64 // parallel.WORLD}", "loop.precision=bf16",
    ]  # fmt: skip
    folder = train("adapter", work, changes)
    if parallel.RANK == 0:
        add_to_bundle(folder, bundle, provenance(work, s))


def add_to_bundle(folder: Path, bundle: Path, provenance: dict) -> None:
    adapter = HSpaceAdapter.load(folder)
    adapter.to(torch.float16).save(bundle)
    info = BundleInfo.read(bundle)
    assert info is not None
    replace(info, adapter_kind=adapter.kind, num_neighbors=1, provenance=provenance).write(bundle)
