"""Training samples on disk: numbered safetensors files that any number of processes write and read. `folder.py` has
the layout.

Not tar: a safetensors file gives access to single rows, so the order of samples can be a function of (seed, sample
number) and a resumed run reads nothing twice. A shard is the unit of work and of restart; it is renamed into place when
it is complete.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ragturbo.errors import DatabaseCorrupt, DatabaseError
from ragturbo.model.weights import open_safetensors
from ragturbo.retrieval import durable
from ragturbo.train.folder import INDEX, NEIGHBORS, SKIPPED, Plan, check_complete, read_json, read_plan, shard_path

DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
# Kept besides the samples' fields.
_RECORDS = ("record_bytes", "record_offsets")
_REPORT = "report_bytes"
# Files kept open at a time; each is a memory map.
_OPEN = 128


def write_shard(
    folder: Path,
    shard: int,
    tensors: dict[str, Tensor],
    records: Sequence[dict[str, Any]],
    report: dict[str, Any] | None = None,
) -> None:
    """Write one file of samples.

    Args:
        tensors: (N, …) each. N may be 0.
        records: N, each at least with "caption".
        report: what `Left` says of the shard's inputs. It is part of the file, so that a killed command loses none.
    """
    blobs = [json.dumps(record, ensure_ascii=False, default=str).encode() for record in records]
    if any(len(value) != len(records) for value in tensors.values()):
        raise ValueError(f"{ {name: len(value) for name, value in tensors.items()} } rows for {len(records)} records")
    whole = {name: value.cpu().contiguous() for name, value in tensors.items()}
    whole["record_offsets"] = torch.tensor(np.cumsum([0, *map(len, blobs)]), dtype=torch.int64)
    whole["record_bytes"] = _bytes(b"".join(blobs))
    if report:
        whole[_REPORT] = _bytes(json.dumps(report, ensure_ascii=False, default=str).encode())
    durable.write_file(shard_path(folder, shard), save(whole, {"samples": str(len(records))}))


def read_report(path: Path) -> tuple[int, dict[str, Any]]:
    """The number of samples in a file, and the report it was written with."""
    file = open_safetensors(path)
    # keys() is a method of a safetensors file, which is not iterable itself.
    blob = file.get_tensor(_REPORT).numpy().tobytes() if _REPORT in file.keys() else b"{}"  # noqa: SIM118
    return int((file.metadata() or {}).get("samples", 0)), json.loads(blob)


def _bytes(value: bytes) -> Tensor:
    return torch.frombuffer(bytearray(value or b"\0"), dtype=torch.uint8)


class Shards:
    """A complete folder of samples, opened for random access."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        self.plan: Plan = read_plan(self.folder)
        self.files = [shard_path(self.folder, i) for i in range(self.plan.shards)]
        self._open = functools.lru_cache(_OPEN)(open_safetensors)
        counts = [int((self._open(path).metadata() or {}).get("samples", -1)) for path in self.files]
        if -1 in counts:
            raise DatabaseCorrupt(f"{self.files[counts.index(-1)]} is not a shard of training samples")
        self.starts = np.cumsum([0, *counts])
        if not len(self):
            raise DatabaseError(f"{self.folder} holds no samples: every input was left out (see {SKIPPED})")
        first = next(path for path, count in zip(self.files, counts, strict=True) if count)
        self.fields = frozenset(self._open(first).keys()) - {*_RECORDS, _REPORT}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Sample index -> (position of its file, row)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])

    def read(self, index: int, name: str) -> Tensor:
        """A field of one sample."""
        shard, row = self.locate(index)
        return self.row(self.files[shard], name, row)

    def records(self, shard: int) -> list[dict[str, Any]]:
        """The records of one file: {"caption": …, "source": …, …}."""
        offsets = self.tensor(shard, "record_offsets").tolist()
        blob = self.tensor(shard, "record_bytes").numpy().tobytes()
        return [json.loads(blob[start:stop]) for start, stop in zip(offsets, offsets[1:], strict=False)]

    def tensor(self, shard: int, name: str) -> Tensor:
        """A field of all samples of one file."""
        return self._open(self.files[shard]).get_tensor(name)

    def neighbors(self) -> NeighborTable | None:
        folder = self.folder / NEIGHBORS
        return NeighborTable(self, folder) if (folder / INDEX).is_file() else None

    def row(self, path: Path, name: str, row: int) -> Tensor:
        return self._open(path).get_slice(name)[row : row + 1][0]


class NeighborTable:
    """The precomputed neighbours of a folder of samples: ids (N, k) int64, −1 for none, and lam (N, k) fp32."""

    def __init__(self, shards: Shards, folder: Path) -> None:
        self._shards = shards
        self.made_by: dict[str, Any] = read_json(folder / INDEX)
        self.files = [folder / path.name for path in shards.files]
        check_complete(folder, self.files)
        self.k = int(self.made_by["k"])

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """(ids (k,), lam (k,)) of a sample."""
        shard, row = self._shards.locate(index)
        path = self.files[shard]
        return self._shards.row(path, "ids", row), self._shards.row(path, "lam", row)


def digest(items: Sequence[Any]) -> str:
    """sha256 of a list of inputs."""
    total = hashlib.sha256()
    for item in items:
        total.update(f"{item}\n".encode())
    return total.hexdigest()
