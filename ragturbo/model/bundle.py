"""A bundle: all parts of a model that from_pretrained reads and train writes, on one device."""

from __future__ import annotations

import copy
import json
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.messages import short
from ragturbo.model import clip_key as clip_key_file
from ragturbo.model import lora, source
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.clip_key import ClipKey
from ragturbo.model.find import ADAPTER, DATABASE, LORA, PARTS, TEACHER, Hub, check_model, find_adapter, resolve
from ragturbo.model.fingerprint import UNET_ENCODER, VAE_ENCODER, base_state, fingerprint
from ragturbo.model.info import BundleInfo, Sampling
from ragturbo.model.networks.euler import EulerDiscreteScheduler, become_diffusers_scheduler
from ragturbo.model.networks.library_class import become_library_class, library_copy
from ragturbo.model.one_thread import on_one_thread
from ragturbo.model.text import TextEncoder
from ragturbo.model.unet import HSpaceUNet
from ragturbo.model.vae import VAE
from ragturbo.model.weights import write_safetensors

log = logging.getLogger("ragturbo")


@dataclass
class Bundle:
    """The parts of a model. Loaded modules are in eval mode and need no gradients."""

    name: str
    info: BundleInfo
    text: TextEncoder
    unet: HSpaceUNet
    vae: VAE
    scheduler: Any
    adapter: HSpaceAdapter | None = None
    teacher: Any = None
    """The undistilled UNet that the student was distilled from; loaded on request."""
    database_path: Path | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of text encoder, UNet encoder, VAE encoder and CLIP key: a database must have been built with the same."""
    sampling: Sampling = None  # type: ignore[assignment]  # set in __post_init__
    """Made from `info` and the scheduler if it is not given."""

    def __post_init__(self) -> None:
        text = self.text
        if self.sampling is None:
            self.sampling = Sampling.of(self.info, _facts(self.scheduler))
        if not self.fingerprints:
            self.fingerprints = fingerprints(text.text_encoder, self.unet.unet, self.vae.module, text.clip_key)
        _check_widths(self)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def default_size(self) -> int:
        """The side in pixels of the images that the UNet was trained for."""
        size = self.unet.unet.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.vae.factor

    @property
    def has_lora(self) -> bool:
        return lora.has_lora(self.unet.unet)

    def fingerprint(self) -> dict[str, str]:
        return dict(self.fingerprints)

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        vae: str = "full",
        adapter: str | os.PathLike[str] | Literal[False] | None = None,
        teacher: bool = False,
        distilled: bool | None = None,
        scheduler: Any = None,
        local_files_only: bool = False,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
        folder: Path | None = None,
    ) -> Bundle:
        """Load a bundle, or a plain diffusers folder of Stable Diffusion's layout.

        Args:
            name: "shapes" (the embedded model), a folder or a hub id.
            device, dtype: by default fp16 on a GPU if there is one, fp32 on the CPU otherwise.
            vae: "full", "tiny", or a folder or hub id of an AutoencoderTiny.
            adapter: a folder or file, None for the bundle's own, False for neither adapter nor decoder LoRA.
            teacher: also load teacher_unet/.
            distilled: whether the model is; None: as ragturbo.json says, else by its scheduler.
            scheduler: one of diffusers, instead of the model's.
            local_files_only, revision, cache_dir, token: as in huggingface_hub.snapshot_download.
            subfolder, variant: as in diffusers.
            folder: of the model, where `look` has found it already.

        Raises:
            ModelError: there is no such model, or its parts cannot be used together.
        """
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float16 if where.type == "cuda" else torch.float32)
        hub = Hub(local_files_only, revision, cache_dir, token, subfolder, variant)
        folder = resolve(name, hub) if folder is None else folder
        check_model(folder)

        text_encoder, tokenizer = source.load_text_encoder(folder, variant), source.load_tokenizer(folder)
        unet, vae_module = source.load_unet(folder, "unet", variant), source.load_vae(folder, vae, hub)
        clip_key = ClipKey.load(folder) if (folder / clip_key_file.FILE).is_file() else None
        own, info = source.load_scheduler(folder), BundleInfo.read(folder)
        # What the model is follows from its own scheduler, also where another one samples.
        sampling = Sampling.of(info, _facts(own), distilled)
        scheduler = own if scheduler is None else _checked_scheduler(scheduler)
        if info is None:
            info = BundleInfo(
                sampling.distilled, key_kind="pooled" if clip_key is None else "clip", base_model=str(name)
            )
        info = replace(info, distilled=sampling.distilled)
        if info.key_kind == "clip" and clip_key is None:
            raise ModelError(f'the key of {folder} is "clip", but it has no {clip_key_file.FILE}')
        clip_key = clip_key if info.key_kind == "clip" else None
        teacher_unet = source.load_unet(folder, TEACHER) if teacher else None
        own = folder if (folder / ADAPTER).is_file() or (folder / LORA).is_dir() else None
        chosen = own if adapter is None else adapter

        def place(module: Any) -> Any:
            # Not module.to: that of diffusers warns about its empty list of fp32 modules.
            return nn.Module.to(module, where, dtype).requires_grad_(False).eval()

        def assemble() -> Bundle:
            # Before the weights are cast.
            names = fingerprints(text_encoder, unet, vae_module, clip_key, own_vae=vae == "full")
            bundle = cls(
                # Of a subfolder, the name alone would not be found again.
                name=str(name if subfolder is None else folder),
                info=info,
                text=TextEncoder(tokenizer, place(text_encoder), None if clip_key is None else place(clip_key)),
                unet=HSpaceUNet(place(unet)),
                vae=VAE(place(vae_module)),
                scheduler=scheduler,
                teacher=None if teacher_unet is None else place(teacher_unet),
                database_path=folder / DATABASE if (folder / DATABASE).is_dir() else None,
                fingerprints=names,
                sampling=sampling,
            )
            if chosen:
                bundle.load_adapter(chosen)
            return bundle

        return on_one_thread(assemble, where, [text_encoder, unet, vae_module])

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter: str | os.PathLike[str] | Literal[False] | None = None,
        distilled: bool | None = None,
        scheduler: Any = None,
    ) -> Bundle:
        """Use the modules of a loaded StableDiffusionPipeline.

        They are not copied: they are moved, set to eval mode and take no gradients from then on.

        Args:
            device, dtype: what the modules are moved to; None: where and as they are.

        Raises:
            ModelError: it is another kind of pipeline, is offloaded, or has a LoRA that is not fused. It is unchanged.
        """
        check_pipeline(pipeline)
        unet = pipeline.unet
        if adapter:
            find_adapter(Path(adapter).expanduser())
        where = torch.device(device or unet.device)
        precision = dtype or unet.dtype
        sampling = Sampling.of(None, _facts(pipeline.scheduler), distilled)
        scheduler = pipeline.scheduler if scheduler is None else _checked_scheduler(scheduler)
        name = str(getattr(pipeline.config, "_name_or_path", "") or type(pipeline).__name__)
        if getattr(pipeline, "safety_checker", None) is not None:
            log.warning("the safety checker of %s is not used; postprocess= of a call is the place for one", name)
        # That of another Generator over the same pipeline.
        lora.remove_lora(unet)
        # Before the weights are cast: a database may have been built from the folder's own.
        names = fingerprints(pipeline.text_encoder, unet, pipeline.vae)
        for module in (pipeline.text_encoder, unet, pipeline.vae):
            nn.Module.to(module, where, precision).requires_grad_(False).eval()
        bundle = cls(
            name=name,
            info=BundleInfo(sampling.distilled, base_model=name),
            text=TextEncoder(pipeline.tokenizer, pipeline.text_encoder, None),
            unet=HSpaceUNet(unet),
            vae=VAE(pipeline.vae),
            scheduler=scheduler,
            fingerprints=names,
            sampling=sampling,
        )
        if adapter:
            bundle.load_adapter(adapter)
        return bundle

    def load_adapter(self, path: str | os.PathLike[str]) -> None:
        """Replace adapter and decoder LoRA by those of a folder, which may lack one of them, or by an adapter file.
        A folder of peft with a LoRA of the decoder is one, too."""
        path = Path(path).expanduser()
        adapter, lora_folder = find_adapter(path)
        # The adapter is loaded first, so that one that does not fit leaves the LoRA unchanged.
        new = None if adapter is None else HSpaceAdapter.load(adapter, self.unet.channels)
        if lora_folder is not None:
            lora.load_lora(self.unet.unet, lora_folder)
        else:
            lora.remove_lora(self.unet.unet)
        self.adapter = None if new is None else new.to(self.device, self.dtype).requires_grad_(False).eval()

    def to_diffusers(self) -> Bundle:
        """Change networks and scheduler, in place, into diffusers' and transformers' classes, with the same tensors.

        Those of `networks` do so by themselves if they are asked for a method that they lack, such as enable_freeu.
        """
        for network in (self.text.text_encoder, self.unet.unet, self.vae.module, self.teacher):
            if network is not None:
                become_library_class(network)
        become_diffusers_scheduler(self.scheduler)
        return self

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the diffusers layout and, last, ragturbo.json. A database is not copied."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.text.tokenizer.save_pretrained(folder / "tokenizer")
        with source.quiet():
            library_copy(self.text.text_encoder).save_pretrained(folder / "text_encoder", safe_serialization=True)
        _save_diffusers(self.unet.unet, folder / "unet")
        _save_diffusers(self.vae.module, folder / "vae")
        copy.deepcopy(self.scheduler).save_pretrained(folder / "scheduler")
        if self.teacher is not None:
            _save_diffusers(self.teacher, folder / TEACHER)
        if self.text.clip_key is not None:
            self.text.clip_key.save(folder)
        if self.adapter is not None:
            self.adapter.save(folder)
        if self.has_lora:
            lora.save_lora(self.unet.unet, folder / LORA)
        (folder / "model_index.json").write_text(json.dumps(_model_index(self), indent=2) + "\n", "utf-8")
        kind = None if self.adapter is None else self.adapter.kind
        replace(self.info, adapter_kind=kind, key_kind=self.text.key_kind).write(folder)
        return folder


def fingerprints(
    text_encoder: Any, unet: Any, vae: Any, clip_key: ClipKey | None = None, *, own_vae: bool = True
) -> dict[str, str]:
    """By part. own_vae: False if the VAE is not the model's own: then "vae_encoder" is missing, which only building a
    database needs."""
    names = {
        "text_encoder": fingerprint(text_encoder),
        "unet_encoder": fingerprint(unet, UNET_ENCODER),
        "vae_encoder" if own_vae else "substitute_vae_encoder": fingerprint(vae, VAE_ENCODER),
    }
    return names if clip_key is None else {**names, "clip_key": fingerprint(clip_key)}


def _check_widths(bundle: Bundle) -> None:
    config = bundle.unet.unet.config
    if bundle.text.width != bundle.unet.text_width:
        raise ModelError(f"the text encoder is {bundle.text.width} wide, the UNet takes {bundle.unet.text_width}")
    if bundle.vae.channels != config.in_channels:
        raise ModelError(f"the VAE's latents have {bundle.vae.channels} channels, the UNet takes {config.in_channels}")
    if config.addition_embed_type not in (None, "text") or config.class_embed_type or config.num_class_embeds:
        raise ModelError(
            "a bundle has no parts for this UNet's conditions besides the prompt (as of SDXL); use HSpaceUNet and "
            "HSpaceAdapter directly"
        )
    if bundle.adapter is not None and bundle.adapter.channels != bundle.unet.channels:
        raise ModelError(f"the adapter is {bundle.adapter.channels} wide, the UNet's H-space {bundle.unet.channels}")


def check_pipeline(pipeline: Any) -> None:
    """Raise ModelError unless `pipeline` is a StableDiffusionPipeline whose modules can be used."""
    kind = type(pipeline).__name__
    missing = [name for name in PARTS if getattr(pipeline, name, None) is None]
    if missing or hasattr(pipeline, "text_encoder_2") or hasattr(pipeline, "controlnet"):
        raise ModelError(
            f"a {kind} cannot be used as a model: it takes one of diffusers with one text encoder and a UNet, such as "
            "StableDiffusionPipeline"
        )
    for name in ("text_encoder", "unet", "vae"):
        module = getattr(pipeline, name)
        if hasattr(module, "_hf_hook") or any(parameter.is_meta for parameter in module.parameters()):
            raise ModelError(
                f"the {name} of this {kind} is offloaded to the CPU. Load it without enable_model_cpu_offload() or "
                "enable_sequential_cpu_offload(): Stable Diffusion 1 and 2 need about 2.6 GB in float16"
            )
        if getattr(module, "peft_config", None):
            raise ModelError(
                f"the {name} of this {kind} has a LoRA beside its weights. Fuse it first: pipe.fuse_lora(), then "
                "pipe.unload_lora_weights()"
            )


def _facts(scheduler: Any) -> dict[str, Any]:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def _checked_scheduler(scheduler: Any) -> Any:
    if isinstance(scheduler, EulerDiscreteScheduler):
        return scheduler
    from diffusers import SchedulerMixin

    if not isinstance(scheduler, SchedulerMixin):
        raise InvalidRequest(
            f"scheduler={short(scheduler)} must be a scheduler of diffusers, such as "
            "DPMSolverMultistepScheduler.from_config(…)",
            option="scheduler",
        )
    return scheduler


def _model_index(bundle: Bundle) -> dict[str, Any]:
    """model_index.json, with which StableDiffusionPipeline.from_pretrained loads the bundle without its adapter."""
    import diffusers

    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(bundle.scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", type(bundle.text.tokenizer).__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(bundle.vae.module).__name__],
    }


def _save_diffusers(module: Any, folder: Path) -> None:
    """save_pretrained without the LoRA: the base weights under their original names."""
    library_copy(module).save_config(folder)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", base_state(module))
