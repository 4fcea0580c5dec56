"""Train the student further, together with an adapter, on prompts with names: `ragturbo train` in mode joint.

A student that has seen no names hides the pictures of its neighbours from the decoder: its h holds the colours of a
picture but not its shapes, because the skips carry them. Here h is trained to hold the picture, and the place of a
thing that the prompt names but does not describe.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import parallel
from settings import Settings
from stage_bundle import save_bundle
from stage_names import LESSONS, NAMED, K, make_names
from stage_student import PAIRS, REAL, VGG, train

STUDENT = "student_base"


def name_pairs(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Save the student as the model to start from, and give the pairs names and neighbours."""
    if parallel.RANK == 0:
        save_bundle(work, work / "unet", work / STUDENT)
    parallel.barrier()
    make_names(work, s, str(work / STUDENT))


def mixture(work: Path) -> list[str]:
    """Settings of the training data: as many named samples as ordinary ones, and the discriminator's pictures."""
    shares = {PAIRS: 35, NAMED: 40, REAL: 25}
    sources = ", ".join(f"{{path: {work / name}, weight: {share}}}" for name, share in shares.items())
    return [f"data.sources=[{sources}]", f"loss.lpips_weights={work / VGG}"]


def train_joint(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Train in work/joint and replace work/unet; the adapter goes to work/joint_adapter."""
    changes = [
        "mode=joint", f"model={work / STUDENT}", f"seed={s.seed}", *mixture(work),
        f"data.pairs={work / LESSONS}", f"loss.hspace={s.hspace}", f"loss.reconstruct={s.reconstruct}",
        "student.lora.rank=0", f"student.num_neighbors={K}", "student.retrieval_dropout=0.1",
        f"optim.lr={s.joint_rate}", "optim.weight_decay=0.01", f"loop.max_steps={s.joint_steps}",
        f"loop.batch={s.student_batch}", f"loop.micro_batch={s.student_batch // parallel.WORLD}", "loop.ema=0.998",
        "loop.precision=bf16",
    ]  # fmt: skip
    folder = train("joint", work, changes)
    if parallel.RANK == 0:
        shutil.copytree(folder / "unet", work / "unet", dirs_exist_ok=True)
        (work / "joint_adapter").mkdir(exist_ok=True)
        shutil.copy(folder / "adapter.safetensors", work / "joint_adapter")
