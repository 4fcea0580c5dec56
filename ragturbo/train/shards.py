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

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
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
        values = {"format": FORMAT, "kind": self.kind, "inputs": self.inputs, "shard_size": self.shard_size}
        write_or_check_index(folder, {**values, "made_by": self.made_by})


def write_or_check_index(folder: Path, values: dict[str, Any]) -> None:
    """Write `values` to index.json, or raise InvalidRequest if it is there with other values."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / INDEX
    # As JSON has them: a tuple is a list.
    values = json.loads(json.dumps(values))
    if path.is_file():
        if changed := changed_settings(_read_json(path), values):
            what = ", ".join(f"{name} ({text})" for name, text in changed.items())
            raise InvalidRequest(
                f"{folder} was started with other settings: {what}. Use the same ones or another folder, or delete it "
                "first"
            )
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
    """Write a shard, which may be empty.

    Args:
        tensors: (N, …) each.
        records: N, each at least with "caption".
    """
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
        self.plan = _read_plan(self.folder)
        self.files = [shard_path(self.folder, i) for i in range(self.plan.shards)]
        _check_complete(self.folder, self.files)
        self._handles: OrderedDict[Path, Any] = OrderedDict()
        # The handles are used by the prefetching thread and by others.
        self._lock = threading.Lock()
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
        return self._row(self.files[shard], name, row)

    def record(self, index: int) -> dict[str, Any]:
        """{"caption": …, "source": …, …}"""
        shard, row = self.locate(index)
        file = self._open(self.files[shard])
        start, stop = file.get_slice("record_offsets")[row : row + 2].tolist()
        return json.loads(bytes(file.get_slice("record_bytes")[start:stop].tolist()))

    def records(self, shard: int) -> Iterator[dict[str, Any]]:
        """The records of one file."""
        file = self._open(self.files[shard])
        offsets = file.get_tensor("record_offsets").tolist()
        blob = file.get_tensor("record_bytes").numpy().tobytes()
        for start, stop in zip(offsets, offsets[1:], strict=False):
            yield json.loads(blob[start:stop])

    def tensor(self, shard: int, name: str) -> Tensor:
        """A field of all samples of one file."""
        return self._open(self.files[shard]).get_tensor(name)

    def neighbors(self) -> NeighborTable | None:
        folder = self.folder / NEIGHBORS
        return NeighborTable(self, folder) if (folder / INDEX).is_file() else None

    def _row(self, path: Path, name: str, row: int) -> Tensor:
        return self._open(path).get_slice(name)[row : row + 1][0]

    def _open(self, path: Path) -> Any:
        with self._lock:
            handle = self._handles.get(path)
            if handle is None:
                handle = self._handles[path] = open_safetensors(path)
                while len(self._handles) > _OPEN:
                    self._handles.popitem(last=False)
            else:
                self._handles.move_to_end(path)
            return handle


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
        return self._shards._row(path, "ids", row), self._shards._row(path, "lam", row)


def digest(items: Sequence[Any]) -> str:
    """sha256 of a list of inputs."""
    total = hashlib.sha256()
    for item in items:
        total.update(str(item).encode() + b"\n")
    return total.hexdigest()


def _check_complete(folder: Path, files: Sequence[Path]) -> None:
    if missing := [path.name for path in files if not path.is_file()]:
        raise DatabaseError(
            f"{folder} is unfinished: {len(missing)} of {len(files)} shards are missing ({missing[0]} …). Run the "
            "command that made it again; it continues where it stopped."
        )


def _read_plan(folder: Path) -> Plan:
    path = folder / INDEX
    if not path.is_file():
        raise DatabaseError(f"{folder} is not a folder of training samples: it has no {INDEX}")
    values = _read_json(path)
    if values.get("format") != FORMAT:
        raise DatabaseError(f"{path} has format {values.get('format')!r}; this version reads {FORMAT}")
    return Plan(values["kind"], values["inputs"], values["shard_size"], values["made_by"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DatabaseCorrupt(f"{path}: {error}") from error
