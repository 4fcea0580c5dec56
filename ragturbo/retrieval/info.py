"""Facts about a database for `db.info` and `ragturbo db info`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ragturbo.retrieval import scann
from ragturbo.retrieval.format import FORMAT_VERSION
from ragturbo.retrieval.snapshot import Snapshot


@dataclass(frozen=True)
class DatabaseInfo:
    path: str
    format_version: int
    generation: int
    pairs: int
    removed: int
    next_id: int
    segments: int
    height: int
    width: int
    channels: int
    feature_dtype: str
    record_bytes: int
    key_kind: str
    key_dim: int
    key_mean_norm: float
    """Near 1 if the keys are close to each other; then centring may help."""
    centred: bool
    bytes: int
    encoder: dict[str, Any]
    retriever: str
    why: str
    index: dict[str, Any] | None
    newer_than_index: int
    advice: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(snapshot: Snapshot, retriever: str, why: str) -> DatabaseInfo:
    manifest, geometry = snapshot.manifest, snapshot.geometry
    newer, index, advice = 0, None, None
    if manifest.index is not None:
        index = {"kind": manifest.index.kind, "rows": manifest.index.rows, "config": manifest.index.config}
        newer = max(0, len(snapshot) - manifest.index.rows)
        advice = scann.advised(len(snapshot), newer, manifest.removed)
    total = sum(file.bytes for entry in manifest.segments for file in entry.files.values())
    total += sum(file.bytes for file in manifest.index.files.values()) if manifest.index else 0
    return DatabaseInfo(
        path=str(snapshot.folder), format_version=FORMAT_VERSION, generation=manifest.generation, pairs=len(snapshot),
        removed=manifest.removed, next_id=manifest.next_id, segments=len(manifest.segments), height=geometry.height,
        width=geometry.width, channels=geometry.channels, feature_dtype=geometry.dtype,
        record_bytes=geometry.record_bytes, key_kind=manifest.key_kind, key_dim=geometry.key_dim,
        key_mean_norm=float(np.linalg.norm(snapshot.key_mean)), centred=manifest.centred, bytes=total,
        encoder=dict(manifest.encoder), retriever=retriever, why=why, index=index, newer_than_index=newer,
        advice=advice,
    )  # fmt: skip
