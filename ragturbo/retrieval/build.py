"""Encode pairs into a database: decode in threads, encode in batches of one shape, write segment by segment.

Item i of the input has id `next_id + i` and is stored in segment i // segment_records, so the bytes depend neither on
interruptions of the build nor on the number of processes. A skipped item leaves its id unused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ragturbo.errors import DatabaseCorrupt, DatabaseError, DatabaseMismatch, InvalidRequest
from ragturbo.retrieval import durable, images, ranks, writer
from ragturbo.retrieval.encoder import PairEncoder, load_encoder
from ragturbo.retrieval.format import Geometry, encode_keys, encode_rows, generation_name
from ragturbo.retrieval.jobs import Finished, Job, SegmentWriter
from ragturbo.retrieval.manifest import Manifest, load, parse
from ragturbo.retrieval.pairs import Record
from ragturbo.retrieval.sources import Columns, Item, Source, check_caption, open_source

log = logging.getLogger("ragturbo")
# done, total or None, skipped
Progress = Callable[[int, "int | None", int], None]
# Images encoded at once, of builds and of single pairs: in another shape an image's feature has other bits.
BATCH_SIZE = 16
_REPORT = "build-report.json"
_MODEL_OPTIONS = ("device", "dtype", "vae", "local_files_only", "revision", "cache_dir")


@dataclass
class BuildReport:
    """`skipped` has one entry per item: its number in the input, its source and the reason."""

    path: str
    generation: int
    pairs: int
    skipped: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    encoded: int = 0
    """Pairs encoded in this run, not in an earlier one or by another process."""
    first_id: int = 0
    """Item i has id `first_id` + i."""

    @property
    def ids(self) -> list[int]:
        """Ids of the pairs that were stored."""
        skipped = {entry["item"] for entry in self.skipped}
        items = range(self.pairs + len(skipped))
        return [self.first_id + item for item in items if item not in skipped]

    @property
    def rate(self) -> float:
        return self.encoded / self.seconds if self.seconds else 0.0

    @classmethod
    def read(cls, folder: Path) -> BuildReport:
        with durable.naming(folder / _REPORT, "reading"):
            raw = (folder / _REPORT).read_bytes()
        try:
            body = json.loads(raw)
            first_id = body.get("first_id", 0)
            return cls(str(folder), body["generation"], body["pairs"], body["skipped"], first_id=first_id)
        except (ValueError, KeyError, TypeError) as error:
            raise DatabaseCorrupt(f"{folder / _REPORT}: not the report of a build: {error}") from error

    def save(self, folder: Path) -> None:
        """Write the report, without times: a resumed build must leave the same bytes as an uninterrupted one."""
        body = {
            "generation": self.generation, "pairs": self.pairs, "first_id": self.first_id, "skipped": self.skipped,
        }  # fmt: skip
        durable.write_file(folder / _REPORT, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
        durable.sync_folder(folder)


def build(
    pairs: Any, path: str | os.PathLike[str], *, model: Any = None, encoder: PairEncoder | None = None,
    key: str | None = None, feature_dtype: str = "float16", size: int | None = None, segment_records: int | None = None,
    index: bool = True, centred: bool = False, **options: Any,
) -> BuildReport:  # fmt: skip
    """Build a new database at `path`. A build of the same input that was killed is resumed.

    Args:
        pairs: folder, .jsonl/.csv/.parquet/.tar or iterable of (caption, image[, metadata]).
        model: bundle, or its name or folder.
        encoder: instead of a model.
        key: "pooled" or "clip"; None for the model's own.
        feature_dtype: "float16" or "int8".
        size: side of the images in pixels; None for the model's own.
        segment_records: pairs per segment; default about 1 GiB.
        index: build the ScaNN index afterwards.
        centred: search about the mean of the keys.
        options: see `append`; device, dtype, vae, local_files_only, revision and cache_dir load the model.
    """
    folder = Path(path).expanduser()
    encoder = _encoder(encoder, model, options, key=key, size=size)
    start = writer.empty_manifest(*_description(encoder, feature_dtype), segment_records)
    report = _run(pairs, folder, start, encoder, fresh=True, **options)
    if index and ranks.current().first and load(folder).index is None:
        from ragturbo.retrieval.reindex import reindex

        reindex(folder, centred=centred)
    return report


def append(
    pairs: Any, path: str | os.PathLike[str], *, model: Any = None, encoder: PairEncoder | None = None, **options: Any
) -> BuildReport:
    """Add `pairs` to a database with the encoder that built it.

    Args:
        pairs, model, encoder: see `build`.
        caption, image: columns of a table; `image` may be a pattern of columns.
        image_root: folder of image paths; default: that of the table.
        columns: the user's own columns to keep; None: all.
        thumbnails: keep a WebP of at most 128 pixels a side.
        batch_size: images encoded at once.
        workers: threads that decode images.
        strict: raise InvalidRequest at the first bad item instead of skipping it.
        resume: continue what a killed run left.
        on_progress: called with (done, total or None, skipped).
    """
    folder = Path(path).expanduser()
    base = load(folder)
    encoder = _encoder(encoder, model, options, key=base.key_kind, size=base.encoder.get("size"))
    check_encoder(folder, base, encoder)
    return _run(pairs, folder, base, encoder, fresh=False, **options)


def check_encoder(folder: Path, base: Manifest, encoder: PairEncoder) -> None:
    """Raise DatabaseMismatch unless the encoder is the one that built the database."""
    geometry, key_kind, description = _description(encoder, base.geometry.dtype)
    if (geometry, key_kind, description) != (base.geometry, base.key_kind, base.encoder):
        raise DatabaseMismatch(
            f"{folder} was built with {base.encoder}, {base.key_kind!r} keys and {base.geometry}; "
            f"this encoder has {description}, {key_kind!r} keys and {geometry}"
        )


def _encoder(given: PairEncoder | None, model: Any, options: dict[str, Any], **settings: Any) -> PairEncoder:
    """Return the given encoder or that of the model, and take the options for loading it out of `options`."""
    loading = {name: options.pop(name) for name in _MODEL_OPTIONS if name in options}
    if given is not None:
        return given
    if model is None:
        raise InvalidRequest("give model= (a bundle, a name or a folder) or encoder=")
    return load_encoder(model, **settings, **loading)


def _description(encoder: PairEncoder, dtype: str) -> tuple[Geometry, str, dict[str, Any]]:
    geometry = Geometry(encoder.height, encoder.width, encoder.channels, dtype, encoder.key_dim)
    return geometry, encoder.key_kind, {**encoder.fingerprints, "size": encoder.size}


def _run(
    pairs: Any, folder: Path, start: Manifest, encoder: PairEncoder, *, fresh: bool, caption: str = "caption",
    image: str = "image", image_root: str | os.PathLike[str] | None = None, columns: list[str] | None = None,
    thumbnails: bool = True, batch_size: int = BATCH_SIZE, workers: int | None = None, strict: bool = False,
    resume: bool = True, on_progress: Progress | None = None,
) -> BuildReport:  # fmt: skip
    if batch_size < 1:
        raise InvalidRequest(f"batch_size={batch_size} must be at least 1")
    began = time.monotonic()
    root = None if image_root is None else Path(image_root).expanduser()
    source = open_source(pairs, Columns(caption, image, root, columns))
    spec = {"source": source.description, "batch_size": batch_size, "thumbnails": thumbnails, "fresh": fresh}
    workers = min(16, max(2, os.cpu_count() or 2)) if workers is None else workers
    writer.prepare(folder)
    rank = ranks.current()
    with rank.lock(folder):
        if not fresh:
            # Another process may have committed since `append` read the manifest: its pairs would be lost.
            start = load(folder)
            check_encoder(folder, start, encoder)
        job = Job(folder, start, spec)
        work = _Build(job, source, encoder, thumbnails, batch_size, workers, strict, rank, on_progress)
        manifest = _committed(folder, job, start, spec)
        if manifest is not None:
            log.info("%s: this %s is already committed", folder, "build" if fresh else "append")
        else:
            others = job.unfinished_others()
            if others and resume and fresh:
                raise DatabaseError(
                    f"{folder}: segments {', '.join(others[:4])} belong to an unfinished build with another input or "
                    "other settings; finish that one, or discard it with resume=False"
                )
            job.clear(lambda number: rank.owns(number - start.next_segment), resume)
            manifest = work.commit(work.segments())
        if rank.first:
            writer.clean(folder, manifest)
            rank.clear(folder)
        report = BuildReport.read(folder)
        report.seconds, report.encoded = time.monotonic() - began, work.encoded
        return report


def _committed(folder: Path, job: Job, start: Manifest, spec: dict[str, Any]) -> Manifest | None:
    """Return the generation that an earlier run of this job committed before it was killed."""
    if not (folder / "CURRENT").exists():
        return None
    current = load(folder)
    path = folder / generation_name(current.generation - 1) / "manifest.json"
    try:
        before = parse(path.read_bytes(), str(path))
    except (OSError, DatabaseError):
        before = None
    if spec["fresh"]:
        indexed_since = current.index is not None and before is not None and before.job == job.name
        if current.job == job.name or indexed_since:
            return current
        raise DatabaseError(f"{folder} holds a database already; append to it, or build in another folder")
    # It is unknown whether two iterables have the same items.
    if before is None or spec["source"]["kind"] == "iterable":
        return None
    return current if current.job == Job(folder, before, spec).name else None


_Ready = tuple[int, Item, "Future[tuple[np.ndarray, str, bytes | None]] | None", "str | None"]


@dataclass
class _Build:
    """One run over the input by one process."""

    job: Job
    source: Source
    encoder: PairEncoder
    thumbnails: bool
    batch_size: int
    workers: int
    strict: bool
    rank: ranks.Rank
    progress: Progress | None
    seen: int = 0
    encoded: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def segments(self) -> list[Finished | None]:
        """Write the segments of this process. Those of other processes are None in the list."""
        base = self.job.base
        stream = enumerate(self.source.items())
        segments: list[Finished | None] = []
        with ThreadPoolExecutor(self.workers, thread_name_prefix="ragturbo-decode") as pool:
            while (first := next(stream, None)) is not None:
                position = len(segments)
                items = itertools.chain([first], itertools.islice(stream, base.segment_records - 1))
                done = None
                if not self.rank.owns(position):
                    self.seen += sum(1 for _ in items)
                elif (done := self.job.finished(base.next_segment + position)) is not None:
                    self._skip_finished(done, items)
                else:
                    fill = _Fill(self, pool, items)
                    done = self.job.write(base.next_segment + position, fill)
                segments.append(done)
        return segments

    def _skip_finished(self, done: Finished, items: Iterator[tuple[int, Item]]) -> None:
        """Read the items of a finished segment and check that they are the same as when it was written."""
        sha = hashlib.sha256()
        count = sum(1 for _ in _hashed(items, sha))
        if (count, sha.hexdigest()) != (done.notes["items"], done.notes["captions"]):
            raise DatabaseError(
                f"{self.job.folder}: the input differs from the one segment {done.entry.name} was built from; start "
                "over with resume=False"
            )
        self.seen += count
        self.skipped += done.notes["skipped"]
        self.report_progress()

    def report_progress(self) -> None:
        if self.progress is not None:
            self.progress(self.seen, self.source.total, len(self.skipped))

    def commit(self, segments: list[Finished | None]) -> Manifest:
        """Commit for all processes in the first one, or wait for its commit."""
        job, rank, start = self.job, self.rank, self.job.base
        if not rank.first:
            rank.announce(job.folder, job.name)
            return rank.wait_for_commit(job.folder, job.name)
        rank.wait_for_others(job.folder, job.name)
        done = []
        for number, part in enumerate(segments, start.next_segment):
            part = part or job.finished(number)
            if part is None:
                raise DatabaseCorrupt(f"{job.folder}: segment {number} of another process is missing")
            done.append(part)
        if not any(part.entry.count for part in done):
            raise InvalidRequest(f"none of {self.seen} items could be stored; the first: {self.skipped[:1]}")
        manifest = writer.joined(start, done, start.next_id + self.seen, job.name)
        # The report is written before the commit, so that a kill after the commit leaves nothing unfinished.
        skipped = [entry for part in done for entry in part.notes["skipped"]]
        report = BuildReport(
            str(job.folder), manifest.generation, manifest.rows - start.rows, skipped, first_id=start.next_id
        )
        report.save(job.folder)
        removed = writer.removed_ids(job.folder, start)
        return writer.commit(job.folder, manifest, removed, writer.index_folder(job.folder, start))


def _hashed(items: Iterator[tuple[int, Item]], sha: Any) -> Iterator[tuple[int, Item]]:
    """Pass items on and update `sha` with each caption, source and problem."""
    for index, item in items:
        text = repr((item.caption, item.source, item.problem)) if isinstance(item.caption, str) else "?"
        sha.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
        yield index, item


@dataclass
class _Fill:
    """Fills one segment with items; see `Job.write`."""

    work: _Build
    pool: ThreadPoolExecutor
    items: Iterator[tuple[int, Item]]
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, out: SegmentWriter) -> dict[str, Any]:
        work, sha, count = self.work, hashlib.sha256(), 0
        batch: list[tuple[Record, np.ndarray]] = []
        for index, item, future, problem in self._decoded(_hashed(self.items, sha)):
            count += 1
            work.seen += 1
            if future is not None:
                try:
                    pixels, digest, thumbnail = future.result()
                except InvalidRequest as error:
                    problem = str(error)
                else:
                    id = work.job.base.next_id + index
                    batch.append((Record(id, item.caption, item.source, digest, thumbnail, item.extra), pixels))
            if problem is not None:
                self._skip(index, item.source, problem)
            if len(batch) == work.batch_size:
                self._flush(out, batch)
        if batch:
            self._flush(out, batch)
        self.skipped.sort(key=lambda entry: entry["item"])
        work.skipped += self.skipped
        return {"items": count, "captions": sha.hexdigest(), "skipped": self.skipped}

    def _decoded(self, items: Iterator[tuple[int, Item]]) -> Iterator[_Ready]:
        """Yield items in order and decode a few batches ahead; not more, because images are large."""
        work = self.work
        ahead: deque[_Ready] = deque()
        for index, item in items:
            problem = item.problem or check_caption(item.caption)
            future = None
            if problem is None:
                future = self.pool.submit(images.prepare, item.image, work.encoder.size, work.thumbnails)
            ahead.append((index, item, future, problem))
            if len(ahead) >= work.batch_size + 2 * work.workers:
                yield ahead.popleft()
        yield from ahead

    def _skip(self, index: int, source: str | None, problem: str) -> None:
        if self.work.strict:
            raise InvalidRequest(f"item {index} ({source or 'no source'}): {problem}")
        self.skipped.append({"item": index, "source": source, "reason": problem[:500]})

    def _flush(self, out: SegmentWriter, batch: list[tuple[Record, np.ndarray]]) -> None:
        """Encode one batch of the fixed shape and write it, without pairs whose encoding cannot be stored."""
        work = self.work
        # A short batch is padded with its last pair: another shape would give other bits.
        padded = batch + [batch[-1]] * (work.batch_size - len(batch))
        keys, features = work.encoder.encode(np.stack([p for _, p in padded]), [r.caption for r, _ in padded])
        good = []
        for i, (record, _) in enumerate(batch):
            try:
                key = encode_keys(keys[i : i + 1], out.geometry.key_dim)
                good.append((record, key, encode_rows(features[i : i + 1], out.geometry)))
            except InvalidRequest as error:
                self._skip(record.id - work.job.base.next_id, record.source, str(error))
        if good:
            records, stored_keys, rows = zip(*good, strict=True)
            out.add_encoded(records, np.concatenate(stored_keys), np.concatenate(rows))
        work.encoded += len(good)
        batch.clear()
        work.report_progress()
