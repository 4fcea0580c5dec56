"""The text side of a segment: a parquet file of id, caption, source, sha256, thumbnail and the user's own columns."""

from __future__ import annotations

import io
import json
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ragturbo.errors import DatabaseCorrupt
from ragturbo.retrieval import durable
from ragturbo.retrieval.durable import FileSum
from ragturbo.retrieval.postings import Postings

if TYPE_CHECKING:
    from PIL.Image import Image

_SCHEMA = {"id": pa.int64(), "caption": pa.string(), "source": pa.string(), "sha256": pa.string(),
           "thumbnail": pa.binary()}  # fmt: skip
# Names that a user's own column cannot have. `source` is taken from the user's.
OWN_COLUMNS = frozenset(_SCHEMA) - {"source"}
# Small row groups: reading one thumbnail reads only its group.
_ROW_GROUP = 256
_SMALL = 1 << 20
_TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), bytes: pa.binary(), str: pa.string()}


@dataclass(frozen=True)
class Record:
    """One pair: caption, source, SHA-256 of the image, thumbnail as WebP, and the user's own columns in `extra`."""

    id: int
    caption: str
    source: str | None = None
    sha256: str | None = None
    thumbnail: bytes | None = field(default=None, repr=False)
    extra: dict[str, Any] = field(default_factory=dict)

    def image(self) -> Image | None:
        """The thumbnail as a PIL image; None if it was not stored or not read."""
        if self.thumbnail is None:
            return None
        from PIL import Image

        return Image.open(io.BytesIO(self.thumbnail)).convert("RGB")


def column(values: list[Any]) -> pa.Array:
    """Values of one plain type as they are, mixed or nested ones as JSON."""
    kinds = {type(v) for v in values if v is not None}
    fits = all(not isinstance(value, int) or -(2**63) <= value < 2**63 for value in values)
    if len(kinds) <= 1 and kinds <= set(_TYPES) and fits:
        return pa.array(values, _TYPES[next(iter(kinds), str)])
    return pa.array([None if v is None else json.dumps(v, default=str, sort_keys=True) for v in values], pa.string())


def encode(records: Sequence[Record]) -> bytes:
    """Return the parquet file of these records. The same records give the same bytes."""
    names = sorted({name for record in records for name in record.extra} - set(_SCHEMA))
    columns = {name: pa.array([getattr(r, name) for r in records], kind) for name, kind in _SCHEMA.items()}
    columns |= {name: column([r.extra.get(name) for r in records]) for name in names}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd", row_group_size=_ROW_GROUP, use_dictionary=["source"],
                   write_page_checksum=True)  # fmt: skip
    return sink.getvalue().to_pybytes()


class PairsFile:
    """The open parquet file of a segment.

    Text columns are read at first use and stay in memory (about 100 bytes a pair). Thumbnails are read by row group.
    """

    def __init__(self, path: Path, total: FileSum, ids: Any) -> None:
        self.path = path
        self._total = total
        self._ids = ids
        self._lock = threading.Lock()
        self._text: pa.Table | None = None
        self._postings: Postings | None = None
        self._whole: bytes | None = None
        with durable.naming(path, "opening"):
            # Kept open: a compaction may delete the file while this generation is in use.
            self._file: io.FileIO = open(path, "rb", buffering=0)
        size = self._file.seek(0, io.SEEK_END)
        if size != total.bytes:
            raise DatabaseCorrupt(f"{path}: {size} bytes, the manifest says {total.bytes}")

    def _bytes(self) -> bytes:
        with durable.naming(self.path, "reading"):
            self._file.seek(0)
            raw = self._file.read()
        crc = zlib.crc32(raw)
        if len(raw) != self._total.bytes or crc != self._total.crc32:
            raise DatabaseCorrupt(f"{self.path}: CRC-32 {crc:08x} over {len(raw)} bytes, the manifest says "
                                  f"{self._total.crc32:08x} over {self._total.bytes}")  # fmt: skip
        return raw

    def _read(self) -> pa.Table:
        raw = self._bytes()
        try:
            parquet = pq.ParquetFile(pa.BufferReader(raw))
            names = [name for name in parquet.schema_arrow.names if name != "thumbnail"]
            table = parquet.read(columns=names, use_threads=False)
            table.validate(full=True)
            ids = table.column("id").to_numpy()
            table.column("caption"), table.column("source"), table.column("sha256")
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DatabaseCorrupt(f"{self.path}: not the pairs of a segment: {error}") from error
        if len(ids) != len(self._ids) or (ids != self._ids).any():
            raise DatabaseCorrupt(f"{self.path}: its ids are not those of the segment's footer")
        return table

    def text(self) -> pa.Table:
        """Return all columns but the thumbnails, in row order."""
        with self._lock:
            if self._text is None:
                self._text = self._read()
            return self._text

    def postings(self) -> Postings:
        """Return the index of the captions' words, made at first use."""
        captions = self.text().column("caption")
        with self._lock:
            if self._postings is None:
                self._postings = Postings(captions.to_pylist())
            return self._postings

    def _source(self) -> Any:
        """A small file is read whole, checked and kept; of a large one, pages are read and checked one by one."""
        if self._total.bytes > _SMALL:
            return pa.PythonFile(self._file, mode="r")
        if self._whole is None:
            self._whole = self._bytes()
        return pa.BufferReader(self._whole)

    def _thumbnails(self, group: int) -> pa.ChunkedArray:
        """Read the thumbnails of the rows from group · 256 on."""
        start = group * _ROW_GROUP
        with self._lock:
            try:
                parquet = pq.ParquetFile(self._source(), page_checksum_verification=True)
                table = parquet.read_row_group(group, columns=["id", "thumbnail"], use_threads=False)
                found, thumbnails = table.column("id").to_numpy(), table.column("thumbnail")
            except (pa.ArrowException, OSError, KeyError, IndexError, ValueError) as error:
                raise DatabaseCorrupt(f"{self.path}: row {start}: {error}") from error
        expected = self._ids[start : start + _ROW_GROUP]
        if len(found) != len(expected) or (found != expected).any():
            raise DatabaseCorrupt(f"{self.path}: from row {start} on, its ids are not those of the segment's footer")
        return thumbnails

    def record(self, row: int, thumbnail: bool) -> Record:
        image = self._thumbnails(row // _ROW_GROUP)[row % _ROW_GROUP].as_py() if thumbnail else None
        return _record(self.text(), row, image)

    def records(self, rows: Sequence[int], thumbnails: bool) -> Iterator[Record]:
        """Yield the records of ascending rows. Each group of thumbnails is read once."""
        table, held, images = self.text(), -1, None
        for row in rows:
            if thumbnails and row // _ROW_GROUP != held:
                held = row // _ROW_GROUP
                images = self._thumbnails(held)
            yield _record(table, row, None if images is None else images[row % _ROW_GROUP].as_py())

    def check(self) -> None:
        """Read and check the whole file, for a full verification."""
        self._read()


def _record(table: pa.Table, row: int, thumbnail: bytes | None) -> Record:
    values: dict[str, Any] = {name: table.column(name)[row].as_py() for name in table.column_names}
    id, caption, source, sha256 = (values.pop(name) for name in ("id", "caption", "source", "sha256"))
    return Record(id, caption, source, sha256, thumbnail, values)
