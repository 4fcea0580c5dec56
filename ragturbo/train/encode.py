"""`ragturbo data encode`: real captioned images to latents. They have no noise, so only D learns from them."""

from __future__ import annotations

import io
import os
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.messages import short
from ragturbo.model.bundle import Bundle
from ragturbo.retrieval import images
from ragturbo.retrieval.sources import Columns, Item, check_caption, open_source
from ragturbo.train.folder import Plan, remaining
from ragturbo.train.progress import loading, local_device, rank_and_world, track
from ragturbo.train.prompts import check_scores, score_problem
from ragturbo.train.report import DataReport, Left, gather
from ragturbo.train.shards import DTYPES, digest, write_shard


class _Unusable(Exception):
    """Why a pair is left out."""


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
) -> DataReport:
    """Write this process's share of the missing shards. The arguments are the CLI's options.

    Pairs that cannot be used are left out and listed in skipped.jsonl.

    Raises:
        InvalidRequest: no pair can be used.
    """
    began = time.monotonic()
    check_scores(score_column, min_score)
    source = open_source(pairs, columns or Columns())
    total = source.total if source.total is not None else sum(1 for _ in source.items())
    if not total:
        raise InvalidRequest(f"{pairs}: no images")
    compute = None if precision is None else DTYPES[precision]
    with loading(model):
        bundle = Bundle.load(model, device=device or local_device(), dtype=compute, adapter=False)
    size = size or bundle.default_size
    made_by = {
        "model": model, "vae_encoder": bundle.fingerprint()["vae_encoder"], "source": digest([source.description]),
        "min_size": min_size, "score_column": score_column, "min_score": min_score, "size": size, "dtype": dtype,
        "text": store_text, "batch": batch,
    }  # fmt: skip
    if store_text:
        made_by["text_encoder"] = bundle.fingerprint()["text_encoder"]
    plan = Plan("encoded", total, shard_size, made_by)
    folder = Path(out).expanduser()
    plan.check(folder)
    todo = set(remaining(folder, plan.shards, *rank_and_world()))
    by_shard = groupby(enumerate(source.items()), lambda numbered: numbered[0] // shard_size)
    # The images of other shards are not read.
    for shard, items in track((group for group in by_shard if group[0] in todo), len(todo), "encode"):
        pixels: list[np.ndarray] = []
        records: list[dict[str, Any]] = []
        left = Left()
        for number, item in items:
            try:
                square, record = _prepare(item, size, min_size, score_column, min_score)
            except _Unusable as reason:
                left.skip(number, item.source, str(reason))
            else:
                pixels.append(square)
                records.append({**record, "number": number})
        captions = [record["caption"] for record in records]
        fields = _encode(bundle, pixels, captions, batch, DTYPES[dtype], store_text, left)
        plan.write_or_check(folder)
        write_shard(folder, shard, fields, records, left.to_dict())
    return gather(folder, "pair", plan.shards, len(todo), began)


def _prepare(
    item: Item, size: int, min_size: int, score_column: str | None, min_score: float | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """The square image (size, size, 3) uint8 and the record of a pair. Raises _Unusable."""
    if item.problem is None and not isinstance(item.caption, str):
        given = "empty" if item.caption is None else f"not a text: {short(item.caption)}"
        raise _Unusable(f"the caption is {given}")
    if problem := item.problem or check_caption(item.caption):
        raise _Unusable(problem)
    record: dict[str, Any] = {"caption": item.caption, "source": item.source}
    if score_column is not None and min_score is not None:
        if problem := score_problem(item.extra.get(score_column), score_column, min_score):
            raise _Unusable(problem)
        record["score"] = float(item.extra[score_column])
    try:
        if (side := _short_side(item.image)) < min_size:
            raise _Unusable(f"a side under --min-size {min_size} pixels: {side}")
        square, record["sha256"], _ = images.prepare(item.image, size, thumbnail=False)
    except InvalidRequest as error:
        raise _Unusable(str(error)) from None
    return square, record


def _short_side(image: Any) -> int:
    """The shorter side in pixels, from the file's header."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return min(image.size)
    try:
        file = io.BytesIO(image) if isinstance(image, (bytes, bytearray, memoryview)) else os.fspath(image)
        with Image.open(file) as picture:
            return min(picture.size)
    # Pillow raises many types of exceptions on invalid files; an OSError of the system has a number.
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidRequest(f"the image cannot be read: {why}") from error


@torch.no_grad()
def _encode(
    bundle: Bundle, pixels: list[np.ndarray], captions: list[str], batch: int, storage: torch.dtype, store_text: bool,
    left: Left,
) -> dict[str, Tensor]:  # fmt: skip
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(pixels), batch):
        rgb = torch.from_numpy(np.stack(pixels[start : start + batch])).to(bundle.device)
        tokens = bundle.text.tokenize(captions[start : start + batch])
        ids = tokens.input_ids
        left.note_tokens(captions[start : start + batch], tokens)
        latents = bundle.vae.encode(rgb.permute(0, 3, 1, 2).float() / 127.5 - 1)
        fields = {"latents": latents.to(storage), "input_ids": ids.to(torch.int32)}
        if store_text:
            states = bundle.text.encode(ids.to(bundle.device))
            fields |= {"text": states.hidden_states.to(storage), "key": states.key}
        for name, value in fields.items():
            parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}
