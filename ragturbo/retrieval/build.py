"""Encoding pairs into a database: decoded in threads, encoded in batches of one shape, written segment by segment.

Item i of the input has id `next_id + i`, and lies in segment i // segment_records: so the bytes do not depend on how
often the build was killed, nor on how many processes shared it. A skipped item leaves its id unused.
"""

from __future__ import annotations

import hashlib
import itertools
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
from ragturbo.retrieval import images, ranks, writer
from ragturbo.retrieval.build_report import BuildReport
from ragturbo.retrieval.encoder import PairEncoder, load_encoder
from ragturbo.retrieval.format import Geometry, encode_keys, encode_rows, generation_name
from ragturbo.retrieval.jobs import Finished, Job, SegmentWriter
from ragturbo.retrieval.manifest import Manifest, load, parse
from ragturbo.retrieval.pairs import Record
from ragturbo.retrieval.sources import Columns, Item, Source, check_caption, open_source

log = logging.getLogger("ragturbo")
# done, total or None, skipped
Progress = Callable[[int, "int | None", int], None]


@dataclass
class _Work:
    """One run over the input by one process."""

    job: Job
    source: Source
    encoder: PairEncoder
    thumbnails: bool
    batch_size: int
    workers: int
    strict: bool
    rank: ranks.Rank
    progress: Progress | None = None
    seen: int = 0
    encoded: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)


def build(
    pairs: Any, path: str | os.PathLike[str], *, model: Any = None, encoder: PairEncoder | None = None,
    key: str | None = None, feature_dtype: str = "float16", size: int | None = None, segment_records: int | None = None,
    index: bool = True, centred: bool = False, **options: Any,
) -> BuildReport:  # fmt: skip
    """A new database of `pairs` at `path`. A build of the same input that was killed is resumed.

    pairs: folder, .jsonl/.csv/.parquet/.tar or iterable of (caption, image[, metadata]). model: bundle, name or folder.
    key: "pooled" or "clip". feature_dtype: "float16" or "int8". size: side in pixels, None for the model's own. index:
    whether to build the ScaNN index afterwards. Other options: those of `append`.
    """
    folder = Path(path).expanduser()
    encoder = encoder or load_encoder(_needed(model), key=key, size=size, **_model_options(options))
    geometry = Geometry(encoder.height, encoder.width, encoder.channels, feature_dtype, encoder.key_dim)
    description = {**encoder.fingerprints, "size": encoder.size}
    start = writer.empty_manifest(geometry, encoder.key_kind, description, segment_records)
    report = _run(pairs, folder, start, encoder, fresh=True, **options)
    if index and ranks.current().first and load(folder).index is None:
        from ragturbo.retrieval.reindex import reindex

        reindex(folder, centred=centred)
    return report


def append(
    pairs: Any, path: str | os.PathLike[str], *, model: Any = None, encoder: PairEncoder | None = None, **options: Any
) -> BuildReport:
    """Adds `pairs` to a database with the encoder that built it.

    caption, image: the columns of a table, or an image pattern; image_root: the folder image paths are under; columns:
    the user's own columns to keep, None for all. thumbnails: keep a WebP of 128 pixels. batch_size: images encoded at
    once. workers: decoding threads. strict: stop at the first bad item. resume: take over what a killed run left.
    on_progress: called with (done, total or None, skipped).
    """
    folder = Path(path).expanduser()
    base = load(folder)
    encoder = encoder or load_encoder(
        _needed(model), key=base.key_kind, size=base.encoder.get("size"), **_model_options(options)
    )
    geometry = Geometry(encoder.height, encoder.width, encoder.channels, base.geometry.dtype, encoder.key_dim)
    description = {**encoder.fingerprints, "size": encoder.size}
    if (geometry, encoder.key_kind, description) != (base.geometry, base.key_kind, base.encoder):
        raise DatabaseMismatch(
            f"{folder} was built with {base.encoder}, {base.key_kind!r} keys and {base.geometry}; "
            f"this encoder has {description}, {encoder.key_kind!r} keys and {geometry}"
        )
    return _run(pairs, folder, base, encoder, fresh=False, **options)


def _needed(model: Any) -> Any:
    if model is None:
        raise InvalidRequest("give model= (a bundle, a name or a folder) or encoder=")
    return model


def _model_options(options: dict[str, Any]) -> dict[str, Any]:
    names = ("device", "dtype", "vae", "local_files_only", "revision", "cache_dir")
    return {name: options.pop(name) for name in names if name in options}


def _run(
    pairs: Any, folder: Path, start: Manifest, encoder: PairEncoder, *, fresh: bool, caption: str = "caption",
    image: str = "image", image_root: str | os.PathLike[str] | None = None, columns: list[str] | None = None,
    thumbnails: bool = True, batch_size: int = 16, workers: int | None = None, strict: bool = False,
    resume: bool = True, on_progress: Progress | None = None,
) -> BuildReport:  # fmt: skip
    if batch_size < 1:
        raise InvalidRequest(f"batch_size={batch_size} must be at least 1")
    began = time.monotonic()
    root = None if image_root is None else Path(image_root).expanduser()
    source = open_source(pairs, Columns(caption, image, root, columns))
    spec = {"source": source.description, "batch_size": batch_size, "thumbnails": thumbnails, "fresh": fresh}
    writer.prepare(folder)
    rank = ranks.current()
    with rank.lock(folder):
        job = Job(folder, start, spec)
        done_before = _committed(folder, job, start, spec, fresh)
        if done_before is not None:
            log.info("%s: this %s was committed before", folder, "build" if fresh else "append")
            if rank.first:
                writer.clean(folder, done_before)
                rank.clear(folder)
            return BuildReport.read(folder)
        others = job.unfinished_others()
        if others and resume and fresh:
            raise DatabaseError(
                f"{folder}: segments {', '.join(others[:4])} belong to an unfinished build with another input or other "
                "settings; finish that one, or discard it with resume=False"
            )
        if not resume:
            job.forget(lambda number: rank.owns(number - start.next_segment))
        job.clear(lambda number: rank.owns(number - start.next_segment))
        count = encoder_workers(workers)
        work = _Work(job, source, encoder, thumbnails, batch_size, count, strict, rank, on_progress)
        with ThreadPoolExecutor(count, thread_name_prefix="ragturbo-decode") as pool:
            segments = _encode_all(work, pool)
        manifest = _finish(work, segments, start)
        if rank.first:
            writer.clean(folder, manifest)
            rank.clear(folder)
        report = BuildReport.read(folder)
        report.seconds, report.encoded = time.monotonic() - began, work.encoded
        return report


def encoder_workers(workers: int | None) -> int:
    return workers if workers is not None else min(16, max(2, os.cpu_count() or 2))


def _committed(folder: Path, job: Job, start: Manifest, spec: dict[str, Any], fresh: bool) -> Manifest | None:
    """The generation that an earlier run of this very job committed before it could say so."""
    if not (folder / "CURRENT").exists():
        return None
    current = load(folder)
    if fresh:
        before = _previous(folder, current)
        indexed_since = current.index is not None and before is not None and before.job == job.name
        if current.job == job.name or indexed_since:
            return current
        raise DatabaseError(f"{folder} holds a database already; append to it, or build in another folder")
    if spec["source"]["kind"] == "iterable":
        # Nothing tells one iterable from the next.
        return None
    before = _previous(folder, current)
    return current if before is not None and current.job == Job(folder, before, spec).name else None


def _previous(folder: Path, current: Manifest) -> Manifest | None:
    path = folder / generation_name(current.generation - 1) / "manifest.json"
    try:
        return parse(path.read_bytes(), str(path))
    except (OSError, DatabaseError):
        return None


def _encode_all(work: _Work, pool: ThreadPoolExecutor) -> list[Finished | None]:
    """Every segment of this process, and None in the place of those of others."""
    base = work.job.base
    stream = enumerate(work.source.items())
    segments: list[Finished | None] = []
    while True:
        first = next(stream, None)
        if first is None:
            return segments
        position = len(segments)
        items = itertools.chain([first], itertools.islice(stream, base.segment_records - 1))
        if not work.rank.owns(position):
            work.seen += sum(1 for _ in items)
            segments.append(None)
            continue
        number = base.next_segment + position
        done = work.job.finished(number)
        if done is not None:
            _check_same(work, done, items)
        else:
            done = work.job.write(number, lambda out, items=items: _fill(work, pool, out, items))  # type: ignore[misc]
        segments.append(done)


def _digest(items: Iterator[tuple[int, Item]], sha: Any) -> Iterator[tuple[int, Item]]:
    for index, item in items:
        text = repr((item.caption, item.source, item.problem)) if isinstance(item.caption, str) else "?"
        sha.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
        yield index, item


def _check_same(work: _Work, done: Finished, items: Iterator[tuple[int, Item]]) -> None:
    """A resumed build reads past what is done, and makes sure that it is the same input."""
    sha = hashlib.sha256()
    count = sum(1 for _ in _digest(items, sha))
    if (count, sha.hexdigest()) != (done.notes["items"], done.notes["captions"]):
        raise DatabaseError(
            f"{work.job.folder}: the input differs from the one segment {done.entry.name} was built from; start over "
            "with resume=False"
        )
    work.seen += count
    work.skipped += done.notes["skipped"]
    _tell(work)


def _tell(work: _Work) -> None:
    if work.progress is not None:
        work.progress(work.seen, work.source.total, len(work.skipped))


_Ready = tuple[int, Item, "Future[tuple[np.ndarray, str, bytes | None]] | None", "str | None"]


def _decoded(work: _Work, pool: ThreadPoolExecutor, items: Iterator[tuple[int, Item]]) -> Iterator[_Ready]:
    """Items in order, decoded ahead by a few batches and no further: images are large."""
    ahead: deque[_Ready] = deque()
    for index, item in items:
        problem = item.problem or check_caption(item.caption)
        future = None
        if problem is None:
            future = pool.submit(images.prepare, item.image, work.encoder.size, work.thumbnails)
        ahead.append((index, item, future, problem))
        if len(ahead) >= work.batch_size + 2 * work.workers:
            yield ahead.popleft()
    while ahead:
        yield ahead.popleft()


def _fill(
    work: _Work, pool: ThreadPoolExecutor, out: SegmentWriter, items: Iterator[tuple[int, Item]]
) -> dict[str, Any]:
    sha, count = hashlib.sha256(), 0
    skipped: list[dict[str, Any]] = []
    batch: list[tuple[Record, np.ndarray]] = []
    first_id = work.job.base.next_id

    def skip(index: int, source: str | None, problem: str) -> None:
        if work.strict:
            raise InvalidRequest(f"item {index} ({source or 'no source'}): {problem}")
        skipped.append({"item": index, "source": source, "reason": problem[:500]})

    def flush() -> None:
        for index, source, problem in _encode(work, out, batch):
            skip(index - first_id, source, problem)
        batch.clear()
        _tell(work)

    for index, item, future, problem in _decoded(work, pool, _digest(items, sha)):
        count += 1
        work.seen += 1
        if problem is None and future is not None:
            try:
                pixels, digest, thumbnail = future.result()
            except InvalidRequest as error:
                problem = str(error)
            else:
                record = Record(first_id + index, item.caption, item.source, digest, thumbnail, item.extra)
                batch.append((record, pixels))
        if problem is not None:
            skip(index, item.source, problem)
        if len(batch) == work.batch_size:
            flush()
    if batch:
        flush()
    skipped.sort(key=lambda entry: entry["item"])
    work.skipped += skipped
    return {"items": count, "captions": sha.hexdigest(), "skipped": skipped}


def _encode(
    work: _Work, out: SegmentWriter, batch: list[tuple[Record, np.ndarray]]
) -> list[tuple[int, str | None, str]]:
    """One batch of the fixed shape into the segment; returns the pairs whose encoding cannot be stored."""
    records = [record for record, _ in batch]
    # A short batch is filled up with its last pair: another shape would give other bits.
    short = work.batch_size - len(batch)
    pixels = np.stack([image for _, image in batch] + [batch[-1][1]] * short)
    captions = [record.caption for record in records] + [records[-1].caption] * short
    keys, features = work.encoder.encode(pixels, captions)
    keys, features = keys[: len(batch)], features[: len(batch)]
    bad = []
    good = np.zeros(len(batch), bool)
    for i, record in enumerate(records):
        try:
            encode_keys(keys[i : i + 1], out.geometry.key_dim)
            encode_rows(features[i : i + 1], out.geometry)
            good[i] = True
        except InvalidRequest as error:
            bad.append((record.id, record.source, str(error)))
    if good.any():
        out.add([record for record, keep in zip(records, good, strict=True) if keep], keys[good], features[good])
    work.encoded += int(good.sum())
    return bad


def _finish(work: _Work, segments: list[Finished | None], start: Manifest) -> Manifest:
    """One commit for all processes: the first waits for the others, the others for its commit."""
    job, rank = work.job, work.rank
    if not rank.first:
        rank.announce(job.folder, job.name)
        return rank.wait_for_commit(job.folder, job.name)
    rank.wait_for_others(job.folder, job.name)
    for position, part in enumerate(segments):
        if part is None:
            segments[position] = found = job.finished(start.next_segment + position)
            if found is None:
                raise DatabaseCorrupt(
                    f"{job.folder}: segment {start.next_segment + position} of another process is gone"
                )
    done = [part for part in segments if part is not None]
    if not any(part.entry.count for part in done):
        raise InvalidRequest(f"none of {work.seen} items could be stored; the first: {work.skipped[:1]}")
    removed = writer.removed_ids(job.folder, start) if start.generation else np.empty(0, np.int64)
    manifest = writer.joined(start, done, start.next_id + work.seen, job.name)
    # Before the commit: once CURRENT names the generation, nothing is left to do that a kill could prevent.
    skipped = [entry for part in done for entry in part.notes["skipped"]]
    BuildReport(str(job.folder), manifest.generation, manifest.rows - start.rows, skipped).save(job.folder)
    return writer.commit(job.folder, manifest, removed, writer.index_folder(job.folder, start))
