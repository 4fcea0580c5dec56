"""Networks of torch alone compute the bits of diffusers' and transformers', or are left to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ragturbo.model.bundle import Bundle
from ragturbo.model.networks import autoencoder, autoencoder_tiny, clip_text, unet
from ragturbo.model.networks.load import load_network
from ragturbo.model.unet import HSpaceUNet

# Half precision is not compared where the CPU has no kernel that is the same in every build.
DTYPES = [torch.float32, torch.bfloat16]


def config_of(network: Any) -> dict[str, Any]:
    config = {**network.config}
    # diffusers keeps an unordered list.
    config["_use_default_values"] = sorted(config.get("_use_default_values", ()))
    # From a file a sequence is a list, from a class's defaults a tuple.
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    return {**config, "_name_or_path": str(config.get("_name_or_path"))}


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_unet_computes_the_bits_of_diffusers(model: Path, pair: Any, dtype: torch.dtype) -> None:
    ours, theirs = pair(model, "unet", dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and config_of(ours) == config_of(theirs)
    text = torch.randn(2, 9, ours.config.cross_attention_dim, dtype=dtype)
    # 17 and 22 do not halve evenly: upsampling takes the skips' sizes.
    for height, width in ((16, 16), (17, 22), (8, 32)):
        sample = torch.randn(2, 4, height, width, dtype=dtype)
        for timestep in (999, torch.tensor(1), torch.tensor([3, 400]), 12.5):
            assert torch.equal(ours(sample, timestep, text).sample, theirs(sample, timestep, text).sample)
    assert torch.equal(ours(sample, 1, text, return_dict=False)[0], theirs(sample, 1, text, return_dict=False)[0])


@torch.no_grad()
def test_masks_are_those_of_diffusers(model: Path, pair: Any) -> None:
    ours, theirs = map(HSpaceUNet, pair(model, "unet"))
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 9, ours.text_width)
    mask = torch.ones(2, 9)
    mask[0, 4:] = 0
    runs = [one.encode(sample, 5, text, encoder_attention_mask=mask).h for one in (ours, theirs)]
    assert torch.equal(*runs) and not torch.equal(runs[0], ours.encode(sample, 5, text).h)
    assert type(ours.unet).__module__.startswith("ragturbo.")


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_an_autoencoder_computes_the_bits_of_diffusers(model: Path, pair: Any, dtype: torch.dtype) -> None:
    ours, theirs = pair(model, "vae", dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and config_of(ours) == config_of(theirs)
    images, latents = torch.randn(2, 3, 64, 32, dtype=dtype), torch.randn(2, 4, 8, 9, dtype=dtype)
    posterior, expected = ours.encode(images).latent_dist, theirs.encode(images).latent_dist
    assert torch.equal(posterior.mean, expected.mean) and torch.equal(posterior.mode(), expected.mode())
    assert torch.equal(ours.decode(latents).sample, theirs.decode(latents).sample)
    assert torch.equal(ours.decode(latents, return_dict=False)[0], theirs.decode(latents, return_dict=False)[0])
    # What this library does not use is diffusers' own.
    assert torch.equal(posterior.std, expected.std) and torch.equal(posterior.kl(), expected.kl())


@torch.no_grad()
def test_a_tiny_autoencoder_computes_the_bits_of_diffusers(tiny: ModuleType, tmp_path: Path) -> None:
    theirs = tiny.tiny_vae()
    theirs.save_pretrained(tmp_path)
    ours = load_network("AutoencoderTiny", tmp_path, None, torch.float32)
    assert isinstance(ours, autoencoder_tiny.AutoencoderTiny) and list(ours.state_dict()) == list(theirs.state_dict())
    assert {**config_of(ours), "_use_default_values": 0, "_name_or_path": 0} == {
        **config_of(theirs), "_use_default_values": 0, "_name_or_path": 0,
        "_class_name": "AutoencoderTiny", "_diffusers_version": ours.config["_diffusers_version"],
    }  # fmt: skip
    images, latents = torch.randn(2, 3, 64, 32), torch.randn(2, 4, 8, 9)
    assert torch.equal(ours.encode(images).latents, theirs.encode(images).latents)
    assert torch.equal(ours.decode(latents).sample, theirs.decode(latents).sample)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_text_encoder_computes_the_bits_of_transformers(model: Path, pair: Any, dtype: torch.dtype) -> None:
    ours, theirs = pair(model, "text_encoder", dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    named = theirs.config.to_dict()
    assert all(named[name] == ours.config[name] for name in clip_text.OPTIONS.free)
    ids = torch.randint(ours.config.vocab_size, (3, 16))
    ids[:, 5] = ours.config.eos_token_id
    for old in (False, True):
        if old:
            # Old configurations name 2, and the highest id ends the text.
            ours.eos_token_id = theirs.eos_token_id = 2
        out, expected = ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True)
        assert torch.equal(out.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(out.pooler_output, expected.pooler_output)
        assert len(out.hidden_states) == len(expected.hidden_states)
        assert all(map(torch.equal, out.hidden_states, expected.hidden_states))
        assert torch.equal(out[0], expected[0]) and ours(ids).hidden_states is None


def test_weights_are_views_of_the_file_and_need_no_gradients(models: dict[str, Path]) -> None:
    folder = models["sd21"] / "unet"
    network = load_network("UNet2DConditionModel", folder, None, torch.float32)
    assert network is not None and not network.training
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, state[name]) and not parameter.requires_grad
    places = [parameter.data_ptr() for parameter in network.parameters()]
    assert max(places) - min(places) < (folder / "diffusion_pytorch_model.safetensors").stat().st_size
    # The mapping is private: what is written to the weights does not reach the file.
    with torch.no_grad():
        network.get_parameter("conv_out.bias").fill_(7.0)
    assert torch.equal(
        load_file(folder / "diffusion_pytorch_model.safetensors")["conv_out.bias"], state["conv_out.bias"]
    )


UNET, VAE, TEXT = "UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel"
# Options of each class that are not implemented here, with a value other than the default.
OTHER: dict[str, dict[str, Any]] = {
    UNET: {
        "mid_block_type": "UNetMidBlock2D", "only_cross_attention": True, "dropout": 0.1, "encoder_hid_dim": 8,
        "encoder_hid_dim_type": "text_proj", "num_attention_heads": 8, "dual_cross_attention": True,
        "class_embed_type": "timestep", "addition_embed_type": "text", "addition_time_embed_dim": 8,
        "num_class_embeds": 3, "resnet_time_scale_shift": "scale_shift", "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 2.0, "time_embedding_type": "fourier", "time_embedding_dim": 64,
        "time_embedding_act_fn": "silu", "timestep_post_act": "silu", "time_cond_proj_dim": 8, "conv_in_kernel": 1,
        "conv_out_kernel": 1, "projection_class_embeddings_input_dim": 8, "attention_type": "gated",
        "class_embeddings_concat": True, "mid_block_only_cross_attention": True, "cross_attention_norm": "layer_norm",
        "reverse_transformer_layers_per_block": [1], "act_fn": "tanh", "norm_num_groups": None,
        "down_block_types": ["AttnDownBlock2D"] * 4, "up_block_types": ["AttnUpBlock2D"] * 4, "new_option": 0,
        "_new_note": 0,
        "block_out_channels": [32, 32], "attention_head_dim": [2, 2],
    },
    VAE: {
        "down_block_types": ["AttnDownEncoderBlock2D"] * 4, "up_block_types": ["AttnUpDecoderBlock2D"] * 4,
        "act_fn": "tanh", "new_option": None, "layers_per_block": None,
    },
    TEXT: {
        "attention_dropout": 0.1, "hidden_act": "relu", "model_type": "clip", "use_attention_mask": False,
        "num_attention_heads": None, "eos_token_id": [1, 2], "output_hidden_states": True,
    },
}  # fmt: skip
FOLDERS = {UNET: "unet", VAE: "vae", TEXT: "text_encoder"}


@pytest.mark.parametrize("kind, option", [(kind, option) for kind, options in OTHER.items() for option in options])
def test_an_option_that_is_not_implemented_is_left_to_the_library(
    models: dict[str, Path], tmp_path: Path, kind: str, option: str
) -> None:
    folder = Path(shutil.copytree(models["sd21"] / FOLDERS[kind], tmp_path / "part"))
    assert load_network(kind, folder, None, torch.float32) is not None
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, option: OTHER[kind][option]}))
    assert load_network(kind, folder, None, torch.float32) is None


def test_every_option_of_the_libraries_is_known() -> None:
    import inspect

    import diffusers
    from transformers import CLIPTextConfig

    for module, kind in ((unet, UNET), (autoencoder, VAE), (autoencoder_tiny, "AutoencoderTiny")):
        theirs = {
            name: parameter.default
            for name, parameter in inspect.signature(getattr(diffusers, kind).__init__).parameters.items()
            if name != "self"
        }
        assert {**module.OPTIONS.free, **module.OPTIONS.fixed} == theirs
    config = CLIPTextConfig()
    for name, value in {**clip_text.OPTIONS.free, **clip_text.OPTIONS.fixed}.items():
        assert getattr(config, name) == value


def test_other_weights_are_left_to_the_library(models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["sd21"] / "unet", tmp_path / "unet"))
    file = folder / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    first = next(iter(whole))

    def loaded(state: dict[str, torch.Tensor]) -> bool:
        save_file(state, file, metadata={"format": "pt"})
        return load_network(UNET, folder, None, torch.float32) is not None

    assert not loaded({name: value for name, value in whole.items() if name != first})
    assert not loaded({**whole, "more": torch.zeros(1)})
    assert not loaded({**whole, first: torch.zeros(3)})
    assert not loaded({**whole, first: whole[first].int()})
    assert loaded(whole)


@torch.no_grad()
def test_old_names_of_weights_are_known(models: dict[str, Path], pair: Any, tmp_path: Path) -> None:
    """Those of SD 1's and 2's own files: an autoencoder's attention, and the prefix of a text encoder."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part, kind in (("vae", VAE), ("text_encoder", TEXT)):
        folder = Path(shutil.copytree(models["sd21"] / part, tmp_path / part))
        file = next(folder.glob("*.safetensors"))
        state = load_file(file)
        if part == "vae":
            for new, name in old.items():
                state = {
                    key.replace(f".attentions.0.{new}.", f".attentions.0.{name}."): value
                    for key, value in state.items()
                }
            assert any(".proj_attn." in name for name in state)
        else:
            state = {f"text_model.{name}": value for name, value in state.items()}
            state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        save_file(state, file, metadata={"format": "pt"})
        again = load_network(kind, folder, None, torch.float32)
        assert again is not None
        now, before = again.state_dict(), pair(models["sd21"], part)[0].state_dict()
        assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


@pytest.mark.parametrize("name", ["sd15", "sd21", "shapes"])
def test_a_bundle_has_the_librarys_fingerprints(models: dict[str, Path], pair: Any, name: str) -> None:
    from ragturbo.model.bundle import fingerprints

    folder = models[name]
    bundle = Bundle.load(folder, device="cpu", adapter=False)
    dtype = torch.float16 if name == "shapes" else torch.float32
    theirs = {part: pair(folder, part, dtype)[1] for part in ("text_encoder", "unet", "vae")}
    assert bundle.fingerprint() == fingerprints(theirs["text_encoder"], theirs["unet"], theirs["vae"])
    for module in (bundle.text.text_encoder, bundle.unet.unet, bundle.vae.module):
        assert type(module).__module__.startswith("ragturbo.")
