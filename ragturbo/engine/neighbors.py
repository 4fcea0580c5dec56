"""Neighbours that the caller chose: read from the database by id, or encoded for this request."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.engine.database import DatabaseGeneration
from ragturbo.engine.result import Retrieved
from ragturbo.errors import InvalidRequest
from ragturbo.messages import short
from ragturbo.neighbor import Neighbor
from ragturbo.retrieval.items import check_caption

EncodePairs = Callable[[list[str], Tensor], tuple[Tensor, Tensor]]
"""Captions and images (B, 3, H, W) in [-1, 1] -> keys (B, K), features (B, S, C)."""


def resolve_neighbors(
    chosen: list[list[Any]],
    database: DatabaseGeneration | None,
    encode_pairs: EncodePairs,
    *,
    image_size: int,
    repeats: int,
    dtype: torch.dtype,
) -> tuple[Retrieved, list[list[Neighbor]]]:
    """Return the rows of each image and the Neighbors of each prompt.

    Args:
        chosen: per prompt k ids, Neighbors or (caption, image) pairs.
        image_size: the side in pixels that a pair's image is cropped to.
        repeats: images per prompt.
        dtype: of the returned features.
    """
    flat = [entry for entries in chosen for entry in entries]
    stored = {i: number for i, entry in enumerate(flat) if (number := _stored_id(entry)) is not None}
    pairs = {i: _pair(entry) for i, entry in enumerate(flat) if i not in stored}
    keys: dict[int, Tensor] = {}
    rows: dict[int, Tensor] = {}
    neighbors: dict[int, Neighbor] = {}
    if stored:
        if database is None:
            raise InvalidRequest("neighbors names ids, but there is no database to read them from", option="neighbors")
        if missing := [number for number in stored.values() if not (abs(number) < 2**63 and database.holds(number))]:
            raise InvalidRequest(
                f"neighbors names id {missing[0]}, which the database does not have", option="neighbors"
            )
        found = database.gather(torch.tensor([[*stored.values()]]), torch.zeros(1, len(stored)))
        for j, (i, number) in enumerate(stored.items()):
            keys[i], rows[i], neighbors[i] = found.keys[0, j], found.h_retr[0, j], database.neighbor(number)
    if pairs:
        images = torch.stack([_pixels(image, image_size) for _, image in pairs.values()])
        new_keys, new_rows = encode_pairs([caption for caption, _ in pairs.values()], images)
        for j, (i, (caption, _)) in enumerate(pairs.items()):
            keys[i], rows[i] = new_keys[j].float().cpu(), new_rows[j].cpu()
            neighbors[i] = Neighbor(-1, float("nan"), float("nan"), caption, "given with the request")
    k = len(chosen[0])
    order = torch.arange(len(flat)).view(len(chosen), k).repeat_interleave(repeats, 0)
    shape = tuple(order.shape)
    retrieved = Retrieved(
        ids=order,
        scores=torch.full(shape, float("inf")),
        keys=torch.stack([keys[i] for i in order.flatten().tolist()]).view(*shape, -1),
        h_retr=torch.stack([rows[i].to(dtype) for i in order.flatten().tolist()]).view(*shape, *rows[0].shape),
    )
    return retrieved, [[neighbors[p * k + j] for j in range(k)] for p in range(len(chosen))]


def pixels(image: Any, size: int) -> Tensor:
    """PIL image or path -> (3, size, size) in [-1, 1], centre-cropped as in a database build."""
    from ragturbo.retrieval.images import square

    return torch.from_numpy(np.array(square(image, size))).permute(2, 0, 1).float() / 127.5 - 1


def _stored_id(entry: Any) -> int | None:
    if isinstance(entry, Neighbor):
        if entry.id < 0:
            raise InvalidRequest(
                "a Neighbor given with an earlier request is in no database; give (caption, image)", option="neighbors"
            )
        return entry.id
    try:
        return None if isinstance(entry, bool) else operator.index(entry)
    except TypeError:
        return None


def _pair(entry: Any) -> tuple[str, Any]:
    if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
        raise InvalidRequest(
            f"neighbors holds {short(entry)}; give ids, Neighbors or tuples of a caption and an image, in this order",
            option="neighbors",
        )
    if problem := check_caption(entry[0]):
        raise InvalidRequest(f"neighbors: {problem}", option="neighbors")
    return entry


def _pixels(image: Any, size: int) -> Tensor:
    try:
        return pixels(image, size)
    except InvalidRequest as error:
        what = image if isinstance(image, (str, os.PathLike)) else type(image).__name__
        raise InvalidRequest(f"neighbors: {what}: {error}", option="neighbors") from error
