"""Reading and writing weights: safetensors only, and messages that name the file and the way out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ragturbo.errors import ModelError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse_pickle(path: str | Path) -> None:
    """A pickle runs code when it is read."""
    if str(path).lower().endswith(PICKLES):
        raise ModelError(
            f"{path} is a pickle, which can run code when it is read. "
            f"`ragturbo convert {path} {Path(path).with_name(safetensors_name(Path(path).name))}` turns it into "
            "safetensors."
        )


def safetensors_name(name: str) -> str:
    """The name that diffusers, transformers and peft look for: pytorch_model-….bin is model-….safetensors to them."""
    stem, _ = os.path.splitext(name)
    if stem == "pytorch_model" or stem.startswith(("pytorch_model-", "pytorch_model.")):
        stem = stem.removeprefix("pytorch_")
    return f"{stem}.safetensors"


def open_safetensors(path: str | Path) -> Any:
    """The file opened lazily, its header checked against its size: a truncated file is found here."""
    path = Path(path)
    refuse_pickle(path)
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}. Copy or download it again.") from error


@overload
def read_safetensors(path: str | Path, with_metadata: Literal[False] = False) -> dict[str, Tensor]: ...
@overload
def read_safetensors(path: str | Path, with_metadata: Literal[True]) -> tuple[dict[str, Tensor], dict[str, str]]: ...
def read_safetensors(path: str | Path, with_metadata: bool = False) -> Any:
    """Every tensor of a file, on the CPU, and on request the metadata of its header."""
    with open_safetensors(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        return (state, file.metadata() or {}) if with_metadata else state


def write_safetensors(path: str | Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Written beside and renamed: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: value.detach().to("cpu").contiguous() for name, value in state.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file(whole, part, metadata={"format": "pt", **(metadata or {})})
    part.replace(path)


def file_dtype(path: str | Path) -> torch.dtype:
    """The floating type most of a file's tensors have."""
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    counts: dict[str, int] = {}
    with open_safetensors(path) as file:
        for name in file.keys():
            dtype = file.get_slice(name).get_dtype()
            counts[dtype] = counts.get(dtype, 0) + 1
    floating = {name: count for name, count in counts.items() if name in names}
    return names[max(floating, key=lambda name: floating[name])] if floating else torch.float32
