"""From a name to a folder: the embedded model, a local folder, or a snapshot of a hub repository."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ragturbo.errors import ModelError
from ragturbo.model.weights import PICKLES, file_dtype, refuse_pickle

EMBEDDED = "shapes"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a bundle is made of. At the root, other weights are other forms of the same model; pickles and other frameworks'
# files stay where they are.
_WANTED = ("*.json", "*/*.txt", "*/*.safetensors", "adapter.safetensors", "clip_key.safetensors", "database/**")
_UNWANTED = ("*/*.fp16.*", "*/*.non_ema.*", "safety_checker/*", "feature_extractor/*", "image_encoder/*")


def resolve(
    name: str | os.PathLike[str],
    *,
    local_files_only: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The folder of a model. A folder on this machine wins over a hub id of the same name."""
    path = Path(name).expanduser()
    if str(name) == EMBEDDED and not path.is_dir():
        folder = Path(str(resources.files("ragturbo") / "assets" / EMBEDDED))
        if not folder.is_dir():
            raise ModelError(f"the embedded model {EMBEDDED!r} is not in this installation ({folder})")
        return folder
    if path.is_dir():
        return path
    refuse_pickle(path)
    if path.is_file():
        raise ModelError(f"{path} is a file; a model is a folder in diffusers' layout (model_index.json, unet/, …)")
    if not _HUB_ID.fullmatch(str(name)) or str(name).startswith("."):
        raise ModelError(f"there is no folder {path}, and {str(name)!r} is no hub id (owner/name)")
    return _snapshot(str(name), local_files_only, revision, cache_dir)


def _snapshot(name: str, local_files_only: bool, revision: str | None, cache_dir: Any) -> Path:
    from huggingface_hub import constants, snapshot_download

    offline = local_files_only or constants.HF_HUB_OFFLINE
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=offline,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
            )
        )
    # The hub's errors come from its client, from HTTP and from the file system.
    except Exception as error:
        where = "the local cache (offline)" if offline else "the hub or the local cache"
        raise ModelError(
            f"there is no folder {name!r} here, and {where} has no model of that name"
            f"{'' if revision is None else f' at revision {revision}'}: {error}"
        ) from error


@dataclass(frozen=True)
class Component:
    """A part's folder and which of its weights count."""

    path: Path
    variant: str | None
    """diffusers' and transformers' word for model.fp16.safetensors: taken only where there is nothing else."""
    dtype: torch.dtype
    """Of the file, so that fingerprints see what it holds; the cast comes after."""


def component(folder: Path, name: str) -> Component:
    """A part of a model, checked: it is there and holds whole safetensors, and not a pickle alone."""
    path = folder / name
    if not path.is_dir():
        raise ModelError(f"{folder} is no model in diffusers' layout: it has no folder {name}/")
    for variant in (None, "fp16"):
        files = sorted(file for file in path.glob("*.safetensors") if _variant(file) == variant)
        if files:
            return Component(path, variant, [file_dtype(file) for file in files][0])
    for other in sorted(path.iterdir()):
        if other.suffix in PICKLES:
            refuse_pickle(other)
    raise ModelError(f"{path} has no weights (*.safetensors)")


def _variant(file: Path) -> str | None:
    """model.safetensors has none; model.fp16.safetensors and, in pieces, model.fp16-00001-of-00002.safetensors do."""
    return ".".join(file.name.split(".")[1:-1]).split("-")[0] or None


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
