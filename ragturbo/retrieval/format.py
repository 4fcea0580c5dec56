"""Byte layout of a segment: header, fixed-size records, footer. docs/databases.md describes every field.

A segment is written once and never changed. Its manifest entry holds the CRC-32 of the trailer, the trailer those of
the header and both tables, and one table a CRC-32 per record, so every byte that reaches a caller is covered.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from ragturbo.errors import DatabaseCorrupt, InvalidRequest

FORMAT_VERSION = 1
HEADER_BYTES = 4096
TRAILER_BYTES = 64
HEADER_MAGIC = b"RTHSEG\x00\x01"
TRAILER_MAGIC = b"RTHSEG\x00\xff"
DTYPES = {"float16": 1, "int8": 2}

# magic, version, segment, H, W, C, dtype, record bytes, stride, key width, sha256 of the encoder
_HEADER = struct.Struct("<8sIIIIIIQQI32s")
# magic, records, offset of the id table, crc of ids, crc of the crc table, crc of the header
_TRAILER = struct.Struct("<8sQQIII")
_CRC = struct.Struct("<I")

GENERATION_NAME = re.compile(r"gen-(\d{6,})")


def generation_name(number: int) -> str:
    return f"gen-{number:06d}"


def segment_name(number: int) -> str:
    return f"{number:06d}"


def aligned(size: int) -> int:
    """Round a record up to its stride: 4 KiB pages from 4 KiB on, 128-byte lines below."""
    unit = 4096 if size >= 4096 else 128
    return -(-size // unit) * unit


@dataclass(frozen=True)
class Geometry:
    """Shape of one record: an H-space feature (T = H·W, C) stored as `dtype`, and a key of `key_dim` values."""

    height: int
    width: int
    channels: int
    dtype: str
    key_dim: int

    def __post_init__(self) -> None:
        for name in ("height", "width", "channels", "key_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise InvalidRequest(f"{name} must be a positive whole number, not {value!r}")
        if self.dtype not in DTYPES:
            raise InvalidRequest(f"feature dtype {self.dtype!r} is not known; use one of {', '.join(DTYPES)}")

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def record_bytes(self) -> int:
        """Size of a record. An int8 record has T fp32 scales after its T·C values."""
        values = self.tokens * self.channels
        return values * 2 if self.dtype == "float16" else values + 4 * self.tokens

    @property
    def stride(self) -> int:
        return aligned(self.record_bytes)

    def describe(self) -> str:
        """Say the shapes in words, for messages."""
        features = f"{self.height} × {self.width} × {self.channels} features in {self.dtype}"
        return f"{features} with keys of {self.key_dim} values"

    def segment_bytes(self, count: int) -> int:
        return HEADER_BYTES + count * (self.stride + 12) + TRAILER_BYTES

    def offset(self, index: int) -> int:
        return HEADER_BYTES + index * self.stride


def _sealed(body: bytes, size: int) -> bytes:
    """Pad `body` with zeros to `size` bytes that end with the CRC-32 of the others."""
    body = body.ljust(size - 4, b"\0")
    return body + _CRC.pack(zlib.crc32(body))


def pack_header(geometry: Geometry, number: int, encoder_digest: bytes) -> bytes:
    body = _HEADER.pack(
        HEADER_MAGIC, FORMAT_VERSION, number, geometry.height, geometry.width, geometry.channels,
        DTYPES[geometry.dtype], geometry.record_bytes, geometry.stride, geometry.key_dim, encoder_digest,
    )  # fmt: skip
    return _sealed(body, HEADER_BYTES)


def check_header(data: bytes, where: str, geometry: Geometry, number: int, encoder_digest: bytes) -> int:
    """Raise DatabaseCorrupt unless this is the header of segment `number`. Returns its CRC-32."""
    if len(data) != HEADER_BYTES:
        raise DatabaseCorrupt(f"{where}: the header is cut short at {len(data)} of {HEADER_BYTES} bytes")
    if data != pack_header(geometry, number, encoder_digest):
        what = "damaged" if zlib.crc32(data[:-4]) != _CRC.unpack(data[-4:])[0] else "that of another database"
        raise DatabaseCorrupt(f"{where}: the header is {what}: it is not the one of segment {number} of the manifest")
    return int(_CRC.unpack(data[-4:])[0])


def pack_footer(ids: np.ndarray, crcs: np.ndarray, geometry: Geometry, header_crc: int) -> tuple[bytes, int]:
    """ids (n,) int64 ascending, crcs (n,) uint32 -> the footer and the CRC-32 of its trailer."""
    id_bytes = np.ascontiguousarray(ids, "<i8").tobytes()
    crc_bytes = np.ascontiguousarray(crcs, "<u4").tobytes()
    end, sums = geometry.offset(len(ids)), (zlib.crc32(id_bytes), zlib.crc32(crc_bytes))
    trailer = _sealed(_TRAILER.pack(TRAILER_MAGIC, len(ids), end, *sums, header_crc), TRAILER_BYTES)
    return id_bytes + crc_bytes + trailer, _CRC.unpack(trailer[-4:])[0]


def check_footer(
    data: bytes, where: str, geometry: Geometry, count: int, header_crc: int, trailer_crc: int
) -> tuple[np.ndarray, np.ndarray]:
    """Check a footer of `count` records. Returns its tables: ids (n,) int64 and CRC-32s (n,) uint32."""
    if len(data) != 12 * count + TRAILER_BYTES:
        raise DatabaseCorrupt(f"{where}: the footer is cut short at {len(data)} of {12 * count + TRAILER_BYTES} bytes")
    ids, crcs = np.frombuffer(data, "<i8", count), np.frombuffer(data, "<u4", count, 8 * count)
    expected, crc = pack_footer(ids, crcs, geometry, header_crc)
    if data != expected:
        raise DatabaseCorrupt(f"{where}: the footer is damaged: its CRC-32s do not match its tables and header")
    if crc != trailer_crc:
        raise DatabaseCorrupt(f"{where}: the trailer's CRC-32 is {crc:08x}, the manifest says {trailer_crc:08x}")
    if count and (ids[0] < 0 or np.any(np.diff(ids) <= 0)):
        raise DatabaseCorrupt(f"{where}: ids are not ascending")
    return ids, crcs


def encode_rows(features: np.ndarray, geometry: Geometry) -> np.ndarray:
    """features (n, T, C) float -> records (n, stride) uint8, padded with zeros. Values must be finite in the dtype."""
    expected = (geometry.tokens, geometry.channels)
    if features.ndim != 3 or features.shape[1:] != expected:
        raise InvalidRequest(f"features must be (n, {expected[0]}, {expected[1]}), not {features.shape}")
    if features.dtype.kind != "f":
        raise InvalidRequest(f"features must be floating point, not {features.dtype}")
    with np.errstate(over="ignore"):
        values = features.astype("<f2" if geometry.dtype == "float16" else np.float32)
    finite = np.isfinite(values).all(axis=(1, 2))
    if not finite.all():
        raise InvalidRequest(
            f"feature {int(np.flatnonzero(~finite)[0])} of {len(features)} is not finite as {geometry.dtype}"
        )
    rows = np.zeros((len(features), geometry.stride), np.uint8)
    if geometry.dtype == "float16":
        rows[:, : geometry.record_bytes] = values.reshape(len(values), -1).view(np.uint8)
        return rows
    # Symmetric, one scale per token: the largest magnitude becomes 127. A token of zeros has scale 0.
    scales = (np.abs(values).max(axis=2) / np.float32(127)).astype("<f4")
    safe = np.where(scales > 0, scales, np.float32(1))
    quantised = np.clip(np.rint(values / safe[:, :, None]), -127, 127).astype(np.int8)
    split = geometry.tokens * geometry.channels
    rows[:, :split] = quantised.reshape(len(values), -1).view(np.uint8)
    rows[:, split : geometry.record_bytes] = scales.reshape(len(values), -1).view(np.uint8)
    return rows


def decode_rows(rows: np.ndarray, geometry: Geometry) -> np.ndarray:
    """(n, ≥ record bytes) uint8 -> (n, T, C): float16 as stored, or int8 times its scale as float32."""
    n, tokens, channels = len(rows), geometry.tokens, geometry.channels
    if geometry.dtype == "float16":
        return np.ascontiguousarray(rows[:, : geometry.record_bytes]).view("<f2").reshape(n, tokens, channels)
    split = tokens * channels
    values = np.ascontiguousarray(rows[:, :split]).view(np.int8).reshape(n, tokens, channels)
    scales = np.ascontiguousarray(rows[:, split : geometry.record_bytes]).view("<f4").reshape(n, tokens, 1)
    return values * scales


def encode_keys(keys: np.ndarray, key_dim: int) -> np.ndarray:
    """keys (n, K) float -> (n, K) float16, L2-normalised. Keys must be finite and not zero."""
    if keys.ndim != 2 or keys.shape[1] != key_dim or keys.dtype.kind != "f":
        raise InvalidRequest(f"keys must be (n, {key_dim}) floats, not {keys.shape} of {keys.dtype}")
    full = keys.astype(np.float32)
    norms = np.linalg.norm(full, axis=1)
    bad = ~(np.isfinite(norms) & (norms > 0))
    if bad.any():
        raise InvalidRequest(f"key {int(np.flatnonzero(bad)[0])} of {len(keys)} has norm {norms[bad][0]}")
    return (full / norms[:, None]).astype("<f2")
