"""One LADD step at real sizes with random weights: D and G updated, all three losses, every head, data from disk.

The row "straightforward" is a plain implementation of the same objective: autocast over fp32 weights, stored encoder
activations, separate passes for real and fake samples, unfused optimisers. samples_per_s is in extra_info.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.bench.models import make_bundle, make_database
from ragturbo.model.inject import inject
from ragturbo.train.config import from_dict
from ragturbo.train.data import Prefetcher
from ragturbo.train.ladd import LADDTrainer
from ragturbo.train.losses import hinge_d, hinge_g, total
from ragturbo.train.shards import NEIGHBORS, Plan, Shards, write_shard

SAMPLES = 256
GPU = pytest.mark.gpu


class Setup:
    """A model with its teacher, a database and training data, on disk, as a user would have them."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device, self.folder = device, folder
        self.name = "sd21" if device == "cuda" else "rehearsal"
        dtype = torch.float16 if device == "cuda" else torch.float32
        bundle = make_bundle(self.name, device, dtype, adapter=False)
        bundle.teacher = make_bundle(self.name, device, dtype, seed=1, adapter=False).unet.unet
        bundle.save(folder / "model")
        # Reloaded, because the database must have the fingerprints of the saved model.
        make_database(bundle, folder / "db", 512)
        self._data(bundle)

    def _data(self, bundle: Any) -> None:
        from safetensors.torch import save_file

        from ragturbo.retrieval import Database
        from ragturbo.train.data import database_name

        folder, size = self.folder / "data", bundle.unet.unet.config.sample_size
        generator = torch.Generator().manual_seed(0)
        latents, noise = (torch.randn(SAMPLES, 4, size, size, generator=generator).half() for _ in range(2))
        ids = bundle.text.tokenize([f"a picture of number {i}" for i in range(SAMPLES)]).input_ids.to(torch.int32)
        Plan("teacher", SAMPLES, SAMPLES, {"random": True}).write_or_check(folder)
        records = [{"caption": f"a picture of number {i}"} for i in range(SAMPLES)]
        write_shard(folder, 0, {"latents": latents, "noise": noise, "input_ids": ids}, records)
        (folder / NEIGHBORS).mkdir()
        database = Database.open(self.folder / "db")
        rows = torch.from_numpy(database.ids[:SAMPLES]).view(-1, 1)
        save_file({"ids": rows, "lam": torch.rand(SAMPLES, 1)}, folder / NEIGHBORS / "000000.safetensors")
        made_by = {"k": 1, "database": database_name(database), "max_cosine": None, "retriever": "exact"}
        (folder / NEIGHBORS / "index.json").write_text(json.dumps(made_by))
        assert len(Shards(folder)) == SAMPLES

    def trainer(self, **changes: Any) -> LADDTrainer:
        values: dict[str, Any] = {
            "model": str(self.folder / "model"),
            "database": str(self.folder / "db"),
            "data": {"sources": [{"path": str(self.folder / "data")}]},
            "loss": {"beta": 1.0, "lpips_weights": "random"},
            "student": {"lora": {"rank": 64}},
            "loop": {"batch": self.batch, "micro_batch": self.batch, "ema": 0.999,
                     "precision": "bf16" if self.device == "cuda" else "fp32"},
        }  # fmt: skip
        for name, value in changes.items():
            group, _, key = name.partition("__")
            values.setdefault(group, {})[key] = value
        return LADDTrainer(from_dict(values), self.folder / "out", device=self.device)

    @property
    def batch(self) -> int:
        return 16 if self.device == "cuda" else 2


@pytest.fixture(scope="module")
def setup(device: str, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("train"), device)


@pytest.fixture(autouse=True)
def _release() -> Iterator[None]:
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "compile": {"loop__compile": True},
    "own pass of the fakes": {"discriminator__shared_fake": False},
    "r1 for spectral norm": {"discriminator__spectral_norm": False, "discriminator__r1": 1.0},
    "r1 beside spectral norm": {"discriminator__r1": 1.0},
    "misaligned pairs": {"discriminator__misaligned": True},
    "gradient checkpointing": {"loop__gradient_checkpointing": True},
}


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks={"ours": [pytest.mark.quick], "compile": [GPU, pytest.mark.compiled]}.get(name, []))
        for name in VARIANTS
    ],
)
def test_step(measure: Any, setup: Setup, variant: str) -> None:
    trainer = setup.trainer(**VARIANTS[variant])
    reader = Prefetcher(trainer.load_batch, trainer.sample_numbers(10**9), 4)
    before = {name: value.clone() for name, value in trainer.masters.state().items()}

    def step() -> None:
        trainer.update([reader.next() for _ in range(trainer.accumulation)])

    def verify() -> None:
        # Twice: the first step of a zero-initialised adapter moves its last layer only.
        step(), step()
        assert trainer.skipped == 0 and trainer.updates == 2
        assert all(not torch.equal(before[name], value) for name, value in trainer.masters.state().items())

    try:
        _measure(measure, setup, step, verify, {"variant": variant})
    finally:
        reader.close()


@pytest.mark.quick
def test_straightforward_step(measure: Any, setup: Setup) -> None:
    trainer = setup.trainer(discriminator__shared_fake=False)
    plain = Straightforward(trainer)
    reader = Prefetcher(trainer.load_batch, trainer.sample_numbers(10**9), 4)
    before = [p.detach().clone() for p in plain.parameters]

    def step() -> None:
        plain(reader.next().to(trainer.device))

    def verify() -> None:
        step(), step()
        assert all(not torch.equal(a, b) for a, b in zip(before, plain.parameters, strict=True))

    try:
        _measure(measure, setup, step, verify, {"variant": "straightforward"})
    finally:
        reader.close()


@pytest.mark.parametrize("part", ["student forward", "features of real", "features of fake, with gradient", "lpips"])
def test_part(measure: Any, setup: Setup, part: str) -> None:
    """The parts of a step's forward, alone."""
    trainer = setup.trainer()
    batch = trainer.load_batch(next(trainer.sample_numbers(1))).to(trainer.device)
    text = trainer.objective.text(batch).hidden_states
    s = torch.zeros(len(batch), dtype=torch.int64, device=trainer.device)
    z = batch.z0.clone().requires_grad_()
    lpips = trainer.objective.lpips
    assert lpips is not None

    @torch.no_grad()
    def real() -> Any:
        return trainer.discriminator.backbone(batch.z0, s, text)

    calls: dict[str, Any] = {
        "student forward": lambda: trainer.objective.estimate(batch, batch.noise),
        "features of real": real,
        "features of fake, with gradient": lambda: sum(
            f.float().sum() for f in trainer.discriminator.backbone(z, s, text)
        ).backward(),
        "lpips": lambda: lpips(z, batch.z0).sum().backward(),
    }
    _measure(measure, setup, calls[part], None, {"part": part})


def _measure(measure: Any, setup: Setup, call: Any, verify: Any, extra: dict[str, Any]) -> None:
    sizes = {"model": setup.name, "weights": "random", "batch": setup.batch}
    dtype = "bfloat16" if setup.device == "cuda" else "float32"
    measure(call, verify=verify, dtype=dtype, sizes=sizes, group="LADD step", capture=False, extra=extra)
    info = measure._benchmark.extra_info
    if "seconds" in info:
        info["samples_per_s"] = setup.batch / info["seconds"]["p50"]


class Straightforward:
    """The same objective in a plain implementation."""

    def __init__(self, trainer: LADDTrainer) -> None:
        self.trainer = trainer
        student = trainer.student
        student.float()
        trainer.bundle.text.text_encoder.float()
        trainer.discriminator.backbone.unet.unet.float()
        assert trainer.objective.lpips is not None
        self.lpips = trainer.objective.lpips.float()
        self.parameters = list(student.trainable().values())
        options = {"lr": 1e-5, "fused": False, "foreach": False}
        self.g = torch.optim.AdamW(self.parameters, **options)
        self.d = torch.optim.AdamW(trainer.discriminator.parameters(), **options)

    def __call__(self, batch: Any) -> None:
        trainer, size = self.trainer, len(batch)
        device = trainer.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            text = trainer.objective.text(batch)
            h_retr, lam, valid, _ = trainer.objective.retrieved(
                batch, text.key, torch.zeros(size, dtype=torch.bool, device=device)
            )
            z0_hat = self.denoise(batch, text.hidden_states, h_retr, lam, valid)
            s = torch.randint(0, len(trainer.objective.noise), (size,), device=device)
            eps = torch.randn_like(batch.z0)
            real = trainer.objective.noise.noised(batch.z0, eps, s)
            fake = trainer.objective.noise.noised(z0_hat, eps, s)
            d = trainer.discriminator
            # D's step: two passes, real and fake.
            on_real = d(d.backbone(real, s, text.hidden_states))
            on_fake = d(d.backbone(fake.detach(), s, text.hidden_states))
            loss_d = hinge_d(on_real, on_fake).sum()
            self.d.zero_grad()
            loss_d.backward()
            self.d.step()
            # G's step.
            adv = hinge_g(d(d.backbone(fake, s, text.hidden_states)))
            distill = F.smooth_l1_loss(z0_hat, batch.z0)
            perceptual = self.lpips(z0_hat, batch.z0).mean()
            loss = total(adv, distill, perceptual)
        self.g.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.g.step()

    def denoise(self, batch: Any, text: Tensor, h_retr: Any, lam: Any, valid: Any) -> Tensor:
        """The student's forward with the encoder in the graph."""
        student = self.trainer.student
        i = torch.zeros(len(batch), dtype=torch.int64, device=batch.z0.device)
        x = student.noisy(batch.z0, batch.noise, i)
        # Requesting gradients of the input stores every activation of the encoder, as if it were trained.
        sample = (student.to_input[i].view(-1, 1, 1, 1) * x).requires_grad_()
        state = student.hspace.encode(sample, student.timesteps[i], text)
        h = inject("adapter", state.h, h_retr.to(text.dtype), lam=lam, valid=valid, adapter=student.adapter)
        out = student.hspace.decode(state, h)
        return student.x0_from_x[i].view(-1, 1, 1, 1) * x + student.x0_from_out[i].view(-1, 1, 1, 1) * out.float()
