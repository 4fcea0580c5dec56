"""Read and write weights: safetensors only, with errors that name the file and what to do."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ragturbo.errors import ModelError
from ragturbo.model.pickles import refuse_pickle

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_safetensors(path: str | Path) -> Any:
    """Open a file lazily. A truncated file is detected here: its header is checked against its size."""
    path = Path(path)
    refuse_pickle(path)
    if not path.is_file():
        # The same weights as a pickle: the message says how to convert it.
        for other in sorted(path.parent.glob(f"{path.stem}.*")):
            refuse_pickle(other)
        raise ModelError(f"there is no file {path}")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a complete safetensors file: {error}. Copy or download it again.") from error


@overload
def read_safetensors(path: str | Path, with_metadata: Literal[False] = False) -> dict[str, Tensor]: ...
@overload
def read_safetensors(path: str | Path, with_metadata: Literal[True]) -> tuple[dict[str, Tensor], dict[str, str]]: ...
def read_safetensors(path: str | Path, with_metadata: bool = False) -> Any:
    """Read all tensors of a file to the CPU; with_metadata: also return the metadata of its header."""
    with open_safetensors(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        return (state, file.metadata() or {}) if with_metadata else state


def write_safetensors(path: str | Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write to a temporary file and rename it, so that readers never see a partial file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: value.detach().to("cpu").contiguous() for name, value in state.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file(plain, part, metadata={"format": "pt", **(metadata or {})})
    part.replace(path)


def file_dtype(path: str | Path) -> torch.dtype:
    """The most common floating-point dtype of a file's tensors; float32 if it has none."""
    with open_safetensors(path) as file:
        counts = Counter(file.get_slice(name).get_dtype() for name in file.keys())
    return next((_FLOATS[name] for name, _ in counts.most_common() if name in _FLOATS), torch.float32)
