"""`generate()` and Generator on a real model with random weights, compared with diffusers' own pipeline."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
import io
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ragturbo
from ragturbo import Generator
from ragturbo.config import GeneratorConfig
from ragturbo.errors import DeadlineExceeded, GenerationError, InvalidRequest, ModelError, NonFiniteOutput
from ragturbo.model.bundle import Bundle

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def gen(tiny_sd21: Path) -> Iterator[Generator]:
    with Generator.from_pretrained(tiny_sd21, device="cpu") as generator:
        yield generator


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> Iterator[Generator]:
    """An undistilled model: leading timesteps, guidance."""
    folder = tiny.make_bundle(tmp_path_factory.mktemp("base") / "sd15", kind="sd15")
    with Generator.from_pretrained(folder, device="cpu") as generator:
        yield generator


def pipeline(folder):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_same_noise_gives_the_image_of_diffusers_own_pipeline(gen, tiny_sd21, steps):
    noise = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(3))
    prompts = [PROMPT, "a photo of a cat"]
    theirs = pipeline(tiny_sd21)(
        prompts, latents=noise.clone(), num_inference_steps=steps, guidance_scale=0.0, output_type="np"
    ).images
    ours = gen(prompts, latents=noise, num_inference_steps=steps, output_type="np").images
    other = gen(prompts[::-1], latents=noise, num_inference_steps=steps, output_type="np").images
    assert np.abs(ours - theirs).max() < 1e-4
    # The control: another prompt must not pass.
    assert np.abs(other - theirs).max() > 1e-3


def test_guidance_with_a_negative_prompt_is_diffusers(base):
    noise = torch.randn((1, 4, *[base._bundle.default_size // base._bundle.vae.factor] * 2))
    options = {"num_inference_steps": 5, "guidance_scale": 7.5, "negative_prompt": "a dog"}
    theirs = pipeline(base._bundle.name)(PROMPT, latents=noise.clone(), output_type="np", **options).images
    ours = base(PROMPT, latents=noise, output_type="np", **options).images
    assert np.abs(ours - theirs).max() < 1e-4


def test_a_seed_is_a_place_in_diffusers_noise(gen, tiny_sd21):
    theirs = pipeline(tiny_sd21)(
        PROMPT,
        generator=torch.Generator().manual_seed(11),
        num_inference_steps=1,
        guidance_scale=0.0,
        output_type="np",
    ).images
    assert np.abs(gen(PROMPT, seed=11, output_type="np").images - theirs).max() < 1e-4
    assert np.abs(gen(PROMPT, seed=12, output_type="np").images - theirs).max() > 1e-3


def test_an_image_does_not_depend_on_its_place_in_the_batch(gen):
    alone = gen([PROMPT] * 4, seed=[5, 6, 7, 8], output_type="uint8")
    turned = gen([PROMPT] * 4, seed=[8, 7, 6, 5], output_type="uint8")
    assert alone.bucket == turned.bucket == 4
    assert np.array_equal(alone.images, turned.images[::-1])


def test_more_images_than_the_largest_bucket_all_run_in_it(gen):
    out = gen(PROMPT, seed=1, num_images_per_prompt=11, output_type="uint8")
    assert out.images.shape[0] == 11 and out.bucket == 8 and out.seeds == list(range(1, 12))
    eight = gen(PROMPT, seed=4, num_images_per_prompt=8, output_type="uint8")
    assert np.array_equal(out.images[3:], eight.images)


def test_every_output_type_is_the_same_image(gen):
    def images(kind: str):
        return gen([PROMPT, "a dog"], seed=2, output_type=kind).images

    array, tensor, pil, whole = images("np"), images("pt"), images("pil"), images("uint8")
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert array.dtype == np.float32 and 0 <= array.min() and array.max() <= 1
    rounded = (array * 255).round().astype("uint8")
    assert np.array_equal(whole, rounded)
    assert all(np.array_equal(np.asarray(p), r) for p, r in zip(pil, rounded, strict=True))
    pngs = [Image.open(io.BytesIO(data)) for data in images("png")]
    assert all(p.format == "PNG" and np.array_equal(np.asarray(p), r) for p, r in zip(pngs, rounded, strict=True))
    jpegs = [Image.open(io.BytesIO(data)) for data in images("jpeg")]
    assert [j.format for j in jpegs] == ["JPEG", "JPEG"] and jpegs[0].size == pil[0].size
    decoded = gen._bundle.vae.decode(images("latent"))
    assert torch.allclose(decoded, tensor, atol=1e-4)


def test_the_postprocess_hook_gets_the_batch_and_its_result_is_used(gen):
    seen = []

    def blank(batch):
        seen.append(batch.shape)
        return np.zeros_like(batch)

    out = gen([PROMPT, "a dog"], seed=2, postprocess=blank)
    assert seen == [(2, 128, 128, 3)] and max(np.asarray(i).max() for i in out.images) == 0
    with pytest.raises(InvalidRequest, match="postprocess returned"):
        gen(PROMPT, postprocess=lambda batch: batch[:, :1])


def test_embeddings_in_the_place_of_a_prompt(gen):
    states = gen._bundle.text.encode(gen._bundle.text.tokenize([PROMPT]).input_ids)
    given = gen(prompt_embeds=states.hidden_states, seed=3, mode="none", output_type="np").images
    assert np.abs(given - gen(PROMPT, seed=3, mode="none", output_type="np").images).max() < 1e-5


def test_a_call_a_future_and_a_coroutine_agree(gen):
    called = gen(PROMPT, seed=9, output_type="uint8").images
    future = gen.submit(PROMPT, seed=9, output_type="uint8").result(60).images
    awaited = asyncio.run(gen.agenerate(PROMPT, seed=9, output_type="uint8")).images
    assert np.array_equal(called, future) and np.array_equal(called, awaited)


def test_embeddings_may_be_overwritten_once_submitted(gen):
    states = gen._bundle.text.encode(gen._bundle.text.tokenize([PROMPT] * 2).input_ids).hidden_states
    expected = gen(prompt_embeds=states.clone(), seed=3, mode="none", output_type="np").images
    busy, leave = threading.Event(), threading.Event()
    blocked = threading.Thread(target=gen.call, args=(lambda: busy.set() or leave.wait(60),))
    blocked.start()
    busy.wait(60)
    future = gen.submit(prompt_embeds=states, seed=3, mode="none", output_type="np")
    states.zero_()
    leave.set()
    blocked.join()
    assert np.array_equal(future.result(60).images, expected)


def test_a_failed_future_does_not_keep_its_request(gen):
    gc.collect()
    gc.disable()
    try:
        assert gen.submit(PROMPT, seed=1, postprocess=lambda batch: batch[:, :1]).exception(60) is not None
        # After the first: only an empty queue accepts a deadline that cannot be met.
        late = gen.submit([PROMPT] * 4, seed=1, timeout=1e-6)
        request = late._request
        # None if it is already released.
        kept = None if request is None else weakref.ref(request)
        del request
        assert isinstance(late.exception(60), DeadlineExceeded)
        until = time.monotonic() + 30
        while kept is not None and kept() is not None and time.monotonic() < until:
            time.sleep(0.01)
        assert kept is None or kept() is None
    finally:
        gc.enable()


def test_a_cancelled_task_cancels_its_request(gen):
    async def run() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(gen.agenerate([PROMPT] * 64, seed=1), timeout=1e-4)

    asyncio.run(run())
    assert gen(PROMPT, seed=9).images[0].size == (128, 128)


def test_a_timeout_that_cannot_be_met_is_said(gen):
    with pytest.raises(DeadlineExceeded):
        gen([PROMPT] * 16, timeout=1e-6)
    assert gen.healthy


def test_what_was_cut_off_is_reported(gen):
    out = gen(" ".join(["photo"] * 10_000), seed=1)
    assert "tokens were cut off" in out.notes[0] and str(10_002 - gen._bundle.text.max_length) in out.notes[0]
    assert gen("a photo", seed=1).notes == []


def test_timings_name_the_stages_and_fit_into_the_total(gen):
    timings = gen(PROMPT, seed=1).timings
    assert {"queue", "tokenize", "text", "encode", "decode", "vae", "copy", "total"} <= set(timings)
    assert sum(s for name, s in timings.items() if name != "total") <= timings["total"] + 1e-4


def test_weights_that_are_not_numbers_are_an_error_never_a_black_image(tiny, tmp_path):
    folder = tiny.make_bundle(tmp_path / "nan")
    with Generator.from_pretrained(folder, device="cpu", engine="reference") as broken:
        with torch.no_grad():
            broken._bundle.unet.unet.conv_out.weight.fill_(math.nan)
        with pytest.raises(NonFiniteOutput, match="NaN or infinity"):
            broken(PROMPT, seed=1)
        with torch.no_grad():
            broken._bundle.unet.unet.conv_out.weight.fill_(0.0)
        assert broken(PROMPT, seed=1).images
    bundle = Bundle.load(folder, device="cpu")
    with torch.no_grad():
        bundle.unet.unet.conv_out.weight.fill_(math.nan)
    with Generator(bundle) as broken, pytest.raises(NonFiniteOutput, match="NaN or infinity"):
        broken(PROMPT, seed=1)


def test_a_closed_generator_says_so_and_closing_twice_is_fine(tiny_sd21):
    generator = Generator.from_pretrained(tiny_sd21, device="cpu")
    generator.close()
    generator.close()
    assert not generator.healthy
    with pytest.raises(GenerationError, match="closed"):
        generator(PROMPT)


def test_what_cannot_be_loaded_is_named(tmp_path, tiny_sd21):
    with pytest.raises(ModelError, match="nowhere"):
        Generator.from_pretrained(tmp_path / "nowhere", device="cpu")
    with pytest.raises(TypeError, match="turbo"):
        Generator.from_pretrained(tiny_sd21, turbo=True)
    with pytest.raises(InvalidRequest, match="compile=True is for the graph engine"):
        Generator.from_pretrained(tiny_sd21, engine="reference", compile=True)
    with pytest.raises(InvalidRequest, match="capture=False has no effect"):
        Generator.from_pretrained(tiny_sd21, engine="reference", capture=False)
    with pytest.raises(InvalidRequest, match="batch_sizes"):
        Generator.from_pretrained(tiny_sd21, batch_sizes=(1, 3))
    with pytest.raises(InvalidRequest, match="device='tpu'"):
        Generator.from_pretrained(tiny_sd21, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidRequest, match="needs a CUDA device"):
            Generator.from_pretrained(tiny_sd21, engine="graph")


def test_a_latent_consistency_model_is_refused_rather_than_drawn_wrongly(tiny, tmp_path):
    folder = tiny.make_bundle(tmp_path / "lcm", time_cond_proj_dim=16)
    with pytest.raises(ModelError, match="latent consistency model.*lcm:<folder>"):
        Generator.from_pretrained(folder, device="cpu")


def test_generate_gives_an_image_for_a_text_and_a_list_for_a_list(tiny_sd21):
    options = {"model": tiny_sd21, "device": "cpu"}
    one = ragturbo.generate(PROMPT, seed=7, **options)
    two = ragturbo.generate([PROMPT, "a dog"], seed=[7, 8], **options)
    assert isinstance(one, Image.Image) and [i.size for i in two] == [one.size] * 2
    from ragturbo.generate import _generators

    assert len([k for k in _generators if k[0] == str(tiny_sd21)]) == 1


FORK = """
import os, sys, ragturbo
def draw():
    return ragturbo.generate("a dog", model=sys.argv[1], seed=1, output_type="uint8", device="cpu").tobytes()
if sys.argv[2] == "after":
    draw()
child = os.fork()
if child == 0:
    try:
        draw()
        print("drawn", flush=True)
    except ragturbo.errors.GenerationError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(("when", "said"), [("before", "drawn"), ("after", "after forking")])
def test_a_fork_before_the_first_image_is_fine_and_after_it_is_a_clear_error(tiny_sd21, when, said):
    # Two threads: the pool that does not survive the fork.
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(tiny_sd21), when]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert said in done.stdout, done.stderr


def test_the_function_and_the_module_share_a_name():
    import ragturbo.generate as function
    from ragturbo import Generator, generate
    from ragturbo.generate import Generator as from_module

    assert function is ragturbo.generate is generate and callable(function)
    assert from_module is ragturbo.Generator is Generator


def test_from_pretrained_has_every_option_of_the_config_by_name_and_default():
    parameters = inspect.signature(Generator.from_pretrained).parameters
    for field in dataclasses.fields(GeneratorConfig):
        assert parameters[field.name].default == field.default, field.name


@pytest.mark.parametrize("engine", ["reference", "graph"])
def test_an_engine_asked_for_by_name_runs(tiny_sd21, engine):
    with Generator.from_pretrained(tiny_sd21, device="cpu", engine=engine, capture=engine == "reference") as gen:
        out = gen(PROMPT, seed=1, output_type="np")
        assert gen.info["engine"] == engine
    with Generator.from_pretrained(tiny_sd21, device="cpu") as gen:
        assert np.abs(gen(PROMPT, seed=1, output_type="np").images - out.images).max() < 1e-4


def test_importing_ragturbo_loads_nothing_heavy():
    code = (
        "import sys, ragturbo; heavy = {'torch', 'triton', 'scann', 'diffusers', 'transformers', 'numpy', 'PIL'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
