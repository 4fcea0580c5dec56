"""Load the parts of a model from its diffusers folders: complete, from safetensors, in the dtype of their files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ragturbo.errors import ModelError
from ragturbo.model import source

TINY_VAE = "vae_tiny"
# The tiny VAE for the latents of Stable Diffusion 1 and 2, if the bundle has none of its own.
TINY_VAE_ID = "madebyollin/taesd"
_SD_SCALE = 0.18215


def load_text_encoder(folder: Path) -> Any:
    from transformers import CLIPTextModel

    part = source.component(folder, "text_encoder")
    kind = source.read_config(part.path).get("model_type")
    if kind not in ("clip_text_model", "clip"):
        raise ModelError(f"{part.path} is a {kind!r} model; only CLIP text encoders are supported")
    # Not CLIPTextModelWithProjection: SD 2's config has a projection_dim, but its weights have no projection.
    with quiet():
        return _load(CLIPTextModel, part, dtype=part.dtype)


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    path = folder / "tokenizer"
    if not path.is_dir():
        raise ModelError(f"{folder} is not a model in diffusers' layout: it has no folder tokenizer/")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    # The libraries that read a tokenizer's files each raise their own errors.
    except Exception as error:
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {error}") from error


def load_unet(folder: Path, name: str) -> Any:
    from diffusers import UNet2DConditionModel

    return _load_diffusers(UNet2DConditionModel, source.component(folder, name))


def load_vae(folder: Path, choice: str, hub: dict[str, Any]) -> Any:
    """choice: "full" (the model's own), "tiny", or a folder or hub id of an AutoencoderTiny."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    if choice == "full":
        part = source.component(folder, "vae")
        tiny = source.read_config(part.path).get("_class_name") == "AutoencoderTiny"
        return _load_diffusers(AutoencoderTiny if tiny else AutoencoderKL, part)
    if choice == "tiny" and (folder / TINY_VAE).is_dir():
        path = folder / TINY_VAE
    else:
        path = source.resolve(_tiny_vae_id(folder) if choice == "tiny" else choice, **hub)
    part = source.component(path.parent, path.name)
    if source.read_config(path).get("_class_name") != "AutoencoderTiny":
        raise ModelError(f"{path} is not an AutoencoderTiny")
    return _load_diffusers(AutoencoderTiny, part)


def _tiny_vae_id(folder: Path) -> str:
    full = source.read_config(folder / "vae")
    if full.get("latent_channels") != 4 or abs(full.get("scaling_factor", _SD_SCALE) - _SD_SCALE) > 1e-6:
        raise ModelError(
            f"{folder} has no {TINY_VAE}/, and {TINY_VAE_ID} only fits the latents of Stable Diffusion 1 and 2: "
            "set vae to a folder or hub id of an AutoencoderTiny for this model"
        )
    return TINY_VAE_ID


def load_scheduler(folder: Path) -> Any:
    import diffusers

    path = folder / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        kind = getattr(diffusers, config["_class_name"])
        if not issubclass(kind, diffusers.SchedulerMixin):
            raise TypeError(f"{kind.__name__} is not a scheduler")
        return kind.from_config(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"no scheduler of diffusers can be made from {path}: {error!r}") from error


def _load_diffusers(kind: Any, part: source.Component) -> Any:
    from diffusers.utils import is_accelerate_available

    return _load(kind, part, torch_dtype=part.dtype, low_cpu_mem_usage=is_accelerate_available())


def _load(kind: Any, part: source.Component, **options: Any) -> Any:
    """from_pretrained; missing or mismatched weights raise, while the libraries would only warn and initialize them."""
    try:
        model, report = kind.from_pretrained(
            part.path,
            local_files_only=True,
            use_safetensors=True,
            variant=part.variant,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"{part.path} cannot be loaded as {kind.__name__}: {error}") from error
    if missing := sorted(report.get("missing_keys") or ()):
        raise ModelError(f"{part.path} lacks {len(missing)} weights, the first of them {missing[0]}")
    if mismatched := list(report.get("mismatched_keys") or ()):
        raise ModelError(f"{part.path} has weights whose shapes differ from its config.json: {mismatched[0]}")
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars that transformers shows for loading and saving."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
