"""Load a model's parts: complete, from safetensors, in the dtype of their files."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.find import Hub, read_json, resolve
from ragturbo.model.networks.clip_tokenizer import CLIPTokenizer
from ragturbo.model.networks.euler import EulerDiscreteScheduler
from ragturbo.model.networks.load import KINDS, load_network
from ragturbo.model.pickles import refuse_pickled_model
from ragturbo.model.weights import file_dtype

TINY_VAE = "vae_tiny"
# The tiny VAE for the latents of Stable Diffusion 1 and 2, if the bundle has none of its own.
TINY_VAE_ID = "madebyollin/taesd"
_SD_SCALE = 0.18215


def load_text_encoder(folder: Path, variant: str | None = None) -> Any:
    path = _part(folder, "text_encoder")
    kind = read_json(path / "config.json").get("model_type")
    if kind not in ("clip_text_model", "clip"):
        raise ModelError(f"{path} is a {kind!r} model; only CLIP text encoders are supported")
    # Not CLIPTextModelWithProjection: SD 2's config has a projection_dim, but its weights have no projection.
    return _load("CLIPTextModel", path, variant)


def load_tokenizer(folder: Path) -> Any:
    path = folder / "tokenizer"
    if not path.is_dir():
        raise ModelError(f"{folder} is not a model in diffusers' layout: it has no folder tokenizer/")
    if (tokenizer := CLIPTokenizer.load(path)) is not None:
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    # The libraries that read a tokenizer's files each raise their own errors.
    except Exception as error:
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {error}") from error


def load_unet(folder: Path, name: str, variant: str | None = None) -> Any:
    return _load("UNet2DConditionModel", _part(folder, name), variant)


def load_vae(folder: Path, choice: str, hub: Hub) -> Any:
    """choice: "full" (the model's own), "tiny", or a folder or hub id of an AutoencoderTiny."""
    if choice == "full":
        path = _part(folder, "vae")
        tiny = read_json(path / "config.json").get("_class_name") == "AutoencoderTiny"
        return _load("AutoencoderTiny" if tiny else "AutoencoderKL", path, hub.variant)
    if choice == "tiny" and (folder / TINY_VAE).is_dir():
        path = folder / TINY_VAE
    else:
        # A repository of its own, without the model's revision and subfolder.
        own = replace(hub, revision=None, subfolder=None, variant=None)
        path = resolve(_tiny_vae_id(folder) if choice == "tiny" else choice, own)
    if read_json(path / "config.json").get("_class_name") != "AutoencoderTiny":
        raise ModelError(f"{path} is not an AutoencoderTiny")
    return _load("AutoencoderTiny", path)


def _tiny_vae_id(folder: Path) -> str:
    full = read_json(folder / "vae" / "config.json")
    if full.get("latent_channels") != 4 or abs(full.get("scaling_factor", _SD_SCALE) - _SD_SCALE) > 1e-6:
        raise ModelError(
            f"{folder} has no {TINY_VAE}/, and {TINY_VAE_ID} only fits the latents of Stable Diffusion 1 and 2: "
            "set vae to a folder or hub id of an AutoencoderTiny for this model"
        )
    return TINY_VAE_ID


def load_scheduler(folder: Path) -> Any:
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    try:
        if (scheduler := EulerDiscreteScheduler.load(config)) is not None:
            return scheduler
        import diffusers

        kind = getattr(diffusers, config["_class_name"])
        if not issubclass(kind, diffusers.SchedulerMixin):
            raise TypeError(f"{kind.__name__} is not a scheduler")
        return kind.from_config(config)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"no scheduler of diffusers can be made from {path}: {error!r}") from error


def _part(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_dir():
        raise ModelError(f"{folder} is not a model in diffusers' layout: it has no folder {name}/")
    return path


def _load(kind: str, path: Path, variant: str | None = None) -> Any:
    """Load a network of `networks`, or one of the library if it has an option that those do not have."""
    files = sorted(path.glob("*.safetensors"))
    there = {_variant(file) for file in files}
    if variant is not None and variant not in there:
        raise InvalidRequest(f"{path} has no weights of variant={variant!r}", option="variant")
    # model.fp16.safetensors is loaded if it is asked for, or if there are no other weights.
    if variant is None and None not in there:
        variant = "fp16"
    # All headers are read, which detects truncated shards.
    dtypes = [file_dtype(file) for file in files if _variant(file) == variant]
    if not dtypes:
        refuse_pickled_model(path.parent, path)
        raise ModelError(f"{path} has no weights (*.safetensors)")
    own = load_network(kind, path, variant, dtypes[0]) if len(dtypes) == 1 else None
    return _of_library(kind, path, variant, dtypes[0]) if own is None else own


def _of_library(kind: str, path: Path, variant: str | None, dtype: Any) -> Any:
    """from_pretrained, but missing or mismatched weights raise: the libraries warn and initialize them."""
    from diffusers.utils import is_accelerate_available

    own_library = KINDS[kind].library
    library = importlib.import_module(own_library)
    options = {"dtype" if own_library == "transformers" else "torch_dtype": dtype}
    try:
        with quiet():
            model, report = getattr(library, kind).from_pretrained(
                path,
                local_files_only=True,
                use_safetensors=True,
                variant=variant,
                low_cpu_mem_usage=is_accelerate_available(),
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"{path} cannot be loaded as {kind}: {error}") from error
    if missing := sorted(report.get("missing_keys") or ()):
        raise ModelError(f"{path} lacks {len(missing)} weights, the first of them {missing[0]}")
    if mismatched := list(report.get("mismatched_keys") or ()):
        raise ModelError(f"{path} has weights whose shapes differ from its config.json: {mismatched[0]}")
    return model


def _variant(file: Path) -> str | None:
    """None for model.safetensors; "fp16" for model.fp16.safetensors and model.fp16-00001-of-00002.safetensors."""
    return ".".join(file.name.split(".")[1:-1]).split("-")[0] or None


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
