"""Facts about a database for `db.info` and `ragturbo db info`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ragturbo.retrieval.format import FORMAT_VERSION
from ragturbo.retrieval.retriever import EXACT_BELOW
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
    manifest, geometry, rows = snapshot.manifest, snapshot.geometry, len(snapshot)
    newer, index, advice = 0, None, None
    files = [file for entry in manifest.segments for file in entry.files.values()]
    if manifest.index is not None:
        files += manifest.index.files.values()
        index = {"kind": manifest.index.kind, "rows": manifest.index.rows, "config": manifest.index.config}
        newer = max(0, rows - manifest.index.rows)
        if rows >= EXACT_BELOW and newer + manifest.removed > max(2000, rows // 50):
            advice = (
                f"{newer} pairs are newer than the index and {manifest.removed} in it are removed: "
                "run `ragturbo db reindex`"
            )
    return DatabaseInfo(
        path=str(snapshot.folder), format_version=FORMAT_VERSION, generation=manifest.generation, pairs=rows,
        removed=manifest.removed, next_id=manifest.next_id, segments=len(manifest.segments), height=geometry.height,
        width=geometry.width, channels=geometry.channels, feature_dtype=geometry.dtype,
        record_bytes=geometry.record_bytes, key_kind=manifest.key_kind, key_dim=geometry.key_dim,
        key_mean_norm=float(np.linalg.norm(snapshot.key_mean)), centred=manifest.centred,
        bytes=sum(file.bytes for file in files), encoder=dict(manifest.encoder), retriever=retriever, why=why,
        index=index, newer_than_index=newer, advice=advice,
    )  # fmt: skip
