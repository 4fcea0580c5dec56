"""One way to draw images on a CPU, in a process of its own, for `benchmarks.cpu_peers`.

It answers lines on its standard input with JSON lines: `draw SEED` with the seconds from prompt to pixels, and
`latents SEED FILE` after writing the latents for that seed. All systems of a model have equal weights and noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ragturbo.model.bundle import Bundle

# (prompt, seed, "latent" or "np") -> latents, or pixels (H, W, 3)
Draw = Callable[[str, int, str], np.ndarray]
PROMPTS = ("a lighthouse on a rock", "a red fox beside a river", "two boats on the water", "a cat on a wooden table")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_systems", description=__doc__)
    parser.add_argument("system", choices=list(SYSTEMS))
    parser.add_argument("--model", default="sd21", help="shapes, or a configuration of ragturbo.bench.models")
    options = parser.parse_args(argv)
    draw = SYSTEMS[options.system](options.model)
    for i in range(2):
        draw(PROMPTS[i], i, "np")
    answer({"ready": True})
    for line in sys.stdin:
        command, seed, *rest = line.split()
        prompt = PROMPTS[int(seed) % len(PROMPTS)]
        if command == "latents":
            np.save(rest[0], draw(prompt, int(seed), "latent"))
            answer({"saved": rest[0]})
            continue
        begin = time.perf_counter()
        draw(prompt, int(seed), "np")
        answer({"seconds": time.perf_counter() - begin})
    return 0


def answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def make_bundle(model: str) -> Bundle:
    """The embedded model without adapter, or random weights in fp32."""
    import torch

    from ragturbo.bench import models
    from ragturbo.model.bundle import Bundle

    if model == "shapes":
        return Bundle.load("shapes", device="cpu", dtype=torch.float32, adapter=False)
    return models.make_bundle(model, "cpu", torch.float32, adapter=False)


def ragturbo(model: str, *, dtype: str | None = None, tiny: bool = False) -> Draw:
    from ragturbo import Generator
    from ragturbo.config import GeneratorConfig

    bundle = make_bundle(model)
    if tiny:
        bundle = with_tiny_vae(bundle)
    generator = Generator(bundle, config=GeneratorConfig(dtype=dtype))
    sys.stderr.write(f"{generator.info['engine']}: {generator.info['ways'].get('products')}\n")

    def draw(prompt: str, seed: int, kind: str) -> np.ndarray:
        out = generator(prompt, seed=seed, output_type="latent" if kind == "latent" else "uint8").images
        return np.asarray(out)[0]

    return draw


def with_tiny_vae(bundle: Bundle) -> Bundle:
    """The bundle with an autoencoder of TAESD's configuration and random weights."""
    import copy

    import torch
    from diffusers import AutoencoderTiny

    from ragturbo.model.vae import VAE

    torch.manual_seed(0)
    changed = copy.copy(bundle)
    changed.vae = VAE(AutoencoderTiny().eval().requires_grad_(False))
    return changed


def diffusers(model: str, *, dtype: str = "float32", compile: bool = False) -> Draw:
    import copy

    import torch

    from benchmarks.diffusers_peer import Diffusers

    bundle = copy.copy(make_bundle(model))
    if dtype != "float32":
        kind = getattr(torch, dtype)
        # torch's `to`: diffusers' own warns about an empty list of fp32 modules.
        for module in (bundle.unet.unet, bundle.vae.module, bundle.text.text_encoder):
            torch.nn.Module.to(module, kind)
    if compile:
        import torch._inductor.config as inductor

        # Weights are constants: Inductor then packs them for oneDNN.
        inductor.freezing = True
    pipe = Diffusers(bundle, compile=compile, mode="default")

    def draw(prompt: str, seed: int, kind: str) -> np.ndarray:
        found = pipe([prompt], [seed], kind)[0]
        return found.float().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)

    return draw


def openvino(model: str, *, precision: str) -> Draw:
    """OpenVINO's own conversion of the same modules, for latency, and one step in closed form."""
    import openvino as ov
    import torch

    from ragturbo.bench.agreement import noise_of
    from ragturbo.model.fold import StepConstants
    from ragturbo.model.onestep import EulerSchedule, make_schedule

    bundle = make_bundle(model)
    # OpenVINO traces the libraries' own modules.
    bundle.to_diffusers()
    schedule = make_schedule(bundle.scheduler, 1, distilled=True, device="cpu")
    assert isinstance(schedule, EulerSchedule)
    step, timestep = StepConstants.of(schedule)[0], schedule.timesteps[0].float()
    unet, vae, text = bundle.unet.unet, bundle.vae.module, bundle.text.text_encoder
    ids = bundle.text.tokenize([PROMPTS[0]]).input_ids
    noise = noise_of(bundle, [0])
    core = ov.Core()
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision,
             "INFERENCE_NUM_THREADS": torch.get_num_threads()}  # fmt: skip

    def compiled(function: Callable[..., Any], *example: torch.Tensor) -> Any:
        class Module(torch.nn.Module):
            def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
                return function(*inputs)

        with torch.no_grad():
            converted = ov.convert_model(Module(), example_input=example)
        converted.reshape({port: list(x.shape) for port, x in zip(converted.inputs, example, strict=True)})
        return core.compile_model(converted, "CPU", hints)

    with torch.no_grad():
        states = text(input_ids=ids).last_hidden_state
    encode = compiled(lambda ids: text(input_ids=ids).last_hidden_state, ids)
    denoise = compiled(lambda x, text: unet(x, timestep, text, return_dict=False)[0], noise, states)
    decode = compiled(lambda z: vae.decode(z, return_dict=False)[0], noise)

    def draw(prompt: str, seed: int, kind: str) -> np.ndarray:
        text = encode([bundle.text.tokenize([prompt]).input_ids.numpy()])[0]
        x = noise_of(bundle, [seed]).numpy()
        latents = step.a * x + step.b * denoise([step.p * x, text])[0]
        if kind == "latent":
            return latents[0]
        image = decode([latents / bundle.vae.scale])[0]
        return ((image[0] / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)

    return draw


SYSTEMS: dict[str, Callable[[str], Draw]] = {
    "ragturbo": ragturbo,
    "ragturbo, float32": lambda model: ragturbo(model, dtype="float32"),
    "ragturbo, tiny VAE": lambda model: ragturbo(model, tiny=True),
    "diffusers": diffusers,
    "diffusers, bfloat16": lambda model: diffusers(model, dtype="bfloat16"),
    "diffusers + torch.compile": lambda model: diffusers(model, compile=True),
    "diffusers + torch.compile, bfloat16": lambda model: diffusers(model, dtype="bfloat16", compile=True),
    "OpenVINO": lambda model: openvino(model, precision="f32"),
    "OpenVINO, bfloat16": lambda model: openvino(model, precision="bf16"),
}

if __name__ == "__main__":
    sys.exit(main())
