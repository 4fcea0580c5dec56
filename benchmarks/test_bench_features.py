"""Reading feature rows of 160 KiB in random order from the page cache: our store and alternatives.

The file is read sequentially before each benchmark, because some systems reclaim cold pages within seconds. A file that
was read sequentially or just written is cached in large folios, one read in random order in single pages ("single
pages"). "pread" is the fallback without ragturbo._native. memcpy copies the same random records from plain memory.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import roofline
from benchmarks.timing import CACHE, once, summary
from ragturbo.bench.timing import percentiles
from ragturbo.retrieval import Database, FeatureCache, Geometry, Record
from ragturbo.retrieval.store import PreadStore

GEOMETRY = Geometry(8, 8, 1280, "float16", 16)
ROWS, ROTATE = 4096, 64
COUNTS = [pytest.param(1, marks=pytest.mark.quick), 4, 16, 64]
READERS = [
    "ours",
    "ours, checksums",
    "ours, one thread",
    "ours, single pages",
    "pread",
    "memcpy",
    "memcpy, one thread",
    "memmap",
    "safetensors",
    "cache",
]


class Rows:
    def __init__(self) -> None:
        from safetensors.torch import save_file

        self.folder = CACHE / f"rows-{ROWS}-v2"
        if not (self.folder / "done").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            Database.write(self.folder / "db", self._batches(), geometry=GEOMETRY, segment_records=ROWS)
            shutil.copytree(self.folder / "db", self.folder / "single")
            every = torch.cat([torch.from_numpy(features) for _, _, features in self._batches()])
            save_file({"features": every}, self.folder / "features.safetensors")
            os.sync()
            (self.folder / "done").touch()
        self.database = Database.open(self.folder / "db")
        self.segments = self.database.snapshot.segments
        self.path = self.segments.paths[0]
        forget(self.path)
        # The rows in plain memory, for memcpy.
        self.memory = np.fromfile(self.path, np.uint8, ROWS * GEOMETRY.stride, offset=GEOMETRY.offset(0))
        self.memory = self.memory.reshape(ROWS, GEOMETRY.stride)
        self.out = np.zeros((64, GEOMETRY.record_bytes), np.uint8)

    def warm(self, path: Path) -> None:
        """Read the whole file into the page cache sequentially."""
        block = bytearray(1 << 20)
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass

    @staticmethod
    def _batches() -> Any:
        for start in range(0, ROWS, 512):
            rng = np.random.default_rng(start)
            features = rng.standard_normal((512, GEOMETRY.tokens, GEOMETRY.channels), np.float32).astype(np.float16)
            yield [Record(0, "row")] * 512, rng.standard_normal((512, 16), np.float32), features


@pytest.fixture(scope="module")
def rows() -> Rows:
    return Rows()


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reader(name: str, rows: Rows) -> Any:
    """Return a function of ids (n,) that reads their rows and returns them; its file is in the page cache."""
    out = rows.out
    if name.startswith("ours"):
        checks, threads, segments = "checksums" in name, 1 if "one thread" in name else 2, rows.segments
        if "single pages" in name:
            segments = Database.open(rows.folder / "single").snapshot.segments
            forget(segments.paths[0])
            for i in np.random.default_rng(0).permutation(ROWS):
                segments.read_into(np.array([i]), out, checksums=False)
        else:
            rows.warm(rows.path)

        def ours(ids: np.ndarray) -> np.ndarray:
            segments.read_into(ids, out, checksums=checks, threads=threads)
            return out[: len(ids)]

        return ours
    if name == "pread":
        rows.warm(rows.path)
        twin = PreadStore(
            [str(rows.path)], header_bytes=GEOMETRY.offset(0), record_bytes=GEOMETRY.stride,
            payload_bytes=GEOMETRY.record_bytes, counts=[ROWS],
        )  # fmt: skip

        def pread(ids: np.ndarray) -> np.ndarray:
            assert not twin.read_into(ids, out[: len(ids)], threads=2)
            return out[: len(ids)]

        return pread
    if name.startswith("memcpy"):
        source, target = torch.from_numpy(rows.memory), torch.from_numpy(out)
        threads = 1 if "one thread" in name else 2

        def memcpy(ids: np.ndarray) -> np.ndarray:
            torch.set_num_threads(threads)
            torch.index_select(source, 0, torch.from_numpy(ids), out=target[: len(ids)])
            return out[: len(ids)]

        return memcpy
    if name == "memmap":
        rows.warm(rows.path)
        mapped = np.memmap(rows.path, np.uint8, "r", GEOMETRY.offset(0), (ROWS, GEOMETRY.stride))
        return lambda ids: mapped[ids]
    if name == "cache":
        cache = FeatureCache(rows.database, host_bytes=ROWS * GEOMETRY.stride)
        return lambda ids: cache.rows(ids).numpy().reshape(len(ids), -1).view(np.uint8)
    from safetensors import safe_open

    rows.warm(rows.folder / "features.safetensors")
    file = safe_open(rows.folder / "features.safetensors", "pt")
    part = file.get_slice("features")
    return lambda ids: torch.stack([part[int(i)] for i in ids]).numpy().reshape(len(ids), -1).view(np.uint8)


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Restore torch's number of threads, which memcpy sets."""
    own = torch.get_num_threads()
    yield
    torch.set_num_threads(own)


@pytest.mark.usefixtures("torch_threads")
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


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("count", COUNTS)
def test_rows_beside_memcpy(benchmark: Any, rows: Rows, count: int) -> None:
    """Alternate blocks of ours and memcpy over the same ids, with two threads and without checksums."""
    rng = np.random.default_rng(count)
    picks = [rng.choice(ROWS, count, replace=False) for _ in range(ROTATE)]
    runs = {}
    for name in ("memcpy", "ours"):
        read, turn = reader(name, rows), itertools.cycle(picks)
        runs[name] = lambda read=read, turn=turn: read(next(turn))
    times: dict[str, list[float]] = {"memcpy": [], "ours": []}
    from_rest: dict[str, list[float]] = {"memcpy": [], "ours": []}
    for i in range(40):
        for name in ("memcpy", "ours")[:: 1 - 2 * (i % 2)]:
            # Idle threads of a pool spin for up to 20 ms, which would slow down the other reader on two cores.
            time.sleep(30e-3)
            block = [once(runs[name]) for _ in range(24)]
            from_rest[name].append(block[0])
            times[name] += block[4:]
    found = {name: percentiles(data) for name, data in times.items()}
    share = found["memcpy"]["p50"] / found["ours"]["p50"]
    benchmark.group = "share of memcpy"
    benchmark.pedantic(runs["ours"], rounds=5)
    benchmark.extra_info.update(
        op="features", device="cpu", dtype="float16", **summary(times["ours"]), seconds_memcpy=found["memcpy"],
        sizes={"rows": count, "row_bytes": GEOMETRY.record_bytes, "reader": f"ours, {share:.0%} of memcpy"},
        share_of_memcpy=share, measured={"rows_of_memcpy": share} if count == 64 else {},
        seconds_from_rest={name: percentiles(data) for name, data in from_rest.items()},
    )  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
def test_rows_read_for_the_first_time(benchmark: Any, rows: Rows, count: int) -> None:
    """Read from a database that was just opened, whose file is in the page cache, with two threads."""
    rng = np.random.default_rng(count)
    rows.warm(rows.path)
    times = []
    for _ in range(100):
        segments = Database.open(rows.folder / "db").snapshot.segments
        ids = rng.choice(ROWS, count, replace=False)
        time.sleep(3e-3)
        times.append(once(lambda read=segments.read_into, ids=ids: read(ids, rows.out, checksums=False)))
    benchmark.group = f"{count} rows"
    benchmark.pedantic(segments.read_into, args=(ids, rows.out), kwargs={"checksums": False}, rounds=5)
    benchmark.extra_info.update(
        op="features", device="cpu", dtype="float16", **summary(times),
        sizes={"rows": count, "row_bytes": GEOMETRY.record_bytes, "reader": "ours, first read"},
    )  # fmt: skip


def features(kind: str, count: int) -> torch.Tensor:
    """Return (count, 64, 1280) Gaussian features; "outlier channels" scales some by 20, as in trained UNets."""
    rng = np.random.default_rng(5)
    out = rng.standard_normal((count, GEOMETRY.tokens, GEOMETRY.channels), np.float32)
    if kind == "outlier channels":
        out[:, :, rng.choice(GEOMETRY.channels, 12, replace=False)] *= 20
    return torch.from_numpy(out)


@pytest.mark.parametrize("kind", ["Gaussian", "outlier channels"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_error_of_a_stored_dtype_on_what_is_blended(measure: Any, dtype: str, kind: str) -> None:
    """Record the relative error of the stored row, of slerp at w = 0.8, and of the adapter's output."""
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
        # The output projection is initialized to zero.
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
