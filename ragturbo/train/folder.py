"""The layout of a data folder and its index.json, without the samples. Imports no torch.

my-data/
  index.json                     what the samples are: fields, number of shards, how they were made
  skipped.jsonl                  the inputs that were left out, and why
  000000.safetensors             latents [noise] input_ids [text key], and a JSON record per sample
  neighbors/000000.safetensors   ids and lam (N, k), by `ragturbo data neighbors`
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragturbo.errors import DatabaseCorrupt, DatabaseError, InvalidRequest
from ragturbo.train.settings import changed_settings

FORMAT = 1
INDEX, SKIPPED = "index.json", "skipped.jsonl"
NEIGHBORS = "neighbors"


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
    make_folder(folder)
    path = folder / INDEX
    # Compared as JSON, in which a tuple is a list.
    values = json.loads(json.dumps(values))
    if path.is_file():
        if changed := changed_settings(read_json(path), values):
            what = ", ".join(f"{name} ({text})" for name, text in changed.items())
            raise InvalidRequest(
                f"{folder} was started with other settings: {what}. Use those, delete it, or choose another folder"
            )
        return
    # Several processes may do this at once; all write the same bytes.
    part = path.with_name(f".{INDEX}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        part.replace(path)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror or error}") from error


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"the folder {folder} cannot be made: {error.strerror or error}") from error


def check_output(folder: Path) -> None:
    """Raise InvalidRequest if `folder` cannot be written to. Makes nothing."""
    for path in (folder, *folder.absolute().parents):
        if not path.exists():
            continue
        if not path.is_dir():
            raise InvalidRequest(f"{folder} cannot be written: {path} is a file, not a folder")
        if not os.access(path, os.W_OK | os.X_OK):
            raise InvalidRequest(f"{folder} cannot be written: {path} is read-only for this user")
        return


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise errors of writing tensors, such as a full disk, as a database error that names `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DatabaseError(f"{path} cannot be written: {error}") from error


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:06d}.safetensors"


def remaining(folder: Path, shards: int, rank: int = 0, world: int = 1) -> list[int]:
    """The missing shards that process `rank` of `world` makes."""
    # By shard number, not by position among the missing ones: processes that start later see fewer missing.
    return [i for i in range(rank, shards, world) if not shard_path(folder, i).is_file()]


def read_plan(folder: Path) -> Plan:
    """The plan of a folder of training samples, all of whose shards are there."""
    if not folder.is_dir():
        raise DatabaseError(
            f"there is no folder {folder}: make it with `ragturbo data teacher` or `ragturbo data encode`"
        )
    if not (folder / INDEX).is_file():
        raise DatabaseError(
            f"{folder} is not a folder of training samples, which `ragturbo data teacher` and `ragturbo data encode` "
            f"make: it has no {INDEX}"
        )
    values = read_json(folder / INDEX)
    if (found := values.pop("format", None)) != FORMAT:
        raise DatabaseError(f"{folder / INDEX} has format {found!r}; this version reads {FORMAT}")
    try:
        plan = Plan(**values)
        files = [shard_path(folder, i) for i in range(plan.shards)]
    except (TypeError, ZeroDivisionError) as error:
        raise DatabaseCorrupt(f"{folder / INDEX} is damaged: {error}") from error
    check_complete(folder, files)
    return plan


def check_complete(folder: Path, files: Sequence[Path]) -> None:
    if missing := [path.name for path in files if not path.is_file()]:
        shards = "shard is" if len(files) == 1 else f"{len(files)} shards are"
        raise DatabaseError(
            f"{folder} is unfinished: {len(missing)} of its {shards} missing ({missing[0]}). Run the command that made "
            "it again; it continues where it stopped."
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DatabaseCorrupt(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise DatabaseCorrupt(f"{path} is damaged: it holds no settings")
    return values
