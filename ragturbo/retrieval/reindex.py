"""Build the approximate index of a database as a new generation. The old one stays current until it is complete."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from ragturbo.checks import whole
from ragturbo.errors import InvalidRequest
from ragturbo.messages import short
from ragturbo.retrieval import durable, scann, writer
from ragturbo.retrieval.manifest import Manifest
from ragturbo.retrieval.retriever import EXACT_BELOW, flag
from ragturbo.retrieval.scann import ScannConfig
from ragturbo.retrieval.snapshot import open_snapshot

log = logging.getLogger("ragturbo")
_MAX_THREADS = 1024


def reindex(
    folder: Path, config: ScannConfig | None = None, *, centred: bool | None = None, threads: int = 0
) -> Manifest:
    """Build the index.

    Args:
        config: None chooses by size, with no index below 20,000 pairs.
        centred: None keeps the setting of the database.
        threads: for training; 0 for all.
    """
    if config is not None and not isinstance(config, ScannConfig):
        raise InvalidRequest(f"config={short(config)} must be a ScannConfig", option="config")
    centred = None if centred is None else flag("centred", centred)
    threads = whole("threads", threads, 0, _MAX_THREADS)
    with durable.writer_lock(folder):
        snapshot = open_snapshot(folder)
        base, pairs = snapshot.manifest, len(snapshot)
        if config is not None and centred is not None and config.centred != centred:
            raise InvalidRequest(f"config says centred={config.centred}, the call says {centred}")
        centre = config.centred if config is not None else base.centred if centred is None else centred
        removed = writer.removed_ids(folder, base)
        if config is None and (pairs < EXACT_BELOW or not scann.available()):
            why = f"{pairs} pairs" if pairs < EXACT_BELOW else "the package scann is not installed"
            log.info("no index: %s; search is exact", why)
            if base.index is None and base.centred == centre:
                return base
            manifest = writer.commit(folder, base.evolved(index=None, centred=centre), removed)
        else:
            draft = folder / "index.part"
            if draft.exists():
                durable.remove_tree(draft)
            with durable.naming(draft, "creating"):
                draft.mkdir()
            try:
                config = replace(config or ScannConfig.by_size(pairs), centred=centre)
                index = scann.build_index(snapshot, config, draft, threads)
                manifest = writer.commit(folder, base.evolved(index=index, centred=centre), removed, draft)
            finally:
                durable.remove_tree(draft)
        writer.clean(folder, manifest)
        return manifest
