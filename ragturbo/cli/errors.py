"""Exit codes: 0 ok, 2 usage, 3 bad data, 4 device."""

from __future__ import annotations

from ragturbo.errors import DatabaseError, InvalidRequest, ModelError, RagTurboError

USAGE, DATA, DEVICE = 2, 3, 4


def exit_code(error: RagTurboError) -> int:
    if isinstance(error, InvalidRequest):
        return USAGE
    if isinstance(error, (DatabaseError, ModelError)):
        return DATA
    return DEVICE
