"""A run killed at any moment, and resumed, ends with the same bits as one that was never killed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.train import checkpoint

STEPS = 4
FILES = ("trainable", "ema", "heads", "optimizer_g", "optimizer_d")


class Runner:
    """The process of killed_run.py, which imports once and forks a child a run."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed_run.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
        )  # fmt: skip

    def __call__(self, settings: dict, out: Path, world: int = 1, **kill: float | int | None) -> list[int]:
        job = {"settings": settings, "out": str(out), "world": world, "port": free_port(), **kill}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def run():
    runner = Runner()
    yield runner
    runner.process.stdin.close()
    runner.process.wait()


def settings_of(world, processes: int = 1) -> dict:
    """All components that have a state are on, with a checkpoint every step, so that kills coincide with saves."""
    return world.settings(
        loop__max_steps=STEPS, loop__save_every=1, loop__batch=4, loop__micro_batch=2 // processes,
        student__retrieval_dropout=0.3, student__steps=2, student__lora={"rank": 2, "alpha": 2.0, "dropout": 0.1},
        optim={"lr": 1e-3, "warmup": 3, "decay": "cosine"},
        data__sources=[{"path": str(world.data), "weight": 3.0}, {"path": str(world.real)}],
    )  # fmt: skip


def bits(out: Path) -> dict[str, bytes]:
    last = out / "checkpoints" / f"step-{STEPS:06d}"
    return {name: (last / f"{name}.safetensors").read_bytes() for name in FILES}


# The full count, on a machine that does other things too.
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumed_until_it_ends_has_the_bits_of_an_unbroken_one(
    world, run, tmp_path, rng, long_count, processes
):
    settings = settings_of(world, processes)
    start = time.monotonic()
    assert run(settings, tmp_path / "unbroken", processes) == [0] * processes
    took = time.monotonic() - start
    expected = bits(tmp_path / "unbroken")
    kills = 0
    for attempt in range(long_count(20)):
        out = tmp_path / f"killed-{attempt}"
        # A save syncs five tensor files, the facts and two folders: the n-th sync is inside one.
        aim = {"kill_at_sync": int(rng.integers(1, 8 * STEPS))} if attempt % 2 == 0 else None
        while True:
            how = aim or {"kill_after": float(rng.uniform(0.2, 1.0)) * took}
            codes = run(settings, out, processes, **how)
            if codes == [0] * processes:
                break
            assert set(codes) <= {-9, 0, 1}, codes
            kills += -9 in codes
            # After one aimed kill the rest of the run is not killed; the others are killed several times.
            aim = aim and {"kill_after": None}
            if kills > 3 * (attempt + 1):
                aim = {"kill_after": None}
        assert bits(out) == expected
        assert not list((out / "checkpoints").glob(".*"))
        shutil.rmtree(out)
    assert kills > 0


def test_a_checkpoint_that_was_changed_is_refused_by_name(world, tmp_path):
    from ragturbo.train.ladd import LADDTrainer

    LADDTrainer(world.config(loop__max_steps=1, loop__batch=2), tmp_path, device="cpu").train()
    path = checkpoint.latest(tmp_path / "checkpoints")
    file = path / "heads.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ModelError, match="heads.safetensors is missing or damaged"):
        LADDTrainer(world.config(loop__max_steps=2, loop__batch=2), tmp_path, device="cpu", resume=True)


def test_a_run_is_not_resumed_with_other_settings_nor_begun_twice(world, tmp_path):
    from ragturbo.train.ladd import LADDTrainer

    LADDTrainer(world.config(loop__max_steps=1, loop__batch=2), tmp_path, device="cpu").train()
    with pytest.raises(InvalidRequest, match="continue it with --resume"):
        LADDTrainer(world.config(loop__max_steps=2, loop__batch=2), tmp_path, device="cpu")
    with pytest.raises(InvalidRequest, match=r"optim.lr \(was 0.001, now 0.01\)"):
        LADDTrainer(world.config(loop__batch=2, optim__lr=1e-2), tmp_path, device="cpu", resume=True)


def test_only_the_newest_checkpoints_are_kept_and_none_is_half_there(tmp_path):
    import torch

    for step in (1, 2, 30):
        checkpoint.save(tmp_path, step, {"a": {"x": torch.full((3,), float(step))}}, {}, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000002", "step-000030"]
    states, facts = checkpoint.load(checkpoint.latest(tmp_path))
    assert states["a"]["x"].tolist() == [30.0] * 3 and facts["step"] == 30
