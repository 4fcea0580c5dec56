"""`ragturbo data encode`: real captioned images to latents. No noise belongs to them, so no regression loss does."""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.model.bundle import Bundle
from ragturbo.retrieval import images
from ragturbo.retrieval.sources import Columns, Item, check_caption, open_source
from ragturbo.train.progress import local_device, rank_and_world, track
from ragturbo.train.shards import DTYPES, Plan, digest, remaining, write_shard

log = logging.getLogger("ragturbo")


def make_encoded_data(
    pairs: Any,
    out: str | Path,
    *,
    model: str,
    columns: Columns | None = None,
    min_size: int = 1024,
    score_column: str | None = None,
    min_score: float | None = None,
    size: int | None = None,
    batch: int = 16,
    shard_size: int = 1024,
    dtype: str = "float16",
    store_text: bool = False,
    precision: str | None = None,
    device: str | None = None,
) -> int:
    """Writes the shards that are missing of this process's share; returns how many. Run again, it goes on.

    pairs: whatever a database is built from. Images with a side under min_size pixels, or with less than min_score in
    score_column, are left out; the rest become centred squares of `size` pixels (the model's own).
    """
    if (score_column is None) != (min_score is None):
        raise InvalidRequest("--score-column and --min-score belong together")
    source = open_source(pairs, columns or Columns())
    total = source.total if source.total is not None else sum(1 for _ in source.items())
    if not total:
        raise InvalidRequest(f"{pairs}: there are no images")
    bundle = Bundle.load(
        model, device=device or local_device(), dtype=None if precision is None else DTYPES[precision], adapter=False
    )
    size = size or bundle.default_size
    made_by = {
        "model": model,
        "vae_encoder": bundle.fingerprint()["vae_encoder"],
        "source": digest([source.description]),
        "min_size": min_size,
        "score_column": score_column,
        "min_score": min_score,
        "size": size,
        "dtype": dtype,
        "text": store_text,
        "batch": batch,
    }
    plan = Plan("encoded", total, shard_size, made_by)
    folder = Path(out)
    plan.write_or_check(folder)
    todo = remaining(folder, plan.shards, *rank_and_world())
    skipped: Counter[str] = Counter()
    for shard, items in track(_by_shard(source.items(), plan, set(todo)), len(todo), "encode"):
        chosen: list[tuple[np.ndarray, dict[str, Any]]] = []
        for number, item in items:
            picture, record, why = _prepare(item, size, min_size, score_column, min_score)
            if picture is None:
                skipped[why] += 1
            else:
                chosen.append((picture, {**record, "number": number}))
        tensors = _encode(bundle, chosen, batch, DTYPES[dtype], store_text)
        write_shard(folder, shard, tensors, [record for _, record in chosen])
    for why, count in skipped.most_common():
        log.info("%d images left out: %s", count, why)
    return len(todo)


def _by_shard(items: Iterator[Item], plan: Plan, todo: set[int]) -> Iterator[tuple[int, list[tuple[int, Item]]]]:
    """The items of the shards in `todo`, in order. Other shards' items are stepped over, their images unread."""
    group: list[tuple[int, Item]] = []
    for number, item in enumerate(items):
        shard, last = number // plan.shard_size, number + 1
        if shard in todo:
            group.append((number, item))
        if (last % plan.shard_size == 0 or last == plan.inputs) and shard in todo:
            yield shard, group
            group = []


def _prepare(
    item: Item, size: int, min_size: int, score_column: str | None, min_score: float | None
) -> tuple[np.ndarray | None, dict[str, Any], str]:
    """The square and the record of one pair, or why there is none."""
    if problem := item.problem or check_caption(item.caption):
        return None, {}, problem
    record: dict[str, Any] = {"caption": item.caption, "source": item.source}
    if score_column is not None and min_score is not None:
        try:
            record["score"] = float(item.extra[score_column])
        except (KeyError, TypeError, ValueError):
            return None, {}, f"no number in column {score_column!r}"
        if not record["score"] >= min_score:
            return None, {}, f"{score_column} under {min_score}"
    try:
        if _short_side(item.image) < min_size:
            return None, {}, f"a side under {min_size} pixels"
        square, record["sha256"], _ = images.prepare(item.image, size, thumbnail=False)
    except InvalidRequest:
        return None, {}, "the image cannot be read"
    return square, record, ""


def _short_side(image: Any) -> int:
    """From the file's header; no pixel is decoded."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return min(image.size)
    try:
        where = io.BytesIO(image) if isinstance(image, (bytes, bytearray, memoryview)) else os.fspath(image)
        with Image.open(where) as picture:
            return min(picture.size)
    # Pillow's decoders fail in many ways on hostile bytes.
    except Exception as error:
        raise InvalidRequest(f"the image cannot be read: {error}") from error


@torch.no_grad()
def _encode(
    bundle: Bundle, chosen: list[tuple[np.ndarray, dict[str, Any]]], batch: int, storage: torch.dtype, store_text: bool
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(chosen), batch):
        pictures = [picture for picture, _ in chosen[start : start + batch]]
        pixels = torch.from_numpy(np.stack(pictures)).to(bundle.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        ids = bundle.text.tokenize([record["caption"] for _, record in chosen[start : start + batch]]).input_ids
        fields = {"latents": bundle.vae.encode(pixels).to(storage), "input_ids": ids.to(torch.int32)}
        if store_text:
            states = bundle.text.encode(ids.to(bundle.device))
            fields |= {"text": states.hidden_states.to(storage), "key": states.key}
        for name, value in fields.items():
            parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}
