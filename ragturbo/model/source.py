"""Find a model's folder: the embedded model, a local folder, or a snapshot of a hub repository."""

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
# The files of a bundle. Weights at a repository's root are single-file copies of the same model; pickles and the files
# of other frameworks are not downloaded.
_WANTED = ("*.json", "*/*.txt", "*/*.safetensors", "adapter.safetensors", "clip_key.safetensors", "database/**")
_UNWANTED = ("*/*.fp16.*", "*/*.non_ema.*", "safety_checker/*", "feature_extractor/*", "image_encoder/*")


def resolve(
    name: str | os.PathLike[str],
    *,
    local_files_only: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Return the folder of a model.

    Args:
        name: "shapes", a local folder or a hub id; a local folder takes precedence.
        local_files_only, revision, cache_dir: as in huggingface_hub.snapshot_download.

    Raises:
        ModelError: there is no such model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if str(name) == EMBEDDED:
        folder = Path(str(resources.files("ragturbo") / "assets" / EMBEDDED))
        if not folder.is_dir():
            raise ModelError(f"the embedded model {EMBEDDED!r} is not in this installation ({folder})")
        return folder
    refuse_pickle(path)
    if path.is_file():
        raise ModelError(f"{path} is a file; a model is a folder in diffusers' layout (model_index.json, unet/, …)")
    if not _HUB_ID.fullmatch(str(name)):
        raise ModelError(f"there is no folder {path}, and {str(name)!r} is not a hub id (owner/name)")
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
    # The hub client raises its own errors and those of HTTP and of the file system.
    except Exception as error:
        where = "the local cache (offline)" if offline else "the hub or the local cache"
        version = "" if revision is None else f" at revision {revision}"
        raise ModelError(f"no folder {name!r}, and no model of that name in {where}{version}: {error}") from error


@dataclass(frozen=True)
class Component:
    """The folder of a model's part and which of its weights to load."""

    path: Path
    variant: str | None
    """As in diffusers and transformers. "fp16" (model.fp16.safetensors) only if there are no other weights."""
    dtype: torch.dtype
    """The dtype of the file: fingerprints are computed before the cast."""


def component(folder: Path, name: str) -> Component:
    """Check that folder/name exists and has safetensors weights.

    Raises:
        ModelError: it does not exist, or has no weights, or only pickled ones.
    """
    path = folder / name
    if not path.is_dir():
        raise ModelError(f"{folder} is not a model in diffusers' layout: it has no folder {name}/")
    for variant in (None, "fp16"):
        files = sorted(file for file in path.glob("*.safetensors") if _variant(file) == variant)
        if files:
            # All of them are opened: a truncated shard is reported by name.
            return Component(path, variant, [file_dtype(file) for file in files][0])
    for other in sorted(path.iterdir()):
        if other.suffix in PICKLES:
            refuse_pickle(other)
    raise ModelError(f"{path} has no weights (*.safetensors)")


def _variant(file: Path) -> str | None:
    """None for model.safetensors; "fp16" for model.fp16.safetensors and model.fp16-00001-of-00002.safetensors."""
    return ".".join(file.name.split(".")[1:-1]).split("-")[0] or None


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
