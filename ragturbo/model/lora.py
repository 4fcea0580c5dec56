"""The decoder's LoRA, in peft's own folder format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ragturbo.errors import ModelError
from ragturbo.model.weights import read_safetensors, refuse_pickle, write_safetensors

FOLDER = "decoder_lora"
NAME = "decoder"
WEIGHTS = "adapter_model.safetensors"
# peft's PeftModel writes its weights under its own wrapper's name.
_PREFIX = "base_model.model."


def has_lora(unet: Any) -> bool:
    return NAME in (getattr(unet, "peft_config", None) or {})


def load_lora(unet: Any, folder: str | Path) -> None:
    """Puts the LoRA of `folder` into a diffusers UNet, in place of the one it has. It may touch the decoder only."""
    folder = Path(folder)
    state = {name.removeprefix(_PREFIX): value for name, value in read_safetensors(_weights(folder)).items()}
    if outside := sorted(name for name in state if not name.startswith("up_blocks.")):
        raise ModelError(
            f"{folder} changes more than the decoder ({outside[0]}): cached features would no longer be the model's own"
        )
    peft = _peft()
    remove_lora(unet)
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        peft.inject_adapter_in_model(config, unet, adapter_name=NAME)
        result = peft.set_peft_model_state_dict(unet, state, adapter_name=NAME)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"{folder} does not fit this UNet: {error}") from error
    missing = [name for name in result.missing_keys if f".{NAME}." in name]
    if result.unexpected_keys or missing:
        odd = (result.unexpected_keys or missing)[0]
        raise ModelError(f"{folder} does not fit this UNet: {odd} has no counterpart")
    unet.peft_config = {NAME: config}
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(unet.device, unet.dtype)
            parameter.requires_grad_(False)


def save_lora(unet: Any, folder: str | Path) -> None:
    peft = _peft()
    folder = Path(folder)
    state = peft.get_peft_model_state_dict(unet, adapter_name=NAME)
    write_safetensors(folder / WEIGHTS, {_PREFIX + name: value for name, value in state.items()})
    unet.peft_config[NAME].save_pretrained(str(folder))


def remove_lora(unet: Any) -> None:
    """Puts the base layers back in their places."""
    if has_lora(unet):
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in list(unet.named_modules()):
            if isinstance(module, BaseTunerLayer):
                unet.set_submodule(name, module.get_base_layer())
        # peft warns of a second adapter where it finds even an empty table.
        del unet.peft_config


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.is_file():
        for other in sorted(folder.glob("adapter_model.*")):
            refuse_pickle(other)
        raise ModelError(f"{folder} is no LoRA folder: {WEIGHTS} is not there")
    return path


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError("a decoder LoRA needs peft: pip install 'ragturbo[train]'") from error
    return peft
