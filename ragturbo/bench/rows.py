"""A database as large as a machine holds: hundreds of thousands of distinct int8 records, many segments at once.

Records are random bytes, as the store sees them; search, gather and blending cost the same for any.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ragturbo.model.bundle import Bundle
    from ragturbo.retrieval import Database

WANTED = 630_000
SEGMENT = 16_384


def where_and_how_many(
    bundle: Bundle, wanted: int, folders: tuple[str, ...] = ("/dev/shm", "/tmp")
) -> tuple[Path, int]:
    """The folder with the most room, and how many records fit there and once more into page-locked memory."""
    geometry = _geometry(bundle)
    places = [Path(f) for f in folders if Path(f).is_dir()]
    place = max(places, key=lambda p: shutil.disk_usage(p).free)
    free, memory = shutil.disk_usage(place).free, available_memory()
    # Files of a memory file system are memory too.
    each = geometry.record_bytes + (geometry.stride if str(place).startswith("/dev/shm") else 0)
    return place, max(1, min(wanted, int(0.9 * free / geometry.stride), int(0.85 * memory / each)))


def available_memory() -> int:
    """Bytes that programs may still take, by the kernel's own estimate."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def write(bundle: Bundle, folder: Path, count: int, *, workers: int = 8, seed: int = 0) -> Database:
    """`count` records under `folder`, opened without checksums on reads and with as many reading threads."""
    from ragturbo.bench.models import clustered_keys
    from ragturbo.retrieval import Database, durable, writer

    geometry = _geometry(bundle)
    rng = np.random.default_rng(seed)
    keys = clustered_keys(count, geometry.key_dim, rng).astype(np.float16)
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
        # The scales behind a record's values are floats: any bytes will not do.
        rows[:, values:size] = np.full(geometry.tokens, 0.01, "<f4").view(np.uint8)
        out.add_encoded([Record(i, f"pair {i}") for i in range(first, last)], keys[first:last], rows)
    return Finished(*out.finish())


def _geometry(bundle: Bundle) -> Any:
    from ragturbo.retrieval.format import Geometry

    size = bundle.unet.unet.config.sample_size
    return Geometry(*bundle.unet.grid(size, size), bundle.unet.channels, "int8", bundle.text.key_dim)
