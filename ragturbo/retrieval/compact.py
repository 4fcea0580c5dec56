"""Compaction: rewrite segments with removed pairs, and merge runs of small segments."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ragturbo.retrieval import durable, writer
from ragturbo.retrieval.jobs import Finished, Job, SegmentWriter
from ragturbo.retrieval.manifest import Manifest, SegmentEntry, load
from ragturbo.retrieval.segments import Segments

# Rows copied at a time: about 40 MB of features at the paper's size.
_BATCH = 256


def _plan(manifest: Manifest, live_counts: list[int]) -> list[list[int]]:
    """Group consecutive segments into runs that fit in one segment."""
    runs: list[list[int]] = []
    held = 0
    for i, live in enumerate(live_counts):
        if runs and held + live <= manifest.segment_records:
            runs[-1].append(i)
            held += live
        else:
            runs.append([i])
            held = live
    return runs


def compact(folder: Path) -> Manifest:
    """Delete removed pairs from the disk. Ids do not change. The old generation is deleted after the commit."""
    with durable.writer_lock(folder):
        base = load(folder)
        segments = Segments(folder, base)
        alive = ~np.isin(segments.ids, writer.removed_ids(folder, base))
        bounds = segments.starts
        counts = [int(alive[a:b].sum()) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        job = Job(folder, base, {"compact": True})
        job.clear()
        entries: list[SegmentEntry] = []
        number = base.next_segment
        for run in _plan(base, counts):
            if len(run) == 1 and counts[run[0]] == base.segments[run[0]].count:
                entries.append(base.segments[run[0]])
                continue
            rows = np.flatnonzero(alive[bounds[run[0]] : bounds[run[-1] + 1]]) + bounds[run[0]]
            if len(rows):
                done = job.finished(number) or _rewrite(job, number, segments, rows)
                entries.append(done.entry)
                number += 1
        manifest = base
        if tuple(entries) != base.segments:
            mean = segments.keys[alive].sum(axis=0, dtype=np.float64) / max(int(alive.sum()), 1)
            # The removed ids are no longer stored, so none is listed.
            manifest = base.evolved(segments=tuple(entries), rows=int(alive.sum()), removed=0, next_segment=number,
                                    key_mean=tuple(float(v) for v in mean))  # fmt: skip
            manifest = writer.commit(folder, manifest, np.empty(0, np.int64), writer.index_folder(folder, base))
        writer.clean(folder, manifest, keep_previous=False)
        return manifest


def _rewrite(job: Job, number: int, segments: Segments, rows: np.ndarray) -> Finished:
    stride, payload = segments.geometry.stride, segments.geometry.record_bytes

    def fill(out: SegmentWriter) -> None:
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            block = np.zeros((len(part), stride), np.uint8)
            # Checked as read: a damaged record must not get a valid checksum.
            block[:, :payload] = segments.read(part)
            numbers, inside = segments.locate(part)
            records = [segments.pairs[s].record(int(i), True) for s, i in zip(numbers, inside, strict=True)]
            out.add_encoded(records, segments.keys[part], block)

    return job.write(number, fill)
