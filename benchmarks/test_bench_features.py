"""Feature rows of 160 KiB in random order, page cache to destination: ours, and what one would write without it.

The file is 1.3 GB and is read once before anything is timed, so that the disk has no part in it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ragturbo.bench import roofline
from ragturbo.retrieval import Database, FeatureCache, Geometry, Record

GEOMETRY = Geometry(8, 8, 1280, "float16", 16)
ROWS, ROTATE = 8192, 64
COUNTS = [pytest.param(1, marks=pytest.mark.quick), 4, 16, 64]
READERS = [
    "ours",
    "ours, checksums",
    "ours, one thread",
    "memcpy",
    "memcpy, one thread",
    "memmap",
    "safetensors",
    "cache",
]


def cache_folder() -> Path:
    return Path(os.environ.get("RAGTURBO_BENCH_CACHE", Path.home() / ".cache" / "ragturbo-bench"))


class Rows:
    def __init__(self) -> None:
        from safetensors.torch import save_file

        self.folder = cache_folder() / f"rows-{ROWS}-v1"
        if not (self.folder / "done").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            Database.write(self.folder / "db", self._batches(), geometry=GEOMETRY, segment_records=ROWS)
            every = torch.cat([torch.from_numpy(features) for _, _, features in self._batches()])
            save_file({"features": every}, self.folder / "features.safetensors")
            (self.folder / "done").touch()
        self.database = Database.open(self.folder / "db")
        self.segments = self.database.snapshot.segments
        path = self.folder / "db" / "segments" / "000000.hseg"
        self.mapped = np.memmap(path, np.uint8, "r", GEOMETRY.offset(0), (ROWS, GEOMETRY.stride))
        # The same rows in plain memory: what memcpy reads.
        self.memory = np.array(self.mapped)
        self.out = np.zeros((64, GEOMETRY.record_bytes), np.uint8)

    @staticmethod
    def _batches() -> Any:
        for start in range(0, ROWS, 512):
            rng = np.random.default_rng(start)
            features = rng.standard_normal((512, GEOMETRY.tokens, GEOMETRY.channels), np.float32).astype(np.float16)
            yield [Record(0, "row")] * 512, rng.standard_normal((512, 16), np.float32), features


@pytest.fixture(scope="module")
def rows() -> Rows:
    return Rows()


def reader(name: str, rows: Rows) -> Any:
    """A function of ids (n,) that puts their rows somewhere and says where."""
    out = rows.out
    if name.startswith("ours"):
        checks, threads = "checksums" in name, 1 if "one thread" in name else 2

        def ours(ids: np.ndarray) -> np.ndarray:
            rows.segments.read_into(ids, out, checksums=checks, threads=threads)
            return out[: len(ids)]

        return ours
    if name.startswith("memcpy"):
        source, target = torch.from_numpy(rows.memory), torch.from_numpy(out)
        threads = 1 if "one thread" in name else 2

        def memcpy(ids: np.ndarray) -> np.ndarray:
            torch.set_num_threads(threads)
            torch.index_select(source, 0, torch.from_numpy(ids), out=target[: len(ids)])
            return out[: len(ids)]

        return memcpy
    if name == "memmap":
        return lambda ids: rows.mapped[ids]
    if name == "cache":
        cache = FeatureCache(rows.database, host_bytes=ROWS * GEOMETRY.stride)
        return lambda ids: cache.rows(ids).numpy().reshape(len(ids), -1).view(np.uint8)
    from safetensors import safe_open

    file = safe_open(rows.folder / "features.safetensors", "pt")
    part = file.get_slice("features")
    return lambda ids: torch.stack([part[int(i)] for i in ids]).numpy().reshape(len(ids), -1).view(np.uint8)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("count", COUNTS)
def test_rows(measure: Any, rows: Rows, count: int, name: str) -> None:
    rng = np.random.default_rng(count)
    inputs = [(rng.choice(ROWS, count, replace=False),) for _ in range(ROTATE)]
    read = reader(name, rows)

    def verify() -> None:
        for (ids,) in inputs[:8]:
            assert np.array_equal(read(ids), rows.memory[ids])

    moved = count * GEOMETRY.record_bytes
    sizes = {"rows": count, "row_bytes": GEOMETRY.record_bytes, "reader": name}
    cost = roofline.Work(memory_bytes=2 * moved, link_bytes=0, flops=0)
    measure(read, inputs=inputs, verify=verify, cost=cost, dtype="float16", sizes=sizes, group=f"{count} rows",
            device="cpu", capture=False, extra={"moved_bytes": moved})  # fmt: skip


def features(kind: str, count: int) -> torch.Tensor:
    """(count, 64, 1280): Gaussian; or with a few channels 20 times the others, as trained UNets have them."""
    rng = np.random.default_rng(5)
    out = rng.standard_normal((count, GEOMETRY.tokens, GEOMETRY.channels), np.float32)
    if kind == "outlier channels":
        out[:, :, rng.choice(GEOMETRY.channels, 12, replace=False)] *= 20
    return torch.from_numpy(out)


@pytest.mark.parametrize("kind", ["Gaussian", "outlier channels"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_error_of_a_stored_dtype_on_what_is_blended(measure: Any, dtype: str, kind: str) -> None:
    """Relative error of the stored row, of slerp at w = 0.8, and of the adapter's output, against unrounded rows."""
    from ragturbo.model.adapter import HSpaceAdapter
    from ragturbo.ops import slerp
    from ragturbo.retrieval.format import decode_rows, encode_rows

    torch.manual_seed(0)
    geometry = Geometry(8, 8, 1280, dtype, 16)
    exact, h_tgt = features(kind, 8), features(kind, 16)[8:]
    stored = encode_rows(exact.numpy(), geometry)
    back = torch.from_numpy(decode_rows(stored, geometry)).float()
    adapter = HSpaceAdapter(channels=1280, heads=20, kind="transformer").eval()
    with torch.no_grad():
        # Zero at the start, so that training begins at the identity: here it must let something through.
        for name, parameter in adapter.named_parameters():
            if "proj_out" in name and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.02)
    lam, w = torch.ones(8), torch.full((8,), 0.8)

    def blended(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            through = adapter(h_tgt, rows[:, None], lam)
        return {"row": rows, "slerp": slerp(h_tgt, rows, w), "adapter": through, "adapter residual": through - h_tgt}

    truth, found = blended(exact), blended(back)
    errors = {name: float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth}
    measure(decode_rows, inputs=[(stored[:1], geometry)], sizes={"dtype": dtype, "features": kind}, group="dtype",
            device="cpu", extra={"relative_error": errors, "record_bytes": geometry.record_bytes})  # fmt: skip
