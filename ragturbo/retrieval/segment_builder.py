"""The part of a build that one process does: decode in threads, encode in batches of one shape, write its segments."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ragturbo.errors import DatabaseCorrupt, DatabaseError, InvalidRequest
from ragturbo.messages import cut, cut_path, many
from ragturbo.retrieval import images, ranks, writer
from ragturbo.retrieval.duplicates import REASON, FirstPairs, note_duplicates
from ragturbo.retrieval.encoder import PairEncoder
from ragturbo.retrieval.format import encode_keys, encode_rows
from ragturbo.retrieval.items import Item, check_caption
from ragturbo.retrieval.jobs import Finished, Job, SegmentWriter
from ragturbo.retrieval.manifest import Manifest
from ragturbo.retrieval.pairs import Record
from ragturbo.retrieval.report import BuildReport, Notes, none_stored
from ragturbo.retrieval.sources import Source

# done, total or None, skipped
Progress = Callable[[int, "int | None", int], None]
_Ready = tuple[int, Item, "Future[tuple[np.ndarray, str, bytes | None]] | None", "str | None"]
_MOST_WORDS = 8


@dataclass
class SegmentBuilder:
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
    firsts: FirstPairs | None
    """With `dedupe`: the pairs that are stored, of which no duplicate is."""
    model: str | None
    """Name of the model, for the report."""
    seen: int = 0
    encoded: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    input_notes: Notes = field(default_factory=Notes)

    def segments(self) -> list[Finished | None]:
        """Write the segments of this process. Those of other processes are None in the list."""
        base = self.job.base
        stream = enumerate(self.source.items(self.input_notes))
        segments: list[Finished | None] = []
        self.report_progress()
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
                self.report_progress()
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
        if self.firsts is not None:
            self.firsts.add(self.job.folder, [done.entry], np.empty(0, np.int64))
        self.seen += count
        self.skipped += done.notes["skipped"]

    def report_progress(self, total: int | None = None) -> None:
        if self.progress is not None:
            self.progress(self.seen, self.source.total if total is None else total, len(self.skipped))

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
        self.skipped = [entry for part in done for entry in part.notes["skipped"]]
        self.report_progress(self.seen)
        stored = any(part.entry.count for part in done)
        if not stored and not any(entry["reason"].startswith(REASON) for entry in self.skipped):
            # A corrected input must not meet the empty segments of this one.
            job.clear(resume=False)
            raise InvalidRequest(none_stored(self.seen, next(iter(self.skipped), None)))
        removed = writer.removed_ids(job.folder, start)
        manifest = writer.joined(start, done, start.next_id + self.seen, job.name) if stored else start
        # The report is written before the commit, so that a kill after the commit leaves nothing unfinished.
        self._report(manifest, done, removed).save(job.folder)
        if not stored:
            return start
        return writer.commit(job.folder, manifest, removed, writer.index_folder(job.folder, start))

    def _report(self, manifest: Manifest, done: list[Finished], removed: np.ndarray) -> BuildReport:
        start, notes = self.job.base, Notes()
        notes.merge(self.input_notes.to_dict())
        for part in done:
            notes.merge(part.notes.get("notes", {}))
        note_duplicates(self.job.folder, manifest.segments, removed, start.next_id, notes)
        return BuildReport(
            str(self.job.folder), manifest.generation, manifest.rows - start.rows, self.skipped,
            first_id=start.next_id, total=manifest.rows - len(removed), notes=notes.to_dict(), model=self.model,
        )  # fmt: skip


def _hashed(items: Iterator[tuple[int, Item]], sha: Any) -> Iterator[tuple[int, Item]]:
    """Pass items on and update `sha` with each caption, source and problem."""
    for index, item in items:
        text = repr((item.caption, item.source, item.problem)) if isinstance(item.caption, str) else "?"
        sha.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
        yield index, item


@dataclass
class _Fill:
    """Fills one segment with items; see `Job.write`."""

    work: SegmentBuilder
    pool: ThreadPoolExecutor
    items: Iterator[tuple[int, Item]]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)
    failed: dict[int, str] = field(default_factory=dict)
    """Why pairs could not be stored once they were encoded, by id."""

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
                    first = None if work.firsts is None else work.firsts.first(item.caption, digest, id)
                    if first is None:
                        batch.append((Record(id, item.caption, item.source, digest, thumbnail, item.extra), pixels))
                    else:
                        problem = f"{REASON} {first}"
            if problem is not None:
                self._skip(index, item.source, problem)
            if len(batch) == work.batch_size:
                self._flush(out, batch)
        if batch:
            self._flush(out, batch)
        for entry in self.skipped:
            # A copy of a pair that is not stored is not stored for the same reason.
            if entry["reason"].startswith(REASON) and (why := self.failed.get(int(entry["reason"].split()[-1]))):
                entry["reason"] = why
        self.skipped.sort(key=lambda entry: entry["item"])
        return {"items": count, "captions": sha.hexdigest(), "skipped": self.skipped, "notes": self.notes.to_dict()}

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
        # A duplicate is no bad item.
        if self.work.strict and not problem.startswith(REASON):
            raise InvalidRequest(f"item {index} ({cut_path(source or 'no source')}): {problem}")
        entry = {"item": index, "source": source, "reason": problem[:500]}
        self.skipped.append(entry)
        self.work.skipped.append(entry)

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
                self.failed[record.id] = str(error)
                self._skip(record.id - work.job.base.next_id, record.source, str(error))
                if work.firsts is not None:
                    work.firsts.forget(record.caption, record.sha256)
        if good:
            records, stored_keys, rows = zip(*good, strict=True)
            out.add_encoded(records, np.concatenate(stored_keys), np.concatenate(rows))
            self._note_captions(records)
        work.encoded += len(good)
        batch.clear()
        work.report_progress()

    def _note_captions(self, records: tuple[Record, ...]) -> None:
        """Note captions that the model reads in part, if its encoder can say it."""
        read = getattr(self.work.encoder, "unread", None)
        if read is None:
            return
        for record, (dropped, unknown) in zip(records, read([r.caption for r in records]), strict=True):
            item = f"item {record.id - self.work.job.base.next_id} ({cut(record.source or record.caption)})"
            if dropped:
                self.notes.add("cut_off", f"{item}: the last {many(dropped, 'token')}")
            if unknown:
                self.notes.add("unknown_words", f"{item}: {', '.join(unknown[:_MOST_WORDS])}")
