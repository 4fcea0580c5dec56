"""Refuse pickled weights, naming the command that converts them."""

from __future__ import annotations

import os
from pathlib import Path

from ragturbo.errors import ModelError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse_pickle(path: str | Path) -> None:
    """Raise ModelError if the file name is that of a pickle."""
    if str(path).lower().endswith(PICKLES):
        raise ModelError(
            f"{path} is a pickle, which can run code when it is loaded. Convert it to safetensors with "
            f"`ragturbo convert {path} {Path(path).with_name(safetensors_name(Path(path).name))}`."
        )


def refuse_pickled_model(folder: Path, part: Path) -> None:
    """Raise ModelError if the weights in a model's folder `part` are pickles."""
    if pickles := [file for file in sorted(part.iterdir()) if file.suffix in PICKLES]:
        raise ModelError(
            f"the weights of {folder} are pickles ({part.name}/{pickles[0].name}), which can run code when they are "
            f"loaded. Convert the whole folder to safetensors with `ragturbo convert {folder} {folder}-safetensors`, "
            "and load that."
        )


def safetensors_name(name: str) -> str:
    """The file name under which diffusers, transformers and peft look for converted weights.

    transformers writes pytorch_model-….bin, but its safetensors files are named model-….safetensors.
    """
    stem, _ = os.path.splitext(name)
    if stem == "pytorch_model" or stem.startswith(("pytorch_model-", "pytorch_model.")):
        stem = stem.removeprefix("pytorch_")
    return f"{stem}.safetensors"
