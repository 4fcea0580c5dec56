"""The manifest of a generation: contents of the database, and size and checksums of each of its files.

CURRENT names a generation and the SHA-256 of its manifest, so only a committed manifest is accepted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ragturbo.errors import DatabaseCorrupt, DatabaseError
from ragturbo.retrieval import durable
from ragturbo.retrieval.durable import FileSum
from ragturbo.retrieval.format import (
    FORMAT_VERSION,
    GENERATION_NAME,
    SEGMENT_NAME,
    Geometry,
    generation_name,
    segment_name,
)

FORMAT_NAME = "ragturbo-database"
SEGMENT_FILES = ("hseg", "keys", "parquet")
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
    """Name of the change that made this generation. A job that was killed finds here that it was committed."""

    @property
    def encoder_digest(self) -> bytes:
        return encoder_digest(self.encoder, self.key_kind)

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


def encoder_digest(encoder: dict[str, Any], key_kind: str) -> bytes:
    """32 bytes that identify the encoder of a segment."""
    return hashlib.sha256(json.dumps([key_kind, encoder], sort_keys=True).encode()).digest()


@dataclass
class _Reader:
    """Typed fields of parsed JSON. Errors name the file and the field."""

    where: str
    data: dict[str, Any]
    path: str = ""

    def _fail(self, name: str, problem: str) -> DatabaseCorrupt:
        return DatabaseCorrupt(f"{self.where}: field {self.path}{name} {problem}")

    def take(self, name: str, kind: type) -> Any:
        if name not in self.data:
            raise self._fail(name, "is missing")
        value = self.data[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._fail(name, f"must be {kind.__name__}, not {type(value).__name__}")
        return value

    def count(self, name: str, most: int = 2**62) -> int:
        value = self.take(name, int)
        if not 0 <= value <= most:
            raise self._fail(name, f"is {value}, outside 0…{most}")
        return value

    def inside(self, name: str) -> _Reader:
        return _Reader(self.where, self.take(name, dict), f"{self.path}{name}.")

    def sum(self, name: str) -> FileSum:
        inner = self.inside(name)
        digest = inner.take("sha256", str)
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise inner._fail("sha256", f"is {digest!r}, not 64 hexadecimal digits")
        return FileSum(inner.count("bytes"), digest, inner.count("crc32", 2**32 - 1))

    def sums(self, name: str) -> dict[str, FileSum]:
        inner = self.inside(name)
        for key in inner.data:
            # Names become paths, so they may not leave the folder.
            if not _FILE_NAME.fullmatch(key):
                raise inner._fail(repr(key), "is not a plain file name")
        return {key: inner.sum(key) for key in inner.data}


def segment_from_json(data: Any, where: str, path: str = "") -> SegmentEntry:
    if not isinstance(data, dict):
        raise DatabaseCorrupt(f"{where}: field {path or 'segment'} must be an object, not {type(data).__name__}")
    reader = _Reader(where, data, path)
    files = reader.sums("files")
    if set(files) != set(SEGMENT_FILES):
        raise reader._fail("files", f"must be {', '.join(SEGMENT_FILES)}, not {', '.join(sorted(files)) or 'none'}")
    return SegmentEntry(
        reader.count("number", 10**9), reader.count("count", 2**31 - 1), reader.count("first_id"),
        reader.count("last_id"), reader.count("trailer_crc32", 2**32 - 1), files,
    )  # fmt: skip


def parse(raw: bytes, where: str) -> Manifest:
    """Parse a manifest. Raises DatabaseCorrupt if a field is missing, mistyped, out of range or inconsistent."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DatabaseCorrupt(f"{where}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise DatabaseCorrupt(f"{where}: not a JSON object")
    top = _Reader(where, document)
    if top.take("format", str) != FORMAT_NAME:
        raise DatabaseCorrupt(f"{where}: format is {document['format']!r}, not {FORMAT_NAME!r}")
    version = top.count("version")
    if version != FORMAT_VERSION:
        raise DatabaseError(
            f"{where}: database format version {version}; this ragturbo reads version {FORMAT_VERSION}: upgrade it"
        )
    features, keys = top.inside("features"), top.inside("keys")
    try:
        geometry = Geometry(
            features.take("height", int), features.take("width", int), features.take("channels", int),
            features.take("dtype", str), keys.take("dim", int),
        )  # fmt: skip
    except ValueError as error:
        raise DatabaseCorrupt(f"{where}: {error}") from None
    for name, value in (("record_bytes", geometry.record_bytes), ("stride", geometry.stride)):
        if features.count(name) != value:
            raise features._fail(name, f"is {features.data[name]}; this geometry gives {value}")
    mean = keys.take("mean", list)
    if len(mean) != geometry.key_dim or not all(isinstance(v, float) and math.isfinite(v) for v in mean):
        raise keys._fail("mean", f"must be {geometry.key_dim} finite numbers")
    segments = tuple(
        segment_from_json(entry, where, f"segments[{i}].") for i, entry in enumerate(top.take("segments", list))
    )
    index = None
    if document.get("index") is not None:
        inner = top.inside("index")
        index = IndexEntry(
            inner.take("kind", str), inner.count("rows"), inner.take("config", dict), inner.sums("files")
        )
        if index.kind != "scann":
            raise inner._fail("kind", f"is {index.kind!r}; this version knows 'scann'")
    manifest = Manifest(
        generation=top.count("generation"), geometry=geometry, key_kind=keys.take("kind", str), key_mean=tuple(mean),
        encoder=top.take("encoder", dict), segment_records=top.count("segment_records"), rows=top.count("rows"),
        removed=top.count("removed"), next_id=top.count("next_id"), next_segment=top.count("next_segment"),
        segments=segments, files=top.sums("files"), index=index, centred=keys.take("centred", bool),
        job=top.take("job", str),
    )  # fmt: skip
    _check_consistency(manifest, where)
    return manifest


def _check_consistency(manifest: Manifest, where: str) -> None:
    expected, last = 0, -1
    numbers = set()
    for segment in manifest.segments:
        here = f"{where}: segment {segment.name}"
        if segment.number in numbers or segment.number >= manifest.next_segment:
            raise DatabaseCorrupt(f"{here} is listed twice or not below next_segment {manifest.next_segment}")
        numbers.add(segment.number)
        if segment.count and not last < segment.first_id <= segment.last_id < manifest.next_id:
            raise DatabaseCorrupt(f"{here}: ids {segment.first_id}…{segment.last_id} do not follow {last}")
        for kind, bytes_ in (
            ("hseg", manifest.geometry.segment_bytes(segment.count)),
            ("keys", segment.count * manifest.geometry.key_dim * 2),
        ):
            if segment.files[kind].bytes != bytes_:
                raise DatabaseCorrupt(f"{here}: .{kind} has {segment.files[kind].bytes} bytes, not {bytes_}")
        last = segment.last_id if segment.count else last
        expected += segment.count
    if expected != manifest.rows or manifest.removed > manifest.rows:
        raise DatabaseCorrupt(
            f"{where}: {manifest.rows} rows with {manifest.removed} removed, but segments hold {expected}"
        )
    if set(manifest.files) != {"removed.npy"}:
        raise DatabaseCorrupt(f"{where}: files must be removed.npy, not {', '.join(manifest.files) or 'none'}")


def read_current(folder: Path) -> tuple[str, str]:
    """Return the name of the current generation and the SHA-256 of its manifest."""
    path = folder / "CURRENT"
    try:
        with open(path, "rb") as file:
            raw = file.read(4096)
    except FileNotFoundError:
        raise DatabaseError(
            f"{folder}: not a ragturbo database, or its first build did not finish (no CURRENT)"
        ) from None
    except OSError as error:
        raise DatabaseError(f"{path}: reading failed: {error.strerror}") from error
    match = _CURRENT.fullmatch(raw)
    if not match:
        raise DatabaseCorrupt(f"{path}: must be 'gen-NNNNNN <sha256>', not {raw[:100]!r}")
    return match[1].decode(), match[2].decode()


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


def segment_path(folder: Path, entry: SegmentEntry, kind: str) -> Path:
    return folder / "segments" / f"{entry.name}.{kind}"


def is_generation(name: str) -> bool:
    return GENERATION_NAME.fullmatch(name) is not None


def is_segment_file(name: str) -> bool:
    stem, _, kind = name.partition(".")
    return SEGMENT_NAME.fullmatch(stem) is not None and kind in (*SEGMENT_FILES, "json")
