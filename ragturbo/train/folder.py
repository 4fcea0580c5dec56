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
from ragturbo.folders import check_writable, make_folder, read_json
from ragturbo.messages import many
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
        """Write index.json, or check that an unfinished folder was started with the same settings. Called before each
        shard is written, so that a command that fails earlier leaves nothing."""
        write_or_check_index(folder, self._index())

    def check(self, folder: Path) -> None:
        """Check that an unfinished folder was started with the same settings. Writes nothing."""
        check_index(folder, self._index())

    def _index(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}


def check_index(
    folder: Path, values: dict[str, Any], instead: str = "choose another --out, or delete the folder"
) -> bool:
    """Whether index.json is there with `values`.

    Raises:
        InvalidRequest: it is there with other values, and so is a shard.
    """
    path = folder / INDEX
    if not path.is_file():
        return False
    # Compared as JSON, in which a tuple is a list.
    changed = changed_settings(read_json(path), json.loads(json.dumps(values)))
    if changed and any(folder.glob("[0-9]*.safetensors")):
        what = ", ".join(f"{name} ({text})" for name, text in changed.items())
        raise InvalidRequest(f"{folder} was started with other settings: {what}. Use those, {instead}")
    return not changed


def write_or_check_index(folder: Path, values: dict[str, Any], **words: str) -> None:
    """Write `values` to index.json, unless `check_index` finds it there."""
    make_folder(folder)
    if check_index(folder, values, **words):
        return
    path = folder / INDEX
    # Several processes may do this at once; all write the same bytes.
    part = path.with_name(f".{INDEX}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        part.replace(path)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror or error}") from error


def check_data_output(folder: Path) -> None:
    """`check_writable` for training samples: also refuse a folder that holds other files."""
    check_writable(folder)
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    ours = (folder / INDEX).is_file() and {"format", "kind", "made_by"} <= read_json(folder / INDEX).keys()
    if names - {SKIPPED} and not ours:
        raise InvalidRequest(
            f"{folder} holds other files, such as {min(names - {SKIPPED})}: choose an empty or a new folder as --out"
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise errors of writing tensors, such as a full disk, as a database error that names `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DatabaseError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


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
        raise DatabaseCorrupt(f"{folder / INDEX} is damaged or not of a folder of training samples") from error
    check_complete(folder, files)
    return plan


def count_samples(folder: Path, plan: Plan) -> int:
    """The number of samples in a complete folder, from the headers of its files."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in (shard_path(folder, i) for i in range(plan.shards)):
        try:
            with safe_open(path, framework="numpy") as file:
                total += int((file.metadata() or {})["samples"])
        except (OSError, SafetensorError, KeyError) as error:
            raise DatabaseCorrupt(f"{path} is not a shard of training samples") from error
    return total


def check_relabel(folder: Path, prompts: Sequence[str | None]) -> None:
    """Raise InvalidRequest unless `folder` holds teacher latents, and as many as there are prompts."""
    plan = read_plan(folder)
    if plan.kind != "teacher":
        raise InvalidRequest(f"{folder} holds no teacher latents: only those can get another prompt")
    if len(prompts) != (count := count_samples(folder, plan)):
        raise InvalidRequest(
            f"{many(len(prompts), 'prompt')} for the {many(count, 'sample')} of {folder}: give one for each, in order; "
            "an empty one leaves its sample out"
        )
    if not any(prompts):
        raise InvalidRequest("no prompts given")


def check_complete(folder: Path, files: Sequence[Path]) -> None:
    if missing := [path.name for path in files if not path.is_file()]:
        shards = "shard is" if len(files) == 1 else f"{len(files)} shards are"
        raise DatabaseError(
            f"{folder} is unfinished: {len(missing)} of its {shards} missing ({missing[0]}). Run the command that made "
            "it again; it continues where it stopped."
        )
