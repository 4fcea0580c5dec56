"""Choose the upsampling of the VAE's decoder: the faster of two, if this kind of GPU has been measured.

"nearest" is nearest upsampling and a 3x3 convolution. "phases" is a 2x2 convolution of the small map for each of the
four phases of the large one: 387 of an image's 2,515 GFLOP less, with weights that are sums and rounded once more.
"""

from __future__ import annotations

import torch

from ragturbo.model.fused_vae import UPSAMPLINGS


def choose(device: torch.device) -> str:
    """Return the faster name in UPSAMPLINGS by `kernels/configs/<gpu>.json`, or "nearest" if nothing was measured."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "nearest"
    from ragturbo.kernels import tiles

    measured = {name: seconds for name, seconds in tiles.upsampling_seconds(device).items() if name in UPSAMPLINGS}
    return min(measured, key=lambda name: measured[name]) if measured else "nearest"
