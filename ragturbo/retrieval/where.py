"""Pairs whose columns have given values: for `remove(where=…)` and the lists of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ragturbo.errors import InvalidRequest
from ragturbo.messages import short
from ragturbo.retrieval.snapshot import Snapshot


def matching(snapshot: Snapshot, where: Mapping[str, Any]) -> np.ndarray:
    """Return the live ids whose columns equal the given values.

    Args:
        where: {column: value or list of values}; a pair must match all of them.

    Raises:
        InvalidRequest: it is empty, or no pair has such a column.
    """
    if not isinstance(where, Mapping):
        raise InvalidRequest(f"where={short(where)} must be {{column: value or list of values}}", option="where")
    if not where:
        raise InvalidRequest("where={} would match everything; name a column and a value", option="where")
    known: set[str] = set()
    masks = []
    for pairs in snapshot.segments.pairs:
        table = pairs.text()
        known.update(table.column_names)
        mask = np.ones(len(table), bool)
        for column, value in where.items():
            try:
                wanted = set(value) if isinstance(value, (list, tuple, set, frozenset)) else {value}
            except TypeError:
                raise InvalidRequest(f"where: {short(value)} is no value of a column", option="where") from None
            values = table.column(column).to_pylist() if column in table.column_names else [None] * len(table)
            mask &= np.array([entry in wanted for entry in values], bool)
        masks.append(mask)
    for column in where:
        if column not in known:
            raise InvalidRequest(
                f"no pair has a column {column!r}; columns: {', '.join(sorted(known)) or 'none'}", option="where"
            )
    hit = np.concatenate(masks or [np.empty(0, bool)]) & snapshot.alive
    return snapshot.ids[hit]
