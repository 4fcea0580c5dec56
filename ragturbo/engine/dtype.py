"""The fast model in the dtype of its products: the bundle's, or bf16 on a CPU that is faster in it."""

from __future__ import annotations

import logging
import math
from functools import partial

import torch

from ragturbo.config import GeneratorConfig
from ragturbo.engine import packing
from ragturbo.engine.fast_model import FastModel
from ragturbo.engine.threads import parameters
from ragturbo.model import onednn
from ragturbo.model.bundle import Bundle
from ragturbo.model.one_thread import SMALL

log = logging.getLogger("ragturbo")
# The least PSNR of bf16 latents against fp32 ones, in dB over their range. 36 dB are errors of 1.6 % of the range.
AGREEMENT = 36.0
_PROMPT = "a photo of a lighthouse on a rock"


def make_model(bundle: Bundle, config: GeneratorConfig, *, packs: bool) -> tuple[FastModel, str]:
    """Return the fast model, and why it has its dtype.

    Args:
        packs: whether weights may be packed.
    """
    make = partial(FastModel, bundle, attention=config.attention, compiled=config.compile, packs=packs)
    if config.dtype is not None:
        return make(), "requested"
    if (
        not packs
        or bundle.dtype != torch.float32
        or not packing.choose(bundle.device, torch.bfloat16, config.compile)[0]
    ):
        return make(), "the default"
    able, why = onednn.bf16_reason()
    if not able:
        return make(), why
    if parameters(bundle) <= SMALL:
        return make(), "a small model gains little from bfloat16"
    model = make(dtype=torch.bfloat16)
    found = agreement(bundle, model)
    agrees = f"its latents agree with those of float32 to {found:.1f} dB, at least {AGREEMENT:.0f} needed"
    if found >= AGREEMENT:
        return model, f"{why}, and {agrees}"
    log.warning("bfloat16 is not used: %s; dtype='bfloat16' asks for it", agrees)
    return make(), f"not bfloat16: {agrees}"


@torch.inference_mode()
def agreement(bundle: Bundle, model: FastModel) -> float:
    """Return the PSNR in dB of the latents after one step of `model` against those of the bundle's own UNet in fp32.

    On latents of a sixteenth of the usual size, so that it takes a fraction of an image's time.
    """
    constants = model.schedules[1].constants[0]
    side = max(8, bundle.default_size // bundle.vae.factor // 4)
    noise = torch.randn(1, bundle.vae.channels, side, side, generator=torch.Generator().manual_seed(0))
    text = bundle.text.encode(bundle.text.tokenize([_PROMPT]).input_ids).hidden_states
    state = bundle.unet.encode(noise * constants.p, model.schedules[1].timesteps[0], text)
    exact = noise * constants.a + constants.b * bundle.unet.decode(state)
    fast = model.unet.encode(noise * constants.p, model.timestep(1, 0), model.unet.text_kv(text))
    ours = noise * constants.a + constants.b * model.unet.decode(fast).float()
    return psnr_over_range(ours, exact)


def psnr_over_range(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Infinity if equal; NaN if a value is NaN."""
    error = float((x.double() - exact.double()).pow(2).mean().sqrt())
    return math.inf if error == 0 else 20 * math.log10(float(exact.max() - exact.min()) / error)
