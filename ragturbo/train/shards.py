"""Training samples on disk: numbered safetensors files that any number of processes write and read.

    my-data/
      index.json                     what the samples are: fields, number of shards, how they were made
      000000.safetensors             latents [noise] input_ids [text key], and a JSON record per sample
      neighbors/000000.safetensors   ids and lam (N, k), by `ragturbo data neighbors`

Not tar: a safetensors file gives access to single rows, so the order of samples can be a function of (seed, sample
number) and a resumed run reads nothing twice. A shard is the unit of work and of restart; it is renamed into place when
it is complete.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ragturbo.errors import DatabaseCorrupt, DatabaseError, InvalidRequest
from ragturbo.model.weights import open_safetensors
from ragturbo.retrieval import durable
from ragturbo.train.config import changed_settings

FORMAT = 1
INDEX = "index.json"
NEIGHBORS = "neighbors"
DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
# Files kept open at a time; each is a memory map.
_OPEN = 128


@dataclass(frozen=True)
class Plan:
    """The contents of index.json, written before the first shard."""

    kind: str
    """"teacher" (latents with the noise that made them) or "encoded" (real images)."""
    inputs: int
    """Number of prompts or images; shard i is made of inputs i·shard_size and on."""
    shard_size: int
    made_by: dict[str, Any]
    """Everything the samples depend on: model fingerprints, guidance, steps, seed, digest of the inputs."""

    @property
    def shards(self) -> int:
        return -(-self.inputs // self.shard_size)

    def inputs_of(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.inputs))

    def write_or_check(self, folder: Path) -> None:
        """Write index.json, or check that an unfinished folder was started with the same settings."""
        write_or_check_index(folder, {"format": FORMAT, **dataclasses.asdict(self)})


def write_or_check_index(folder: Path, values: dict[str, Any]) -> None:
    """Write `values` to index.json, or raise InvalidRequest if it is there with other values."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / INDEX
    # Compared as JSON, in which a tuple is a list.
    values = json.loads(json.dumps(values))
    if path.is_file():
        if changed := changed_settings(_read_json(path), values):
            what = ", ".join(f"{name} ({text})" for name, text in changed.items())
            raise InvalidRequest(f"{folder} was started with other settings: {what}. Use those, or delete it first")
        return
    # Several processes may do this at once; all write the same bytes.
    part = path.with_name(f".{INDEX}.{os.getpid()}.part")
    part.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    part.replace(path)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:06d}.safetensors"


def remaining(folder: Path, shards: int, rank: int = 0, world: int = 1) -> list[int]:
    """The missing shards that process `rank` of `world` makes."""
    # By shard number, not by position among the missing ones: processes that start later see fewer missing.
    return [i for i in range(rank, shards, world) if not shard_path(folder, i).is_file()]


def write_shard(folder: Path, shard: int, tensors: dict[str, Tensor], records: Sequence[dict[str, Any]]) -> None:
    """tensors: (N, …) each; records: N, each at least with "caption". N may be 0."""
    blobs = [json.dumps(record, ensure_ascii=False, default=str).encode() for record in records]
    offsets = torch.tensor(np.cumsum([0, *map(len, blobs)]), dtype=torch.int64)
    text = torch.frombuffer(bytearray(b"".join(blobs) or b"\0"), dtype=torch.uint8)
    if any(len(value) != len(records) for value in tensors.values()):
        raise ValueError(f"{ {name: len(value) for name, value in tensors.items()} } rows for {len(records)} records")
    whole = {name: value.cpu().contiguous() for name, value in tensors.items()}
    data = save({**whole, "record_bytes": text, "record_offsets": offsets}, {"samples": str(len(records))})
    durable.write_file(shard_path(folder, shard), data)


class Shards:
    """A complete folder of samples, opened for random access."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / INDEX).is_file():
            raise DatabaseError(f"{self.folder} is not a folder of training samples: it has no {INDEX}")
        values = _read_json(self.folder / INDEX)
        if (found := values.pop("format", None)) != FORMAT:
            raise DatabaseError(f"{self.folder / INDEX} has format {found!r}; this version reads {FORMAT}")
        self.plan = Plan(**values)
        self.files = [shard_path(self.folder, i) for i in range(self.plan.shards)]
        _check_complete(self.folder, self.files)
        self._open = functools.lru_cache(_OPEN)(open_safetensors)
        counts = [int((self._open(path).metadata() or {}).get("samples", -1)) for path in self.files]
        if -1 in counts:
            raise DatabaseCorrupt(f"{self.files[counts.index(-1)]} is not a shard of training samples")
        self.starts = np.cumsum([0, *counts])
        if not len(self):
            raise DatabaseError(f"{self.folder} holds no samples")
        first = next(path for path, count in zip(self.files, counts, strict=True) if count)
        self.fields = frozenset(self._open(first).keys()) - {"record_bytes", "record_offsets"}

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
        self.made_by: dict[str, Any] = _read_json(folder / INDEX)
        self.files = [folder / path.name for path in shards.files]
        _check_complete(folder, self.files)
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


def _check_complete(folder: Path, files: Sequence[Path]) -> None:
    if missing := [path.name for path in files if not path.is_file()]:
        raise DatabaseError(
            f"{folder} is unfinished: {len(missing)} of {len(files)} shards are missing ({missing[0]} …). Run the "
            "command that made it again; it continues where it stopped."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DatabaseCorrupt(f"{path}: {error}") from error
