"""Records and segments byte by byte, up to the size of the paper's database."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragturbo.retrieval import Geometry, format
from ragturbo.retrieval.npy import read_ids


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31), st.floats(1e-6, 1e4),
)  # fmt: skip
def test_int8_errs_at_most_half_a_step_of_its_tokens_scale(height, width, channels, seed, size):
    geometry = Geometry(height, width, channels, "int8", 4)
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((3, geometry.tokens, channels)) * size).astype(np.float32)
    features[0, 0] = 0
    back = format.decode_rows(format.encode_rows(features, geometry), geometry)
    step = np.abs(features).max(axis=2, keepdims=True) / 127
    assert (np.abs(back - features) <= step * 0.5001 + 1e-30).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 70), st.sampled_from(["float16", "int8"]), st.integers(0, 12))
def test_the_geometry_is_what_the_writer_writes(side, channels, dtype, count):
    geometry = Geometry(side, side, channels, dtype, 3)
    assert geometry.stride >= geometry.record_bytes and geometry.stride % 128 == 0
    assert geometry.stride % 4096 == 0 or geometry.record_bytes < 4096
    footer, _ = format.pack_footer(np.arange(count), np.zeros(count, np.uint32), geometry, 0)
    assert geometry.offset(count) + len(footer) == geometry.segment_bytes(count)


BIG = """
import json, sys, resource
sys.path.insert(0, {here!r})
from ragturbo import Database
import numpy as np
import pytest
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
db = Database.open({folder!r})
row = db.rows([0, 30_000, len(db) - 1])
print(json.dumps([len(db), row.any(axis=1).tolist(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def test_a_sparse_database_of_103_gb_opens_and_reads_at_its_end_in_little_memory(plain, tmp_path, record_property):
    """The paper's size, 630,000 records of 160 KiB, with records written at 0, beyond 4 GiB and at the very end."""
    geometry = Geometry(8, 8, 1280, "float16", 64)
    count, per = 630_000, 126_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert soft in (-1, resource.RLIM_INFINITY) or soft > count * geometry.stride
    folder = tmp_path / "db"
    payload = np.random.default_rng(0).integers(0, 255, geometry.record_bytes, dtype=np.uint8).tobytes()
    sparse_database(folder, geometry, count, per, payload, written=(0, 30_000, count - 1))
    logical = sum(path.stat().st_size for path in folder.rglob("*.hseg"))
    assert logical > 103e9
    code = BIG.format(here=str(Path(__file__).parent), folder=str(folder))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows, there, kilobytes = json.loads(out.stdout)
    assert (rows, there) == (count, [True, True, True])
    assert kilobytes < 2e6
    record_property("kilobytes", kilobytes)


def sparse_database(folder: Path, geometry: Geometry, count: int, per: int, payload: bytes, written) -> None:
    """By hand, since writing 103 GB of zeros is what the test must not do; every checksum that is read is true."""
    from ragturbo.retrieval import jobs, pairs, writer
    from ragturbo.retrieval.durable import FileSum, sum_file
    from ragturbo.retrieval.manifest import SegmentEntry
    from ragturbo.retrieval.pairs import Record

    manifest = writer.empty_manifest(geometry, "pooled", {}, per)
    writer.prepare(folder)
    zero = zlib.crc32(bytes(geometry.record_bytes))
    key = np.zeros((per, geometry.key_dim), "<f2")
    key[:, 0] = 1
    entries = []
    for number in range(count // per):
        path = folder / "segments" / f"{number:06d}"
        ids = np.arange(number * per, (number + 1) * per)
        crcs = np.full(per, zero, np.uint32)
        header = format.pack_header(geometry, number, manifest.encoder_digest)
        with open(f"{path}.hseg", "wb") as file:
            file.write(header)
            for id in written:
                if ids[0] <= id <= ids[-1]:
                    file.seek(geometry.offset(int(id - ids[0])))
                    file.write(payload)
                    crcs[id - ids[0]] = zlib.crc32(payload)
            footer, trailer_crc = format.pack_footer(ids, crcs, geometry, int.from_bytes(header[-4:], "little"))
            file.seek(geometry.offset(per))
            file.write(footer)
        Path(f"{path}.keys").write_bytes(key.tobytes())
        Path(f"{path}.parquet").write_bytes(pairs.encode([Record(int(i), "") for i in ids]))
        sums = {kind: sum_file(Path(f"{path}.{kind}")) for kind in ("keys", "parquet")}
        sums["hseg"] = FileSum(geometry.segment_bytes(per), "0" * 64, 0)
        entries.append(SegmentEntry(number, per, int(ids[0]), int(ids[-1]), trailer_crc, sums))
    done = [jobs.Finished(entry, np.zeros(geometry.key_dim)) for entry in entries]
    writer.commit(folder, writer.joined(manifest, done, count), np.empty(0, np.int64))


@pytest.mark.parametrize("count", [0, 1, 7, 5000])
def test_ids_that_numpy_wrote_are_read(count):
    ids, file = np.arange(count, dtype="<i8") * 3, io.BytesIO()
    np.save(file, ids)
    read = read_ids(file.getvalue())
    assert read.dtype == np.int64 and np.array_equal(read, ids)
    for spoiled in (file.getvalue()[:-1], file.getvalue() + b"x", file.getvalue()[1:], b""):
        with pytest.raises(ValueError):
            read_ids(spoiled)


@pytest.mark.parametrize(
    "other", [np.zeros(3, "<f8"), np.zeros((3, 1), "<i8"), np.zeros((), "<i8"), np.zeros(3, ">i8")]
)
def test_arrays_that_are_no_row_of_ids_are_refused(other):
    file = io.BytesIO()
    np.save(file, other)
    with pytest.raises(ValueError, match="header"):
        read_ids(file.getvalue())
