"""From a name to a folder: the embedded model, a local folder, or a snapshot of a hub repository."""

from __future__ import annotations

import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from ragturbo.errors import ModelError
from ragturbo.model.weights import PICKLES, open_safetensors, refuse_pickle

EMBEDDED = "shapes"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a bundle is made of. Single-file checkpoints, pickles and other frameworks' weights stay where they are.
_WANTED = ("*.json", "*/*.json", "*/*.txt", "*/*.model", "*.safetensors", "*/*.safetensors", "database/**")
_UNWANTED = ("*/*.fp16.*", "*/*.non_ema.*", "safety_checker/*", "feature_extractor/*", "image_encoder/*")
_SINGLE_FILES = ("adapter.safetensors", "clip_key.safetensors")


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

    # Only what the pipeline's index does not name stays out: root weights are other forms of the same model.
    offline = local_files_only or constants.HF_HUB_OFFLINE
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=offline,
                allow_patterns=[p for p in _WANTED if p != "*.safetensors"] + list(_SINGLE_FILES),
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


def component(folder: Path, name: str) -> Path:
    """A component's folder, checked: it is there and holds whole safetensors, no pickle alone."""
    path = folder / name
    if not path.is_dir():
        raise ModelError(f"{folder} is no model in diffusers' layout: it has no folder {name}/")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        for other in sorted(path.iterdir()):
            if other.suffix in PICKLES:
                refuse_pickle(other)
        raise ModelError(f"{path} has no weights (*.safetensors)")
    for file in weights:
        with open_safetensors(file):
            pass
    return path


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
