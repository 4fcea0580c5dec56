"""The number of CPU threads for a model's operations.

An operation of a small model takes tens of microseconds. Waking other threads then costs more than they save, and if
another process occupies a core, every operation waits for it, hundreds of times per image.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ragturbo.model.one_thread import SMALL, lock, use_one_thread

if TYPE_CHECKING:
    from ragturbo.model.bundle import Bundle


def settle_threads(bundle: Bundle, on_device_thread: Callable[[Callable[[], Any]], Any]) -> int:
    """Make the device thread of a small model on a CPU single-threaded, unless OMP_NUM_THREADS is set, and return its
    number of threads. Other threads keep theirs."""
    with lock:
        own = torch.get_num_threads()
        if bundle.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or parameters(bundle) > SMALL:
            return own
        on_device_thread(use_one_thread)
        # torch has a setting per thread and a global one for new threads and MKL: restore the latter.
        torch.set_num_threads(own)
    return 1


def parameters(bundle: Bundle) -> int:
    """Of text encoder, UNet and VAE."""
    parts: tuple[Any, ...] = (bundle.text.text_encoder, bundle.unet.unet, bundle.vae.module)
    return sum(p.numel() for part in parts for p in part.parameters())
