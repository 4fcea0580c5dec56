"""Building the approximate index of a database as a generation of its own: until it is whole, the old one serves."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from ragturbo.errors import InvalidRequest
from ragturbo.retrieval import durable, scann, writer
from ragturbo.retrieval.manifest import Manifest
from ragturbo.retrieval.retriever import EXACT_BELOW
from ragturbo.retrieval.scann import ScannConfig
from ragturbo.retrieval.snapshot import open_snapshot

log = logging.getLogger("ragturbo")
_DRAFT = "index.part"


def reindex(
    folder: Path, config: ScannConfig | None = None, *, centred: bool | None = None, threads: int = 0
) -> Manifest:
    """config: None chooses by size, and no index below 20,000 pairs. centred: None keeps the database's setting."""
    with durable.writer_lock(folder):
        snapshot = open_snapshot(folder)
        base = snapshot.manifest
        if config is not None and centred is not None and config.centred != centred:
            raise InvalidRequest(f"config says centred={config.centred}, the call says {centred}")
        centre = config.centred if config is not None else base.centred if centred is None else centred
        if config is None and (len(snapshot) < EXACT_BELOW or not scann.available()):
            why = f"{len(snapshot)} pairs" if len(snapshot) < EXACT_BELOW else "the package scann is not installed"
            log.info("no index: %s; search is exact", why)
            if base.index is None and base.centred == centre:
                return base
            manifest = writer.commit(folder, base.evolved(index=None, centred=centre), writer.removed_ids(folder, base))
            writer.clean(folder, manifest)
            return manifest
        draft = folder / _DRAFT
        if draft.exists():
            durable.remove_tree(draft)
        with durable.naming(draft, "creating"):
            draft.mkdir()
        try:
            chosen = config or ScannConfig.by_size(len(snapshot), centre)
            index = scann.build_index(snapshot, replace(chosen, centred=centre), draft, threads)
            manifest = writer.commit(
                folder, base.evolved(index=index, centred=centre), writer.removed_ids(folder, base), draft
            )
        finally:
            durable.remove_tree(draft)
        writer.clean(folder, manifest)
        return manifest
