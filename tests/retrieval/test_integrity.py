"""Damage of every kind is a typed error or has no effect: never a wrong row, never another exception."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragturbo import Database
from ragturbo.errors import DatabaseCorrupt, DatabaseError, InvalidRequest
from ragturbo.retrieval import Geometry, format, store
from ragturbo.retrieval.manifest import load, parse

GEOMETRY = Geometry(1, 2, 24, "int8", 4)
N = 10


@pytest.fixture(scope="module")
def original(plain, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("integrity") / "db"
    Database.write(folder, [plain.encoded(N, 5, GEOMETRY)], geometry=GEOMETRY, segment_records=6).remove([2])
    return folder


def view(folder: Path) -> tuple:
    """Everything a reader can be given, at quick verification."""
    database = Database.open(folder)
    ids = database.ids
    records = tuple((r.id, r.caption, r.source, r.extra["rank"]) for r in database.records(ids))
    found, scores = database.search(database.keys(ids).numpy(), k=2)
    return ids.tobytes(), database.rows(ids).tobytes(), records, found.tobytes(), scores.tobytes()


def outcome(folder: Path, expected: tuple) -> str:
    """ "error" or "same"; anything else fails the test."""
    try:
        seen = view(folder)
    except DatabaseError as error:
        assert str(folder) in str(error)
        return "error"
    assert seen == expected
    return "same"


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def test_every_bit_of_current_and_manifest_counts(original, tmp_path, long_count, rng, record_property):
    folder = shutil.copytree(original, tmp_path / "db")
    expected = view(folder)
    flips = 0
    for path in (folder / "CURRENT", folder / load(folder).generation_folder / "manifest.json"):
        bits = 8 * path.stat().st_size
        for bit in sorted(rng.choice(bits, long_count(bits), replace=False).tolist()):
            flip(path, bit)
            # Every flipped bit must be detected, whichever field it is in.
            with pytest.raises(DatabaseError, match=str(folder)):
                Database.open(folder)
            flip(path, bit)
            flips += 1
    assert view(folder) == expected
    record_property("flips", flips)


def test_every_bit_of_a_header_and_of_a_footer_counts(original, tmp_path, long_count, rng, record_property):
    folder = shutil.copytree(original, tmp_path / "db")
    path = folder / "segments" / "000000.hseg"
    tail = GEOMETRY.offset(6)
    bits = [*range(8 * format.HEADER_BYTES), *range(8 * tail, 8 * path.stat().st_size)]
    chosen = sorted(rng.choice(bits, long_count(len(bits)), replace=False).tolist())
    manifest = load(folder)
    from ragturbo.retrieval.segments import read_tables

    for bit in chosen:
        flip(path, bit)
        with pytest.raises(DatabaseError, match="000000.hseg"):
            read_tables(folder, manifest, manifest.segments[0])
        flip(path, bit)
    flip(path, chosen[0])
    with pytest.raises(DatabaseError, match="000000.hseg"):
        Database.open(folder)
    record_property("flips", len(chosen))


def test_random_flips_anywhere_are_an_error_or_an_exact_read(original, tmp_path, long_count, rng, record_property):
    folder = shutil.copytree(original, tmp_path / "db")
    expected = view(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "LOCK")
    sizes = np.array([path.stat().st_size for path in files])
    seen = {"error": 0, "same": 0}
    for _ in range(long_count(2000)):
        path = files[rng.choice(len(files), p=sizes / sizes.sum())]
        bit = int(rng.integers(8 * path.stat().st_size))
        flip(path, bit)
        seen[outcome(folder, expected)] += 1
        flip(path, bit)
    assert view(folder) == expected
    assert seen["error"] > 0
    record_property("outcomes", seen)


def test_full_verification_finds_every_flip(original, tmp_path, long_count, rng):
    """Also those in padding, which no read ever sees."""
    folder = shutil.copytree(original, tmp_path / "db")
    generation = load(folder).generation_folder
    files = [p for p in sorted(folder.rglob("*")) if p.parent.name == "segments" or p.parent.name == generation]
    for _ in range(long_count(300)):
        path = files[rng.integers(len(files))]
        bit = int(rng.integers(8 * path.stat().st_size))
        flip(path, bit)
        with pytest.raises(DatabaseError, match=path.name):
            Database.open(folder, verify="full")
        flip(path, bit)
    Database.open(folder, verify="full")


def test_truncated_grown_missing_and_swapped_files_are_named(original, tmp_path, rng):
    expected = view(original)
    files = [p.relative_to(original) for p in sorted(original.rglob("*")) if p.is_file() and p.name != "LOCK"]
    current = load(original).generation_folder
    for number, name in enumerate(files):
        used = name.parts[0] in ("CURRENT", "segments", current)
        for how in ("cut", "empty", "grown", "missing"):
            folder = shutil.copytree(original, tmp_path / f"{number}{how}")
            path = folder / name
            if how == "missing":
                path.unlink()
            elif how == "grown":
                path.write_bytes(path.read_bytes() + b"\0")
            else:
                data = path.read_bytes()
                path.write_bytes(data[: int(rng.integers(len(data)))] if how == "cut" else b"")
            assert outcome(folder, expected) == ("error" if used else "same"), (name, how)
            shutil.rmtree(folder)
    for kind in ("hseg", "keys", "parquet"):
        folder = shutil.copytree(original, tmp_path / f"swap-{kind}")
        a, b = (folder / "segments" / f"00000{i}.{kind}" for i in (0, 1))
        first = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(first)
        assert outcome(folder, expected) == "error"


def test_two_records_swapped_in_a_segment_are_noticed(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "db")
    path = folder / "segments" / "000000.hseg"
    data = bytearray(path.read_bytes())
    a, b, stride = GEOMETRY.offset(0), GEOMETRY.offset(1), GEOMETRY.stride
    data[a : a + stride], data[b : b + stride] = data[b : b + stride], data[a : a + stride]
    path.write_bytes(data)
    with pytest.raises(DatabaseCorrupt, match=r"000000.hseg: record 0 \(id 0\): wrong checksum"):
        Database.open(folder).rows([0])
    with pytest.raises(DatabaseCorrupt, match=r"record 0 \(id 0\).*record 1 \(id 1\)"):
        Database.open(folder).verify()


def test_a_segment_of_another_database_is_refused(original, plain, tmp_path):
    """The same shape, the same number, valid checksums: only the manifest knows that it does not belong."""
    folder = shutil.copytree(original, tmp_path / "db")
    Database.write(tmp_path / "other", [plain.encoded(N, 6, GEOMETRY)], geometry=GEOMETRY, segment_records=6)
    shutil.copy(tmp_path / "other/segments/000000.hseg", folder / "segments/000000.hseg")
    with pytest.raises(DatabaseCorrupt, match="trailer's CRC-32"):
        Database.open(folder)


def rewritten(folder: Path, change) -> None:
    """A manifest with a valid SHA-256 and hostile content: what a malicious database looks like."""
    path = folder / load(folder).generation_folder / "manifest.json"
    document = json.loads(path.read_bytes())
    change(document)
    raw = json.dumps(document).encode()
    path.write_bytes(raw)
    (folder / "CURRENT").write_text(f"{path.parent.name} {hashlib.sha256(raw).hexdigest()}\n")


def leaves(document, path=()):
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)) and value:
            yield from leaves(value, (*path, key))


@pytest.mark.parametrize("poison", [None, -1, 2**70, "../../etc/passwd", [], {}, True, 1.5, float("nan")])
def test_hostile_manifests_are_refused_field_by_field(poison, original, tmp_path):
    expected = view(original)
    folder = shutil.copytree(original, tmp_path / "db")
    good = (folder / load(folder).generation_folder / "manifest.json").read_bytes()
    for path in leaves(json.loads(good)):
        if path[-1] == "centred" and poison is True:
            # A setting like any other: whoever may write the database may choose it.
            continue

        def change(document, path=path):
            for key in path[:-1]:
                document = document[key]
            document[path[-1]] = poison

        (folder / "gen-000002" / "manifest.json").write_bytes(good)
        (folder / "CURRENT").write_text(f"gen-000002 {hashlib.sha256(good).hexdigest()}\n")
        rewritten(folder, change)
        try:
            seen = view(folder)
        except DatabaseError:
            continue
        assert seen == expected, path


def test_a_newer_version_is_refused_by_name(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "db")
    rewritten(folder, lambda document: document.update(version=2))
    with pytest.raises(DatabaseError, match="version 2; this ragturbo reads version 1: upgrade"):
        Database.open(folder)


def test_a_manifest_cannot_name_a_file_outside_the_database(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "db")
    total = {"bytes": 1, "sha256": "0" * 64, "crc32": 0}
    hostile = {"kind": "scann", "rows": N, "config": {}, "files": {"../../secret": total}}
    rewritten(folder, lambda document: document.update(index=hostile))
    with pytest.raises(DatabaseCorrupt, match=r"'\.\./\.\./secret' is not a plain file name"):
        Database.open(folder)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes_as_a_manifest_are_refused(raw):
    with pytest.raises(DatabaseError):
        parse(raw, "manifest.json")


def test_nothing_is_ever_unpickled(original, tmp_path):
    """Pickles in every place a file may lie, and an audit hook that would see one being read."""
    folder = shutil.copytree(original, tmp_path / "db")
    removed = folder / load(folder).generation_folder / "removed.npy"
    bomb = pickle.dumps(os.getcwd)
    np.save(tmp_path / "object.npy", np.array([os.getcwd], dtype=object), allow_pickle=True)
    for data in (bomb, (tmp_path / "object.npy").read_bytes()):
        removed.write_bytes(data)
        total = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "crc32": zlib.crc32(data)}
        rewritten(folder, lambda document, total=total: document["files"].update({"removed.npy": total}))
        with pytest.raises(DatabaseCorrupt, match="not an array of ids|ascending"):
            Database.open(folder)
    code = (
        "import sys\n"
        "def hook(event, args):\n"
        "    if event.startswith('pickle.'): raise SystemExit(f'unpickled {args}')\n"
        "sys.addaudithook(hook)\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "import plain\n"
        f"folder = Path({str(tmp_path / 'audited')!r})\n"
        "for what in ('build', 'append', 'remove', 'compact'): plain.change(what, folder, 3)\n"
        "from ragturbo import Database\n"
        "db = Database.open(folder, verify='full')\n"
        "db.search(db.keys(db.ids[:2]), 2); db.search(['picture'], 1, retriever='bm25'); db.records(db.ids)\n"
        "print('ok')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "ok\n"


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint8", "object", "complex64"])
def test_wrong_dtypes_and_shapes_are_refused_before_anything_is_written(dtype, plain, tmp_path):
    records, keys, features = plain.encoded(3, 1, GEOMETRY)
    for bad_keys, bad_features in [(keys.astype(dtype), features), (keys, features.astype(dtype))]:
        if dtype == "float64":
            Database.write(tmp_path / "fine", [(records, bad_keys, bad_features)], geometry=GEOMETRY)
            continue
        with pytest.raises(InvalidRequest, match="must be"):
            Database.write(tmp_path / "db", [(records, bad_keys, bad_features)], geometry=GEOMETRY)
    for bad in (features[:2], features[:, :1], np.full_like(features, np.nan), np.full_like(features, np.inf)):
        with pytest.raises(InvalidRequest):
            Database.write(tmp_path / "db", [(records, keys, bad)], geometry=GEOMETRY)
    for bad in (keys[:, :2], keys * 0, keys * np.nan):
        with pytest.raises(InvalidRequest):
            Database.write(tmp_path / "db", [(records, bad, features)], geometry=GEOMETRY)
    with pytest.raises(DatabaseError, match="not a ragturbo database"):
        Database.open(tmp_path / "db")


def test_moving_or_copying_the_folder_changes_nothing(original, plain, tmp_path):
    expected = view(original)
    moved = shutil.copytree(original, tmp_path / "elsewhere" / "renamed")
    assert view(moved) == expected
    plain.append_encoded(Database.open(moved), [])
    assert view(moved) == expected


@pytest.mark.skipif(store._native is None, reason="ragturbo._native is not built")
def test_the_native_and_the_python_store_agree(original, rng):
    manifest = load(original)
    paths = [str(original / "segments" / f"{entry.name}.hseg") for entry in manifest.segments]
    options = dict(header_bytes=4096, record_bytes=GEOMETRY.stride, payload_bytes=GEOMETRY.record_bytes,
                   counts=[entry.count for entry in manifest.segments])  # fmt: skip
    stores = [store.PreadStore(paths, **options), store._native.Store(paths, **options)]
    rows = np.array([9, 5, 0, 6])
    places = np.array([7, 0, 3, 1])
    crcs = np.array([1, 2, 3, 4], np.uint32)
    results = []
    for one in stores:
        out = np.zeros((8, 128), np.uint8)
        failures = one.read_into(rows, out, slots=places, slot_bytes=128, expected_crc=crcs)
        good = one.read_into(rows, out, slots=places, slot_bytes=128)
        assert good == []
        results.append((out.tobytes(), [(i, kind) for i, kind, _ in failures]))
        for bad in (np.array([0, 1, 2, 10]), np.array([0, 1, 2, -1])):
            with pytest.raises(IndexError):
                one.read_into(bad, out, slots=places, slot_bytes=128)
            with pytest.raises(IndexError):
                one.read_into(rows, out, slots=bad, slot_bytes=128)
        with pytest.raises(ValueError):
            one.read_into(rows, out, slots=np.array([1, 1, 2, 3]), slot_bytes=128)
    assert results[0] == results[1]
