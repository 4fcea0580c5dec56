"""Choose the implementation of the UNet's attention: by name, or the fastest measured on this kind of GPU."""

from __future__ import annotations

import torch

from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch


def choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return the implementation and the reason for it.

    "auto" takes the fastest by `kernels/configs/<gpu>.json`, which `python -m benchmarks.model_races` writes, and
    "sdpa" if there are no measurements.

    Raises:
        InvalidRequest: the named implementation cannot run here.
    """
    if name != "auto":
        why_not = dispatch.refusal("cross_attention", name, device.type, dtype)
        if why_not is not None:
            raise InvalidRequest(f"attention={name!r}: {why_not}")
        return name, "requested"
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "products", "two products and a softmax in bfloat16; torch's kernel multiplies in fp32"
    measured: dict[str, float] = {}
    if device.type == "cuda" and torch.cuda.is_available():
        from ragturbo.kernels import tiles

        measured = tiles.attention_seconds(device)
    able = {n: s for n, s in measured.items() if dispatch.refusal("cross_attention", n, device.type, dtype) is None}
    if not able:
        return "sdpa", "torch's scaled_dot_product_attention; nothing has been measured on this machine"
    times = ", ".join(f"{n} {1e6 * s:.0f} us" for n, s in sorted(able.items(), key=lambda item: item[1]))
    return min(able, key=lambda n: able[n]), f"measured on this GPU, per image: {times}"
