"""The database of the GPU step `added`: 65,000 distinct int8 records of random bytes, and 630,000 keys."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from ragturbo.engine.tables import DeviceKeys
    from ragturbo.model.bundle import Bundle
    from ragturbo.retrieval import Database

# 5 GB, a hundred times a GPU's L2, which are written and page-locked within seconds. All 630,000 would be 52 GB.
ROWS = 65_000
KEYS = 630_000
# As many segments as writing threads.
SEGMENT = 4096


def where_and_how_many(
    bundle: Bundle, wanted: int, folders: tuple[str, ...] = ("/dev/shm", "/tmp")
) -> tuple[Path, int]:
    """Return a folder, and how many records fit there and a second time into page-locked memory.

    The first folder with room for all of them is taken, or the one with the most room. /dev/shm comes first, because
    the disk may be slow.
    """
    geometry = _geometry(bundle)
    places = [Path(f) for f in folders if Path(f).is_dir()]
    room = {p: int(0.9 * shutil.disk_usage(p).free / geometry.stride) for p in places}
    place = max(places, key=lambda p: min(room[p], wanted))
    memory = available_memory()
    # Files in /dev/shm use memory too.
    each = geometry.record_bytes + (geometry.stride if str(place).startswith("/dev/shm") else 0)
    return place, max(1, min(wanted, room[place], int(0.85 * memory / each)))


def available_memory() -> int:
    """Return the kernel's estimate of available memory in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def prompt_keys(bundle: Bundle, words: list[str]) -> np.ndarray:
    """Return the (N, K) fp32 keys of prompts.

    With random weights the keys are close together: without rows of their own all prompts would find the same few rows.
    """
    parts = []
    with torch.inference_mode():
        for start in range(0, len(words), 64):
            ids = bundle.text.tokenize(words[start : start + 64]).input_ids.to(bundle.device)
            parts.append(bundle.text.encode(ids).key.float().cpu().numpy())
    return np.concatenate(parts)


@torch.inference_mode()
def pad_keys(keys: DeviceKeys, count: int) -> None:
    """Extend the keys on the device to `count`. The new ones are searched but never found: their norm is 1/16."""
    old = keys.searched
    generator = torch.Generator(old.device).manual_seed(0)
    short = torch.randn((count - keys.count, old.shape[1]), generator=generator, device=old.device, dtype=old.dtype)
    short /= 16 * old.shape[1] ** 0.5
    same = keys.stored is old
    keys.searched = torch.cat([old, short])
    keys.stored = keys.searched if same else torch.cat([keys.stored, short])
    keys.count = count
    if old.is_cuda:
        # The graphs that read them run on other streams.
        torch.cuda.synchronize(old.device)


def write(
    bundle: Bundle, folder: Path, count: int, *, workers: int = 8, seed: int = 0, own: np.ndarray | None = None
) -> Database:
    """Write `count` records and open them without checksums.

    Args:
        workers: threads for writing and reading.
        own: (N, K) keys that replace those of N random rows.
    """
    from ragturbo.bench.models import clustered_keys
    from ragturbo.retrieval import Database, durable, writer

    geometry = _geometry(bundle)
    rng = np.random.default_rng(seed)
    keys = clustered_keys(count, geometry.key_dim, rng).astype(np.float16)
    if own is not None:
        keys[rng.permutation(count)[: len(own)]] = own
    base = writer.empty_manifest(geometry, bundle.text.key_kind, bundle.fingerprint(), min(SEGMENT, count))
    writer.prepare(folder)
    pool = rng.integers(0, 256, geometry.record_bytes + 1_000_003, dtype=np.uint8)
    with durable.writer_lock(folder), ThreadPoolExecutor(workers) as threads:
        starts = range(0, count, base.segment_records)
        parts = threads.map(
            lambda start: _segment(folder, base, keys, pool, start, min(start + base.segment_records, count)), starts
        )
        writer.commit(folder, writer.joined(base, list(parts), count), np.empty(0, np.int64))
    return Database.open(folder, checksums=False, threads=workers, retriever="exact")


def _segment(folder: Path, base: Any, keys: np.ndarray, pool: np.ndarray, start: int, stop: int) -> Any:
    from ragturbo.retrieval.pairs import Record
    from ragturbo.retrieval.writer import Finished, SegmentWriter

    geometry = base.geometry
    out = SegmentWriter(folder, geometry, start // base.segment_records, base.encoder_digest)
    size, values = geometry.record_bytes, geometry.tokens * geometry.channels
    for first in range(start, stop, 512):
        last = min(first + 512, stop)
        rows = np.zeros((last - first, geometry.stride), np.uint8)
        for i in range(first, last):
            at = i * 7919 % 1_000_003
            rows[i - first, :size] = pool[at : at + size]
        # The scales after a record's values have to be finite floats.
        rows[:, values:size] = np.full(geometry.tokens, 0.01, "<f4").view(np.uint8)
        out.add_encoded([Record(i, f"pair {i}") for i in range(first, last)], keys[first:last], rows)
    return Finished(*out.finish())


def _geometry(bundle: Bundle) -> Any:
    from ragturbo.retrieval.format import Geometry

    size = bundle.unet.unet.config.sample_size
    return Geometry(*bundle.unet.grid(size, size), bundle.unet.channels, "int8", bundle.text.key_dim)
