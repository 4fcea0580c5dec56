"""The manifest of a generation: contents of the database, and size and checksums of each of its files.

CURRENT names a generation and the SHA-256 of its manifest, so only a committed manifest is accepted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ragturbo.errors import DatabaseCorrupt, DatabaseError, InvalidRequest
from ragturbo.messages import short
from ragturbo.retrieval import durable
from ragturbo.retrieval.durable import FileSum
from ragturbo.retrieval.format import FORMAT_VERSION, Geometry, generation_name, segment_name

FORMAT_NAME = "ragturbo-database"
SEGMENT_FILES = ("hseg", "keys", "parquet")
# The folder of a model's own database, in that of the model.
OWN_DATABASE = "database"
_CURRENT = re.compile(rb"(gen-\d{6,}) ([0-9a-f]{64})\n")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_MAX_MANIFEST = 256 << 20


@dataclass(frozen=True)
class SegmentEntry:
    """One segment: its files in `segments/` and the CRC-32 of its trailer, which covers its tables."""

    number: int
    count: int
    first_id: int
    last_id: int
    trailer_crc32: int
    files: dict[str, FileSum]

    @property
    def name(self) -> str:
        return segment_name(self.number)


@dataclass(frozen=True)
class IndexEntry:
    """A saved approximate index: its kind, which is also its folder, its configuration and files."""

    kind: str
    rows: int
    config: dict[str, Any]
    files: dict[str, FileSum]


@dataclass(frozen=True)
class Manifest:
    generation: int
    geometry: Geometry
    key_kind: str
    key_mean: tuple[float, ...]
    encoder: dict[str, Any]
    segment_records: int
    rows: int
    removed: int
    next_id: int
    next_segment: int
    segments: tuple[SegmentEntry, ...]
    files: dict[str, FileSum]
    index: IndexEntry | None = None
    centred: bool = False
    job: str = ""
    """Name of the change that made this generation. A resumed job reads here whether it was committed."""

    @property
    def encoder_digest(self) -> bytes:
        """32 bytes that identify the encoder of a segment."""
        return hashlib.sha256(json.dumps([self.key_kind, self.encoder], sort_keys=True).encode()).digest()

    @property
    def generation_folder(self) -> str:
        return generation_name(self.generation)

    def to_json(self) -> bytes:
        geometry = asdict(self.geometry)
        document = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "generation": self.generation,
            "job": self.job,
            "rows": self.rows,
            "removed": self.removed,
            "next_id": self.next_id,
            "next_segment": self.next_segment,
            "segment_records": self.segment_records,
            "features": {k: geometry[k] for k in ("height", "width", "channels", "dtype")}
            | {"record_bytes": self.geometry.record_bytes, "stride": self.geometry.stride},
            "keys": {"kind": self.key_kind, "dim": geometry["key_dim"], "centred": self.centred,
                     "mean": list(self.key_mean)},
            "encoder": self.encoder,
            "files": {name: asdict(total) for name, total in sorted(self.files.items())},
            "index": None if self.index is None else asdict(self.index),
            "segments": [asdict(segment) for segment in self.segments],
        }  # fmt: skip
        return (json.dumps(document, indent=1, sort_keys=False) + "\n").encode()

    def evolved(self, **changes: Any) -> Manifest:
        """Return the manifest of the next generation, with these changes."""
        return replace(self, **{"generation": self.generation + 1, "job": "", **changes})


_FIELDS = {
    "generation": int, "job": str, "rows": int, "removed": int, "next_id": int, "next_segment": int,
    "segment_records": int, "encoder": dict, "files": dict[str, FileSum], "segments": list[SegmentEntry],
    "features": {"height": int, "width": int, "channels": int, "dtype": str, "record_bytes": int, "stride": int},
    "keys": {"kind": str, "dim": int, "centred": bool, "mean": list},
}  # fmt: skip


def typed(kind: Any, value: Any, name: str) -> Any:
    """Convert parsed JSON to a type.

    Args:
        kind: bool, str, int (≥ 0), list, dict, a dataclass, a list or dict of dataclasses, or {field: kind}.
        name: of the value, for errors.

    Raises:
        ValueError: a field is missing, has another type or is out of range.
    """
    if is_dataclass(kind):
        return kind(**typed(get_type_hints(kind), value, name))  # type: ignore[operator]
    if isinstance(kind, dict):
        fields = typed(dict, value, name)
        for field in kind.keys() - fields.keys():
            raise ValueError(f"field {name}.{field} is missing")
        return {field: typed(inner, fields[field], f"{name}.{field}") for field, inner in kind.items()}
    plain, arguments = get_origin(kind) or kind, get_args(kind)
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise ValueError(f"field {name} must be {plain.__name__}, not {type(value).__name__}")
    if plain is int and not 0 <= value < 2**62:
        raise ValueError(f"field {name} is {value}, outside 0…2**62")
    if plain is list and arguments:
        return [typed(arguments[0], entry, f"{name}[{i}]") for i, entry in enumerate(value)]
    if plain is dict and arguments and arguments[1] is not Any:
        for key in value:
            # Names become paths, so they may not leave the folder.
            if not _FILE_NAME.fullmatch(key):
                raise ValueError(f"field {name}: {key!r} is not a plain file name")
        return {key: typed(arguments[1], entry, f"{name}.{key}") for key, entry in value.items()}
    return value


def parse(raw: bytes, where: str) -> Manifest:
    """Parse a manifest. Raises DatabaseCorrupt if a field is missing, mistyped, out of range or inconsistent."""
    try:
        document = typed(dict, json.loads(raw), "manifest")
        if document.get("format") != FORMAT_NAME:
            raise ValueError(f"format is {document.get('format')!r}, not {FORMAT_NAME!r}")
        version = typed(int, document.get("version"), "version")
        if version != FORMAT_VERSION:
            raise DatabaseError(
                f"{where}: database format version {version}; this ragturbo reads version {FORMAT_VERSION}: upgrade it"
            )
        return _manifest(document)
    except (ValueError, RecursionError) as error:
        raise DatabaseCorrupt(f"{where}: {error}") from None


def _manifest(document: dict[str, Any]) -> Manifest:
    fields = typed(_FIELDS, document, "manifest")
    features, keys = fields.pop("features"), fields.pop("keys")
    shape = {name: features[name] for name in ("height", "width", "channels", "dtype")}
    geometry = Geometry(**shape, key_dim=keys["dim"])
    for name, value in (("record_bytes", geometry.record_bytes), ("stride", geometry.stride)):
        if features[name] != value:
            raise ValueError(f"field features.{name} is {features[name]}; this geometry gives {value}")
    mean = keys["mean"]
    if len(mean) != geometry.key_dim or not all(isinstance(v, float) and math.isfinite(v) for v in mean):
        raise ValueError(f"field keys.mean must be {geometry.key_dim} finite numbers")
    index = document.get("index")
    if index is not None:
        index = typed(IndexEntry, index, "index")
        if index.kind != "scann":
            raise ValueError(f"field index.kind is {index.kind!r}; this version knows 'scann'")
    segments = tuple(fields.pop("segments"))
    manifest = Manifest(**fields, geometry=geometry, key_kind=keys["kind"], key_mean=tuple(mean), index=index,
                        centred=keys["centred"], segments=segments)  # fmt: skip
    _check_consistency(manifest)
    return manifest


def _check_consistency(manifest: Manifest) -> None:
    rows, last = 0, -1
    numbers = set()
    for segment in manifest.segments:
        here = f"segment {segment.name}"
        if segment.number in numbers or segment.number >= manifest.next_segment:
            raise ValueError(f"{here} is listed twice or not below next_segment {manifest.next_segment}")
        numbers.add(segment.number)
        if segment.count and not last < segment.first_id <= segment.last_id < manifest.next_id:
            raise ValueError(f"{here}: ids {segment.first_id}…{segment.last_id} do not follow {last}")
        if set(segment.files) != set(SEGMENT_FILES):
            raise ValueError(f"{here}: files must be {', '.join(SEGMENT_FILES)}, not {', '.join(segment.files)}")
        for kind, size in (
            ("hseg", manifest.geometry.segment_bytes(segment.count)),
            ("keys", segment.count * manifest.geometry.key_dim * 2),
        ):
            if segment.files[kind].bytes != size:
                raise ValueError(f"{here}: .{kind} has {segment.files[kind].bytes} bytes, not {size}")
        last = segment.last_id if segment.count else last
        rows += segment.count
    if rows != manifest.rows or manifest.removed > manifest.rows:
        raise ValueError(f"{manifest.rows} rows with {manifest.removed} removed, but the segments hold {rows}")
    if set(manifest.files) != {"removed.npy"}:
        raise ValueError(f"files must be removed.npy, not {', '.join(manifest.files) or 'none'}")


def differences(base: Manifest, geometry: Geometry, key_kind: str, encoder: dict[str, Any]) -> list[tuple[str, str]]:
    """Compare what encoded a database with another encoder: each difference in words, of the database and the other."""
    found = []
    if key_kind != base.key_kind:
        found.append((f"{base.key_kind!r} keys", f"{key_kind!r} keys"))
    for part in sorted({*base.encoder, *encoder}):
        if base.encoder.get(part) != encoder.get(part):
            found.append((_part(part, base.encoder), _part(part, encoder)))
    if geometry != base.geometry:
        found.append((base.geometry.describe(), geometry.describe()))
    return found


def _part(name: str, encoder: dict[str, Any]) -> str:
    return f"{name} {str(encoder[name])[:8]}" if name in encoder else f"no {name}"


def database_folder(path: Any) -> Path:
    """Return the folder of a database as a path. Raises InvalidRequest for anything but a name or path."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise InvalidRequest(f"path={short(path)} must be the name of a database's folder", option="path")
    return Path(path).expanduser()


def read_current(folder: Path) -> tuple[str, str]:
    """Return the name of the current generation and the SHA-256 of its manifest."""
    path = folder / "CURRENT"
    try:
        with open(path, "rb") as file:
            raw = file.read(4096)
    except (FileNotFoundError, NotADirectoryError):
        raise DatabaseError(f"{folder}: not a ragturbo database: {_why_none(folder)}") from None
    except OSError as error:
        raise DatabaseError(f"{path}: reading failed: {error.strerror}") from error
    match = _CURRENT.fullmatch(raw)
    if not match:
        raise DatabaseCorrupt(f"{path}: must be 'gen-NNNNNN <sha256>', not {raw[:100]!r}")
    return match[1].decode(), match[2].decode()


def _why_none(folder: Path) -> str:
    """Say what is at `folder`, which has no CURRENT, and what to do."""
    if not folder.exists():
        return f"there is no such folder. `ragturbo db build PAIRS --out {folder}` makes one"
    if not folder.is_dir():
        return "it is a file, and a database is a folder"
    if (folder / "segments").is_dir():
        return "its first build is unfinished (no CURRENT). Run the same build again to finish it"
    if (folder / OWN_DATABASE / "CURRENT").is_file():
        return f"it is a model with one of its own, {folder / OWN_DATABASE}"
    return f"it has no CURRENT. `ragturbo db build {folder} --out OTHER-FOLDER` makes one of images with captions"


def load(folder: Path) -> Manifest:
    """Load the manifest that CURRENT names and check its SHA-256."""
    name, digest = read_current(folder)
    path = folder / name / "manifest.json"
    with durable.naming(path, "reading"), open(path, "rb") as file:
        raw = file.read(_MAX_MANIFEST + 1)
    if len(raw) > _MAX_MANIFEST:
        raise DatabaseCorrupt(f"{path}: larger than {_MAX_MANIFEST} bytes")
    found = hashlib.sha256(raw).hexdigest()
    if found != digest:
        raise DatabaseCorrupt(f"{path}: its SHA-256 is {found}, CURRENT says {digest}")
    manifest = parse(raw, str(path))
    if manifest.generation_folder != name:
        raise DatabaseCorrupt(f"{path}: says it is generation {manifest.generation}")
    return manifest


def segment_path(folder: Path, number: int, kind: str) -> Path:
    return folder / "segments" / f"{segment_name(number)}.{kind}"
