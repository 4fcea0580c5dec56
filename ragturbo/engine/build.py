"""From options to parts: which device, which engine, which source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ragturbo.errors import InvalidRequest

if TYPE_CHECKING:
    pass

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(device: Any, dtype: Any) -> tuple[torch.device, torch.dtype]:
    """None: cuda/float16 where there is a GPU, else cpu/float32."""
    try:
        where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise InvalidRequest(f"device={device!r} is not a device: {error}") from None
    if where.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"device={device!r}: ragturbo runs on cpu and cuda")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest(f"device={device!r}, but torch sees no CUDA GPU here; see `ragturbo info`")
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype.removeprefix("torch."), dtype)
    if dtype is None:
        dtype = torch.float16 if where.type == "cuda" else torch.float32
    if dtype not in _DTYPES.values():
        raise InvalidRequest(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}")
    return where, dtype
