"""Find a model's folder, by path, as the embedded model or on the hub, and check its files. Imports no torch."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ragturbo.config import VAES
from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.messages import short
from ragturbo.model.info import BundleInfo, Sampling
from ragturbo.model.pickles import refuse_pickle, refuse_pickled_model

EMBEDDED = "shapes"
ADAPTER, LORA, DATABASE = "adapter.safetensors", "decoder_lora", "database"
TEACHER = "teacher_unet"
_PEFT = "adapter_model.safetensors"
_DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
PARTS = ("text_encoder", "tokenizer", "unet", "vae", "scheduler")
_WEIGHTS = ("text_encoder", "unet", "vae")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The files of a bundle. Weights at a repository's root are single-file copies of the same model; pickles and the files
# of other frameworks are not downloaded.
_WANTED = ("*.json", "*/*.txt", "*/*.safetensors", "adapter.safetensors", "clip_key.safetensors", "database/**")
_UNWANTED = ("*/*.non_ema.*", "safety_checker/*", "feature_extractor/*", "image_encoder/*")


@dataclass(frozen=True)
class Hub:
    """Where to look for a model, as in diffusers' from_pretrained."""

    local_files_only: bool = False
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    subfolder: str | None = None
    variant: str | None = None
    """"fp16": weights named model.fp16.safetensors. None: those without a variant, if there are any."""

    def __post_init__(self) -> None:
        for name in ("revision", "subfolder", "variant"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise InvalidRequest(f"{name}={short(value)} must be a text or None", option=name)
        for name, kinds in (("token", (str, bool)), ("cache_dir", (str, os.PathLike)), ("local_files_only", bool)):
            value = getattr(self, name)
            if not isinstance(value, kinds) and not (value is None and name != "local_files_only"):
                what = {"token": "a token, True or None", "cache_dir": "a folder or None"}.get(name, "True or False")
                raise InvalidRequest(f"{name}={short(value)} must be {what}", option=name)


def resolve(name: str | os.PathLike[str], hub: Hub = Hub(), /, **options: Any) -> Path:  # noqa: B008 (frozen)
    """Return the folder of a model: a local folder, "shapes" (the embedded model) or a hub id, which is downloaded.

    options: fields of Hub, instead of `hub`.
    """
    hub = Hub(**options) if options else hub
    if not str(name):
        raise InvalidRequest("model='' is empty", option="model")
    folder = _folder(name, hub)
    if hub.subfolder is None:
        return folder
    inner = folder / hub.subfolder
    if not inner.is_dir():
        raise ModelError(f"{name} has no folder {hub.subfolder!r} (subfolder=)")
    return inner


def is_local(name: str) -> bool:
    """Whether a model is found, or missed, without the hub."""
    return Path(name).expanduser().exists() or name == EMBEDDED or not _HUB_ID.fullmatch(name)


def _folder(name: str | os.PathLike[str], hub: Hub) -> Path:
    path = Path(name).expanduser()
    if hub.revision is not None and (path.is_dir() or str(name) == EMBEDDED):
        raise InvalidRequest(f"revision={hub.revision!r} has no effect: {name} is a local model", option="revision")
    if path.is_dir():
        return path
    if str(name) == EMBEDDED:
        from importlib import resources

        folder = Path(str(resources.files("ragturbo") / "assets" / EMBEDDED))
        if not folder.is_dir():
            raise ModelError(f"the embedded model {EMBEDDED!r} is not in this installation ({folder})")
        return folder
    if path.is_file():
        refuse_pickle(path)
        if path.suffix == ".safetensors":
            raise ModelError(
                f"{path} is a single file; a model is a folder in diffusers' layout. Load the file with "
                f"Generator.from_single_file({str(path)!r}), or make a folder of it with diffusers: "
                "StableDiffusionPipeline.from_single_file(…).save_pretrained(folder)"
            )
        raise ModelError(f"{path} is a file; a model is a folder in diffusers' layout (model_index.json, unet/, …)")
    refuse_pickle(path)
    if path.suffix == ".safetensors":
        raise ModelError(f"there is no file {path}")
    if not _HUB_ID.fullmatch(str(name)):
        near = "; did you mean 'shapes'?" if difflib.get_close_matches(str(name), [EMBEDDED]) else ""
        raise ModelError(
            f"there is no folder {path}, and {short(str(name))} is not a hub id (owner/name) or 'shapes', the embedded "
            f"model{near}"
        )
    return _download(str(name), hub)


def _download(name: str, hub: Hub) -> Path:
    from huggingface_hub import constants, snapshot_download

    offline = hub.local_files_only or constants.HF_HUB_OFFLINE
    inside = "" if hub.subfolder is None else f"{hub.subfolder.strip('/')}/"
    unwanted = _UNWANTED if hub.variant else (*_UNWANTED, "*/*.fp16.*")
    try:
        return Path(
            snapshot_download(
                name,
                revision=hub.revision,
                cache_dir=None if hub.cache_dir is None else os.fspath(hub.cache_dir),
                token=hub.token,
                local_files_only=offline,
                allow_patterns=[inside + pattern for pattern in _WANTED],
                ignore_patterns=[inside + pattern for pattern in unwanted],
            )
        )
    # The hub client raises its own errors and those of HTTP and of the file system.
    except Exception as error:
        version = "" if hub.revision is None else f" at revision {hub.revision}"
        missing = f"there is no folder {name!r}, and no model of that name in the hub's cache on this machine{version}"
        if offline:
            raise ModelError(
                f"offline: {missing}. Download it once, with local_files_only=False, or give a folder"
            ) from error
        kind = type(error).__name__
        if kind in ("LocalEntryNotFoundError", "ConnectError", "ConnectionError", "OfflineModeIsEnabled"):
            raise ModelError(f"offline: the hub cannot be reached, {missing}") from error
        reasons = {
            "RepositoryNotFoundError": "the hub has no such model, or it is private: pass token=",
            "GatedRepoError": "the model's licence must be accepted on the hub first; then pass token=",
            "RevisionNotFoundError": "the hub has no such revision",
        }
        why = reasons.get(kind) or f"{kind}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        raise ModelError(f"{name}{version} cannot be downloaded: {why}") from error


def check_single_file(path: str | os.PathLike[str], config: str | os.PathLike[str] | None) -> Path:
    """Return the path of a safetensors file.

    Raises:
        ModelError: it is another file, or `config` is neither a folder nor a hub id.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidRequest(f"path={short(path)} must be a file", option="path")
    file = Path(path).expanduser()
    refuse_pickle(file)
    if not file.is_file():
        raise ModelError(f"there is no file {file}")
    if file.suffix != ".safetensors":
        raise ModelError(f"{file} is not a .safetensors file")
    if config is not None and not Path(config).is_dir() and not _HUB_ID.fullmatch(str(config)):
        raise ModelError(f"config={str(config)!r} is neither a folder nor a hub id (owner/name)")
    return file


def check_model(folder: Path) -> dict[str, Any]:
    """Check that a folder has the parts of a model that this library loads; return its model_index.json."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise ModelError(f"{folder} is not a model in diffusers' layout: it has no model_index.json")
    index = read_json(path)
    if "text_encoder_2" in index or "transformer" in index:
        kind = index.get("_class_name") or "another pipeline"
        raise ModelError(
            f"{folder} is a {kind}, which is not supported: models with one CLIP text encoder and a UNet are "
            "(Stable Diffusion 1 and 2, sd-turbo)"
        )
    for name in PARTS:
        if not (folder / name).is_dir():
            raise ModelError(f"{folder} is not a model in diffusers' layout: it has no folder {name}/")
    for name in _WEIGHTS:
        if not any((folder / name).glob("*.safetensors")):
            refuse_pickled_model(folder, folder / name)
            raise ModelError(f"{folder / name} has no weights (*.safetensors)")
    return index


@dataclass(frozen=True)
class Parts:
    """What a model, adapter and database given by name have, from their small files alone."""

    folder: Path
    sampling: Sampling
    has_adapter: bool
    database: Path | None
    factor: int
    """Pixels per latent cell, of which an image's sides are multiples."""


def look(
    model: str | os.PathLike[str],
    hub: Hub,
    *,
    adapter: Any = None,
    database: Any = None,
    distilled: bool | None = None,
    vae: str = "full",
) -> Parts:
    """Find and check the parts of a Generator before anything is loaded; the arguments are those of from_pretrained."""
    folder = resolve(model, hub)
    check_model(folder)
    if adapter:
        has_adapter = find_adapter(Path(adapter).expanduser())[0] is not None
    else:
        has_adapter = adapter is None and (folder / ADAPTER).is_file()
    vae_folder = folder / "vae"
    if vae not in VAES:
        vae_folder = _find_vae(vae, replace(hub, revision=None, subfolder=None, variant=None))
    own = folder / DATABASE
    if database is None and own.is_dir():
        database = own
    sampling = Sampling.of(
        BundleInfo.read(folder), read_json(folder / "scheduler" / "scheduler_config.json"), distilled
    )
    opened = None if database is False or database is None else Path(database)
    return Parts(folder, sampling, has_adapter, opened, _factor(read_json(vae_folder / "config.json")))


def _find_vae(vae: str, hub: Hub) -> Path:
    near = difflib.get_close_matches(vae, VAES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    try:
        folder = resolve(vae, hub)
    except ModelError as error:
        raise ModelError(f"vae={vae!r} is neither 'full' nor 'tiny', and no AutoencoderTiny: {error}{hint}") from error
    if not (folder / "config.json").is_file():
        raise ModelError(f"vae={vae!r}: {folder} is not an AutoencoderTiny: it has no config.json")
    return folder


def _factor(config: dict[str, Any]) -> int:
    """Each block of a VAE but the last halves the sides."""
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels") or [0]
    return 2 ** (len(blocks) - 1)


def find_adapter(path: Path) -> tuple[Path | None, Path | None]:
    """Return the adapter's file or folder and the LoRA's folder at `path`; one of them may be None.

    Raises:
        ModelError: there is neither.
    """
    if not path.exists():
        refuse_pickle(path)
        raise ModelError(f"there is no adapter {path}: give a folder with {ADAPTER}, or that file")
    if path.is_file():
        refuse_pickle(path)
        beside = path.parent / LORA
        return path, beside if beside.is_dir() else None
    adapter = path if (path / ADAPTER).is_file() else None
    lora = next((folder for folder in (path / LORA, path) if (folder / _PEFT).is_file()), None)
    if lora is None and (path / LORA).is_dir():
        lora = path / LORA
    if adapter is None and lora is None:
        if (path / _DIFFUSERS_LORA).is_file():
            raise ModelError(
                f"{path} is a LoRA of diffusers. It changes the whole UNet, and with it what a database holds: load it "
                "into a pipeline, pipe.load_lora_weights(…), pipe.fuse_lora(), pipe.unload_lora_weights(), and give "
                "pipe as the model"
            )
        for other in sorted(path.glob("adapter*")):
            refuse_pickle(other)
        raise ModelError(f"{path} holds neither {ADAPTER} nor {LORA}/")
    return adapter, lora


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is not a JSON object")
    return values
