"""Copy a database: the newest generation with its index, with the same ids and bytes."""

from __future__ import annotations

import os
from pathlib import Path

from ragturbo.errors import DatabaseError, InvalidRequest, ModelError
from ragturbo.model.find import EMBEDDED, resolve
from ragturbo.retrieval import durable, writer
from ragturbo.retrieval.manifest import OWN_DATABASE, Manifest, database_folder, load, segment_path
from ragturbo.retrieval.origin import known_origin
from ragturbo.retrieval.report import BuildReport


def copy(source: Path, target: Path) -> Manifest:
    """Copy a database to a new folder. Its files never change, so they are hard-linked where the file system can.

    A copy that was killed is not a database yet, and may be made again.
    """
    if str(target) == EMBEDDED:
        raise InvalidRequest(f"a folder {EMBEDDED} would hide the embedded model: choose another name", option="path")
    base = load(source)
    writer.check_new(target)
    writer.check_writable(target)
    writer.prepare(target)
    with durable.writer_lock(target):
        if (target / "CURRENT").exists():
            raise DatabaseError(f"{target} holds a database already; copy to another folder")
        for entry in base.segments:
            for kind in entry.files:
                path = segment_path(target, entry.number, kind)
                with durable.naming(path, "deleting"):
                    path.unlink(missing_ok=True)
                durable.link_or_copy(segment_path(source, entry.number, kind), path)
        durable.sync_folder(target / "segments")
        if (report := BuildReport.find(source)) is not None:
            report.model = known_origin(source)
            report.save(target)
        removed = writer.removed_ids(source, base)
        return writer.commit(target, base, removed, writer.index_folder(source, base))


def find(source: str | os.PathLike[str]) -> Path:
    """Return the folder of a database, given that folder, or a model with a database of its own.

    Raises:
        DatabaseError: it is neither.
    """
    path = database_folder(source)
    if (path / "CURRENT").exists():
        return path
    try:
        own = resolve(source) / OWN_DATABASE
    except ModelError as error:
        raise DatabaseError(f"{source} is neither a database nor a model: {error}") from error
    if not own.is_dir():
        raise DatabaseError(f"{source} is neither a database nor a model with a database of its own")
    return own
