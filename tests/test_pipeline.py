"""A loaded diffusers pipeline as the model, and what diffusers' users expect to find on a Generator."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from ragturbo import Generator
from ragturbo.errors import InvalidRequest, ModelError

PROMPT = "a red circle"


def pipeline(folder: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_lora(pipe: Any, rank: int = 2) -> Any:
    """Add a LoRA to every attention of the UNet, as load_lora_weights does."""
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=rank, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return pipe


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_a_loaded_pipeline_is_a_model_and_draws_what_its_folder_draws(tiny_sd21: Path):
    pipe = pipeline(tiny_sd21)
    with Generator.from_pretrained(pipe) as gen, Generator.from_pretrained(tiny_sd21, device="cpu") as folder:
        assert gen.bundle.unet.unet is pipe.unet and gen.info["distilled"] and gen.info["device"] == "cpu"
        assert np.array_equal(pixels(gen(PROMPT, seed=3).images), pixels(folder(PROMPT, seed=3).images))
        assert gen.bundle.fingerprint() == folder.bundle.fingerprint()


def test_a_fused_lora_of_a_pipeline_is_drawn_with(tiny_sd21: Path):
    pipe = with_lora(pipeline(tiny_sd21))
    with pytest.raises(ModelError, match=re.escape("pipe.fuse_lora()")):
        Generator.from_pretrained(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with Generator.from_pretrained(pipe) as gen, Generator.from_pretrained(tiny_sd21, device="cpu") as plain:
        ours = gen(PROMPT, seed=3)
        generator = torch.Generator().manual_seed(3)
        theirs = pipe(PROMPT, num_inference_steps=1, guidance_scale=0.0, generator=generator).images
        assert abs(pixels(ours.images) - pixels(theirs)).max() <= 1
        assert abs(pixels(ours.images) - pixels(plain(PROMPT, seed=3).images)).max() > 1
        # A database of the model without the LoRA does not fit.
        assert gen.bundle.fingerprint()["unet_encoder"] != plain.bundle.fingerprint()["unet_encoder"]


def test_a_pipeline_that_is_not_one_of_stable_diffusion_is_refused():
    from types import SimpleNamespace

    with pytest.raises(ModelError, match="SimpleNamespace cannot be used as a model"):
        Generator.from_pretrained(SimpleNamespace(unet=object()))


def test_an_offloaded_pipeline_is_refused_with_the_reason(tiny_sd21: Path):
    pipe = pipeline(tiny_sd21)
    pipe.vae.to("meta")
    with pytest.raises(ModelError, match="vae .* is offloaded to the CPU"):
        Generator.from_pretrained(pipe)


def test_an_undistilled_model_takes_its_own_scheduler_fifty_steps_and_guidance(tiny: ModuleType, tmp_path: Path):
    folder = tiny.make_bundle(tmp_path / "sd15", "sd15")
    with Generator.from_pretrained(folder, device="cpu") as gen:
        info = gen.info
        assert (info["distilled"], info["num_inference_steps"], info["guidance_scale"]) == (False, 50, 7.5)
        assert "50 steps" in repr(gen)
        ours = gen(PROMPT, seed=3, num_inference_steps=3)
    pipe = pipeline(folder)
    theirs = pipe(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(3)).images
    assert abs(pixels(ours.images) - pixels(theirs)).max() <= 1


def test_what_a_folder_does_not_say_can_be_said(tiny_sd21: Path):
    with Generator.from_pretrained(tiny_sd21, device="cpu", distilled=False) as gen:
        assert gen.info["num_inference_steps"] == 50
        assert len(gen(PROMPT, num_inference_steps=6, guidance_scale=2.0).images) == 1
    with Generator.from_pretrained(tiny_sd21, device="cpu") as gen:
        with pytest.raises(
            InvalidRequest, match="timesteps are trailing, and it has no ragturbo.json; distilled=False"
        ):
            gen(PROMPT, num_inference_steps=6)
    with pytest.raises(InvalidRequest, match="distilled='no'"):
        Generator.from_pretrained(tiny_sd21, distilled="no")  # type: ignore[arg-type]


def test_another_scheduler_of_diffusers_takes_the_place_of_the_models(tiny_sd21: Path):
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with Generator.from_pretrained(tiny_sd21, device="cpu", scheduler=scheduler, distilled=False) as gen:
        ours = gen(PROMPT, seed=3, num_inference_steps=3, guidance_scale=0)
    pipe = pipeline(tiny_sd21)
    pipe.scheduler = scheduler
    generator = torch.Generator().manual_seed(3)
    theirs = pipe(PROMPT, num_inference_steps=3, guidance_scale=0.0, generator=generator).images
    assert abs(pixels(ours.images) - pixels(theirs)).max() <= 1
    with pytest.raises(InvalidRequest, match="must be a scheduler of diffusers"):
        Generator.from_pretrained(tiny_sd21, scheduler="ddim")  # type: ignore[arg-type]


def test_a_variant_and_a_subfolder_are_found_as_in_diffusers(tiny_sd21: Path, tmp_path: Path):
    import shutil

    shutil.copytree(tiny_sd21, tmp_path / "models" / "inner")
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        weights = tmp_path / "models" / "inner" / f"{name}.safetensors"
        shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    with Generator.from_pretrained(tmp_path / "models", subfolder="inner", variant="fp16", device="cpu") as gen:
        assert gen(PROMPT, seed=1).mode == "none"
    with pytest.raises(ModelError, match="no folder 'outer'"):
        Generator.from_pretrained(tmp_path / "models", subfolder="outer")
    with pytest.raises(InvalidRequest, match="no weights of variant='bf16'"):
        Generator.from_pretrained(tmp_path / "models", subfolder="inner", variant="bf16", device="cpu")


def test_a_single_file_of_the_original_layout_draws_what_its_folder_draws(tiny, single_file, tmp_path: Path):
    from safetensors.torch import save_file

    folder = tiny.make_bundle(tmp_path / "sd15", "sd15")
    file = tmp_path / "one.safetensors"
    save_file(single_file(folder), file)
    sampling = {"seed": 3, "num_inference_steps": 2}
    with Generator.from_single_file(file, config=folder, local_files_only=True, device="cpu") as gen:
        with Generator.from_pretrained(folder, device="cpu") as plain:
            assert np.array_equal(pixels(gen(PROMPT, **sampling).images), pixels(plain(PROMPT, **sampling).images))
        assert gen.info["model"] == str(file)
    with pytest.raises(ModelError, match="there is no file"):
        Generator.from_single_file(tmp_path / "none.safetensors")
    # Before the file is read.
    for name, says in (
        ("torch_dtype", "here it is dtype"),
        ("databse", "did you mean database"),
        ("seed", "no argument"),
    ):
        with pytest.raises(TypeError, match=says):
            Generator.from_single_file(tmp_path / "none.safetensors", **{name: 1})
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        Generator.from_single_file(file, config="./nowhere")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="bad.safetensors cannot be loaded by diffusers"):
        Generator.from_single_file(tmp_path / "bad.safetensors", config=folder, local_files_only=True)


def test_encode_prompt_gives_the_embeddings_that_a_call_takes(tiny_sd21: Path):
    with Generator.from_pretrained(tiny_sd21, device="cpu") as gen:
        embeds = gen.encode_prompt([PROMPT, "a dog"])
        assert embeds.shape[0] == 2 and embeds.device.type == "cpu"
        direct = gen([PROMPT, "a dog"], seed=5)
        assert np.array_equal(pixels(gen(prompt_embeds=embeds, seed=5).images), pixels(direct.images))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("to", "device= and dtype="),
        ("load_lora_weights", "pipe.fuse_lora()"),
        ("enable_model_cpu_offload", "kept on one device"),
        ("unet", "bundle.unet.unet"),
    ],
)
def test_a_method_of_pipelines_says_what_takes_its_place(tiny_sd21: Path, name: str, words: str):
    with Generator.from_pretrained(tiny_sd21, device="cpu") as gen:
        with pytest.raises(AttributeError, match=re.escape(words)):
            getattr(gen, name)
        assert not hasattr(gen, "nothing_of_this_name")


def test_a_lora_of_diffusers_or_peft_as_adapter_is_loaded_or_told_the_way(tiny_sd21: Path, tmp_path: Path):
    from peft.utils import get_peft_model_state_dict

    pipe = with_lora(pipeline(tiny_sd21))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "diffusers", unet_lora_layers=get_peft_model_state_dict(pipe.unet)
    )
    with pytest.raises(ModelError, match=r"is a LoRA of diffusers.*pipe.load_lora_weights"):
        Generator.from_pretrained(tiny_sd21, adapter=tmp_path / "diffusers", device="cpu")


def test_what_is_printed_is_short_and_says_what_matters(tiny_sd21: Path):
    with Generator.from_pretrained(tiny_sd21, device="cpu") as gen:
        assert re.fullmatch(
            r"Generator\('.*sd21', cpu float32, engine 'graph', no database, mode 'none', 1 step, 128x128\)",
            repr(gen),
        )
        one, two = gen(PROMPT, seed=3), gen([PROMPT, PROMPT], seed=3, output_type="np")
    assert re.fullmatch(r"Output\(1 image of 128x128, mode 'none', seed 3, \d+\.\d ms\)", repr(one))
    assert re.fullmatch(
        r"Output\(2 images as ndarray \(2, 128, 128, 3\), mode 'none', seed 3, 3, \d+\.\d ms\)", repr(two)
    )
    assert repr(gen).endswith(", closed)")


def decoder_lora(folder: Path, out: Path) -> Path:
    """A decoder LoRA, as train exports one."""
    from peft import LoraConfig

    from ragturbo.model import lora
    from ragturbo.model.bundle import Bundle

    unet = Bundle.load(folder, device="cpu").unet.unet
    unet.add_adapter(
        LoraConfig(r=2, target_modules=r"up_blocks\..*\.to_q", init_lora_weights=False), adapter_name=lora.NAME
    )
    lora.save_lora(unet, out / lora.FOLDER)
    return out


def test_a_decoder_lora_of_one_generator_is_not_left_in_the_pipeline(tiny_sd21: Path, tmp_path: Path):
    adapter, pipe = decoder_lora(tiny_sd21, tmp_path / "adapter"), pipeline(tiny_sd21)
    with Generator.from_pretrained(pipe) as gen:
        plain = pixels(gen(PROMPT, seed=3).images)
    with Generator.from_pretrained(pipe, adapter=adapter) as gen:
        assert gen.info["decoder_lora"] and abs(pixels(gen(PROMPT, seed=3).images) - plain).max() > 0
    with Generator.from_pretrained(pipe, adapter=False) as gen:
        assert not gen.info["decoder_lora"] and np.array_equal(pixels(gen(PROMPT, seed=3).images), plain)


def test_a_peft_folder_with_a_lora_of_the_decoder_is_an_adapter(tiny_sd21: Path, tmp_path: Path):
    adapter = decoder_lora(tiny_sd21, tmp_path / "adapter")
    with Generator.from_pretrained(tiny_sd21, adapter=adapter, device="cpu") as gen:
        ours = pixels(gen(PROMPT, seed=3).images)
    with Generator.from_pretrained(tiny_sd21, adapter=adapter / "decoder_lora", device="cpu") as gen:
        assert gen.info["decoder_lora"] and np.array_equal(pixels(gen(PROMPT, seed=3).images), ours)
    with_lora(pipe := pipeline(tiny_sd21)).unet.save_lora_adapter(
        tmp_path / "whole", weight_name="adapter_model.safetensors"
    )
    del pipe
    config = (adapter / "decoder_lora" / "adapter_config.json").read_text()
    (tmp_path / "whole" / "adapter_config.json").write_text(config)
    with pytest.raises(ModelError, match="changes more than the decoder .*pipe.fuse_lora"):
        Generator.from_pretrained(tiny_sd21, adapter=tmp_path / "whole", device="cpu")


def test_an_error_leaves_the_callers_pipeline_as_it_was(tiny_sd21: Path):
    pipe = pipeline(tiny_sd21)
    for options in ({"adapter": "nowhere"}, {"scheduler": 3}, {"distilled": 3}):
        with pytest.raises((ModelError, InvalidRequest)):
            Generator.from_pretrained(pipe, dtype="float16", **options)
        assert pipe.unet.dtype == torch.float32 and all(p.requires_grad for p in pipe.unet.parameters())


def test_a_pipeline_in_bfloat16_fits_the_database_of_its_folder(tiny_sd21: Path):
    with Generator.from_pretrained(pipeline(tiny_sd21), dtype="bfloat16") as gen:
        with Generator.from_pretrained(tiny_sd21, device="cpu") as folder:
            assert gen.info["dtype"] == "bfloat16" and gen.bundle.fingerprint() == folder.bundle.fingerprint()


def test_a_pipeline_with_a_controlnet_or_a_hook_is_refused(tiny_sd21: Path):
    pipe = pipeline(tiny_sd21)
    pipe.controlnet = object()
    with pytest.raises(ModelError, match="cannot be used as a model"):
        Generator.from_pretrained(pipe)
    pipe = pipeline(tiny_sd21)
    pipe.unet._hf_hook = object()
    with pytest.raises(ModelError, match="unet .* is offloaded"):
        Generator.from_pretrained(pipe)


def test_another_scheduler_does_not_change_what_the_model_is(tiny: ModuleType, tiny_sd21: Path, tmp_path: Path):
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

    leading = EulerDiscreteScheduler(timestep_spacing="leading")
    trailing = DPMSolverMultistepScheduler(timestep_spacing="trailing")
    folder = tiny.make_bundle(tmp_path / "sd15", "sd15")
    for model, scheduler, distilled in ((tiny_sd21, leading, True), (folder, trailing, False)):
        for loaded in (model, pipeline(model)):
            with Generator.from_pretrained(loaded, scheduler=scheduler, device="cpu") as gen:
                assert gen.info["distilled"] == distilled and gen.bundle.scheduler is scheduler


def test_a_database_of_another_size_is_left_out_with_a_note_unless_slerp_was_asked_for(tiny_sd21: Path, tmp_path: Path):
    from PIL import Image

    from ragturbo import Database

    pairs = [("a red circle", Image.new("RGB", (128, 128), "red")), ("a blue square", Image.new("RGB", (128, 128)))]
    database = Database.build(pairs, tmp_path / "db", model=tiny_sd21, device="cpu")
    with Generator.from_pretrained(tiny_sd21, database=database, device="cpu") as gen:
        assert gen(PROMPT).mode == "slerp"
        wide = gen(PROMPT, width=256, seed=3)
        assert wide.mode == "none" and "generated without retrieval" in wide.notes[0] and "128x256" in wide.notes[0]
        for options in ({"mode": "slerp"}, {"w": 0.5}, {"num_neighbors": 2}):
            with pytest.raises(InvalidRequest, match="equal feature grids") as raised:
                gen(PROMPT, width=256, **options)
            assert raised.value.option == "height"


def test_warming_up_an_undistilled_model_takes_one_step_of_fifty(tiny: ModuleType, tmp_path: Path, monkeypatch):
    from ragturbo.engine.reference import ReferenceEngine

    seen: set[tuple[int, float]] = set()
    run = ReferenceEngine.run

    def watched(self: Any, request: Any) -> Any:
        seen.add((request.num_inference_steps, request.guidance_scale))
        return run(self, request)

    monkeypatch.setattr(ReferenceEngine, "run", watched)
    with Generator.from_pretrained(tiny.make_bundle(tmp_path / "sd15", "sd15"), device="cpu", batch_sizes=(1,)) as gen:
        gen.warmup()
    assert seen == {(1, 7.5)}


def test_agenerate_is_a_coroutine_function_for_frameworks_that_ask():
    import inspect

    assert inspect.iscoroutinefunction(Generator.agenerate) and not inspect.iscoroutinefunction(Generator.submit)
