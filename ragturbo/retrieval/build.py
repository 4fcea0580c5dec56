"""Encode pairs into a database, segment by segment: build a new one, or append to one.

Item i of the input has id `next_id + i` and is stored in segment i // segment_records, so the bytes depend neither on
interruptions of the build nor on the number of processes. A skipped item leaves its id unused.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragturbo.checks import whole
from ragturbo.config import MAX_SIDE, one_of
from ragturbo.errors import DatabaseError, DatabaseMismatch, InvalidRequest
from ragturbo.messages import short
from ragturbo.model.find import Hub
from ragturbo.retrieval import ranks, writer
from ragturbo.retrieval.duplicates import FirstPairs
from ragturbo.retrieval.encoder import PairEncoder, check_key, check_loading, check_pair_encoder, load_encoder
from ragturbo.retrieval.format import DTYPES, Geometry, generation_name
from ragturbo.retrieval.items import Columns
from ragturbo.retrieval.jobs import Job
from ragturbo.retrieval.manifest import Manifest, database_folder, differences, load, parse
from ragturbo.retrieval.origin import known_origin, name_to_report, origin
from ragturbo.retrieval.report import BuildReport
from ragturbo.retrieval.retriever import flag
from ragturbo.retrieval.segment_builder import Progress, SegmentBuilder
from ragturbo.retrieval.sources import Source, check_source, open_source

log = logging.getLogger("ragturbo")
# Images encoded at once, of builds and of single pairs: in another shape an image's feature has other bits.
BATCH_SIZE = 16
# Images of a batch are in memory at once.
_MAX_BATCH = 1024
_MAX_WORKERS = 1024


@dataclass(frozen=True)
class _Settings:
    """How items are read, encoded and stored. Refuses values that cannot be."""

    columns: Columns
    thumbnails: bool
    batch_size: int
    workers: int | None
    dedupe: bool
    strict: bool
    resume: bool
    on_progress: Progress | None

    def __post_init__(self) -> None:
        whole("batch_size", self.batch_size, 1, _MAX_BATCH)
        if self.workers is not None:
            whole("workers", self.workers, 1, _MAX_WORKERS)
        for name in ("thumbnails", "dedupe", "strict", "resume"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        if self.on_progress is not None and not callable(self.on_progress):
            raise InvalidRequest(f"on_progress={short(self.on_progress)} must be a function", option="on_progress")
        if self.dedupe and ranks.current().world > 1:
            raise InvalidRequest(
                "dedupe needs a single process: one of several does not know the pairs of the others. Run it without "
                "torchrun, or build first and remove duplicates afterwards",
                option="dedupe",
            )

    def spec(self, source: Source, fresh: bool) -> dict[str, Any]:
        """What the stored bytes depend on, besides encoder and database."""
        batch_size = int(self.batch_size)
        found = {"source": source.description, "batch_size": batch_size, "thumbnails": self.thumbnails, "fresh": fresh}
        return {**found, "dedupe": True} if self.dedupe else found


def build(
    pairs: Any, path: str | os.PathLike[str], *, model: Any = None, encoder: PairEncoder | None = None,
    key: str | None = None, feature_dtype: str = "float16", size: int | None = None, segment_records: int | None = None,
    index: bool = True, centred: bool = False, caption: str = "caption", image: str = "image",
    image_root: str | os.PathLike[str] | None = None, columns: Sequence[str] | None = None, thumbnails: bool = True,
    batch_size: int = BATCH_SIZE, workers: int | None = None, dedupe: bool = False, strict: bool = False,
    resume: bool = True, device: Any = None, dtype: Any = None, vae: str = "full", hub: Hub = Hub(),  # noqa: B008
    on_progress: Progress | None = None, on_load: Callable[[], None] | None = None,
) -> BuildReport:  # fmt: skip
    """Build a new database at `path`; the options are those of `Database.build`.

    Options and input are checked before the model is loaded.

    Args:
        hub: where to look for the model.
        on_load: called before the model is loaded.
    """
    folder = database_folder(path)
    one_of("feature_dtype", feature_dtype, tuple(DTYPES))
    check_key(key)
    check_loading(device, dtype)
    check_pair_encoder(encoder)
    size = None if size is None else whole("size", size, 1, MAX_SIDE)
    index, centred = flag("index", index), flag("centred", centred)
    if segment_records is not None:
        segment_records = whole("segment_records", segment_records, 1, 2**31 - 1)
    settings = _Settings(
        Columns(caption, image, _root(image_root), columns), thumbnails, batch_size, workers, dedupe, strict, resume,
        on_progress,
    )  # fmt: skip
    if encoder is None and model is None:
        raise InvalidRequest("give model= (a bundle, a name or a folder) or encoder=", option="model")
    source = open_source(pairs, settings.columns)
    check_source(source)
    _check_target(folder, segment_records, settings.spec(source, fresh=True))
    if encoder is None:
        encoder = _loaded(on_load, model, key=key, size=size, device=device, dtype=dtype, vae=vae, hub=hub)
    start = writer.empty_manifest(*_description(encoder, feature_dtype), segment_records)
    report = _run(source, folder, start, encoder, settings, fresh=True)
    if index and ranks.current().first and load(folder).index is None:
        from ragturbo.retrieval.reindex import reindex

        reindex(folder, centred=centred)
    return report


def append(
    pairs: Any, path: str | os.PathLike[str], *, model: Any = None, encoder: PairEncoder | None = None,
    caption: str = "caption", image: str = "image", image_root: str | os.PathLike[str] | None = None,
    columns: Sequence[str] | None = None, thumbnails: bool = True, batch_size: int = BATCH_SIZE,
    workers: int | None = None, dedupe: bool = False, strict: bool = False, resume: bool = True, device: Any = None,
    dtype: Any = None, vae: str = "full", hub: Hub = Hub(), on_progress: Progress | None = None,  # noqa: B008
    on_load: Callable[[], None] | None = None,
) -> BuildReport:  # fmt: skip
    """Add `pairs` to a database with the encoder that built it; the options are those of `Database.append`.

    Args:
        model: None takes the one that built the database, if it is known.
        hub, on_load: see `build`.
    """
    folder = database_folder(path)
    base = load(folder)
    check_loading(device, dtype)
    check_pair_encoder(encoder)
    settings = _Settings(
        Columns(caption, image, _root(image_root), columns), thumbnails, batch_size, workers, dedupe, strict, resume,
        on_progress,
    )  # fmt: skip
    if encoder is None and model is None:
        model = origin(folder)
    source = open_source(pairs, settings.columns)
    check_source(source)
    writer.check_writable(folder)
    if encoder is None:
        encoder = _loaded(
            on_load, model, key=base.key_kind, size=base.encoder.get("size"), device=device, dtype=dtype, vae=vae,
            hub=hub,
        )  # fmt: skip
    check_encoder(folder, base, encoder)
    return _run(source, folder, base, encoder, settings, fresh=False)


def check_encoder(folder: Path, base: Manifest, encoder: PairEncoder) -> None:
    """Raise DatabaseMismatch unless the encoder is the one that built the database."""
    if found := differences(base, *_description(encoder, base.geometry.dtype)):
        built, given = (", ".join(texts) for texts in zip(*found, strict=True))
        model = known_origin(folder)
        hint = "" if model is None else f". The model that built it is {model}"
        raise DatabaseMismatch(f"{folder} was built with {built}; this encoder has {given}{hint}")


def _root(image_root: str | os.PathLike[str] | None) -> Path | None:
    if image_root is None:
        return None
    named = isinstance(image_root, (str, os.PathLike)) and bool(os.fspath(image_root))
    root = Path(image_root).expanduser() if named else None
    if root is None or not root.is_dir():
        shown = repr(str(image_root)) if named else short(image_root)
        raise InvalidRequest(f"image_root={shown} is no folder", option="image_root")
    return root


def _loaded(on_load: Callable[[], None] | None, model: Any, **options: Any) -> PairEncoder:
    if on_load is not None:
        on_load()
    return load_encoder(model, **options)


def _description(encoder: PairEncoder, dtype: str) -> tuple[Geometry, str, dict[str, Any]]:
    geometry = Geometry(encoder.height, encoder.width, encoder.channels, dtype, encoder.key_dim)
    return geometry, encoder.key_kind, {**encoder.fingerprints, "size": encoder.size}


def _check_target(folder: Path, segment_records: int | None, spec: dict[str, Any]) -> None:
    """Raise DatabaseError if a new database cannot be made in `folder`, as far as it is known without an encoder."""
    if (folder / "CURRENT").exists():
        current = load(folder)
        # The same build again changes nothing, which is allowed.
        like = writer.empty_manifest(current.geometry, current.key_kind, current.encoder, segment_records)
        _committed(folder, Job(folder, like, spec), like, spec)
    else:
        writer.check_new(folder)
    writer.check_writable(folder)


def _run(
    source: Source, folder: Path, start: Manifest, encoder: PairEncoder, settings: _Settings, *, fresh: bool
) -> BuildReport:
    began = time.monotonic()
    spec = settings.spec(source, fresh)
    workers = settings.workers or min(16, max(2, os.cpu_count() or 2))
    writer.prepare(folder)
    rank = ranks.current()
    with rank.lock(folder):
        if not fresh:
            # Another process may have committed since `append` read the manifest: its pairs would be lost.
            start = load(folder)
            check_encoder(folder, start, encoder)
        job = Job(folder, start, spec)
        firsts = None
        if settings.dedupe:
            firsts = FirstPairs()
            firsts.add(folder, start.segments, writer.removed_ids(folder, start))
        name = name_to_report(encoder, folder)
        if name is None and not fresh:
            before = BuildReport.find(folder)
            name = None if before is None else before.model
        work = SegmentBuilder(
            job, source, encoder, settings.thumbnails, int(settings.batch_size), int(workers), settings.strict, rank,
            settings.on_progress, firsts, name,
        )  # fmt: skip
        manifest = _committed(folder, job, start, spec)
        already = manifest is not None
        if manifest is None:
            others = job.unfinished_others()
            if others and settings.resume and fresh:
                raise DatabaseError(
                    f"{folder}: segments {', '.join(others[:4])} belong to an unfinished build with another input or "
                    "other settings; finish that one, or discard it with resume=False (--restart)"
                )
            job.clear(lambda number: rank.owns(number - start.next_segment), settings.resume)
            manifest = work.commit(work.segments())
        else:
            log.info("%s: this %s is already committed", folder, "build" if fresh else "append")
        if rank.first:
            writer.clean(folder, manifest)
            rank.clear(folder)
        report = BuildReport.read(folder)
        report.seconds, report.encoded, report.already = time.monotonic() - began, work.encoded, already
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
