"""The names that the original single-file checkpoints have for the weights of a diffusers folder."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def single_file(folder: Path) -> dict[str, Tensor]:
    """Return the weights of tests/tiny.py's "sd15": one layer in each block, four levels of the VAE."""
    state = {}
    unet = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    attends = {name.split(".")[1] for name in unet if re.match(r"up_blocks\.\d+\.attentions", name)}
    for name, value in unet.items():
        state[f"model.diffusion_model.{unet_name(name, attends)}"] = value
    for name, value in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        flat = "mid_block.attentions" in name and value.ndim == 2
        state[f"first_stage_model.{vae_name(name)}"] = value[:, :, None, None].clone() if flat else value
    for name, value in load_file(folder / "text_encoder/model.safetensors").items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return state


def unet_name(name: str, attends: set[str]) -> str:
    """attends: the numbers of up blocks with attention."""
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs)

    def place(match: re.Match[str]) -> str:
        side, block, kind, layer = match[1], int(match[2] or 0), match[3], int(match[4])
        inner = 0 if kind == "resnets" else 1
        if side == "mid":
            return f"middle_block.{2 * layer if kind == 'resnets' else 1}."
        if kind == "downsamplers":
            return f"input_blocks.{2 * (block + 1)}.0.op."
        if kind == "upsamplers":
            return f"output_blocks.{2 * block + 1}.{1 + (match[2] in attends)}.conv."
        return (
            f"input_blocks.{2 * block + layer + 1}.{inner}."
            if side == "down"
            else (f"output_blocks.{2 * block + layer}.{inner}.")
        )

    new = re.sub(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(?:(?<=samplers\.0\.)conv\.)?", place, name)
    if ".resnets." in name:
        for ours, theirs in RESNET.items():
            new = new.replace(f".{ours}.", f".{theirs}.")
    return new


def vae_name(name: str) -> str:
    new = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
    new = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", new)
    new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", new)
    new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
    if "mid_block.attentions.0" in new:
        for ours, theirs in VAE_ATTENTION.items():
            new = new.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
        new = new.replace("mid_block.attentions.0", "mid.attn_1")
    return new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
