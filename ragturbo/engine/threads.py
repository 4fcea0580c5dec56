"""How many CPU threads share each operation of a model.

One of a small model takes tens of microseconds. Threads then cost more in waking each other than they save, and where
another process holds a core they wait for it at every operation, hundreds of times an image.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ragturbo.model.bundle import Bundle

# Parameters of text encoder, UNet and VAE together: the embedded model has 4 million, SD 2.1 1.3 billion.
SMALL = 64_000_000
_one_at_a_time = threading.Lock()


def settle_threads(bundle: Bundle, on_device_thread: Callable[[Callable[[], Any]], Any]) -> int:
    """On a CPU a small model's device thread computes alone, unless OMP_NUM_THREADS says otherwise -> its number of
    threads. The caller's number, and that of threads to come, stay."""
    with _one_at_a_time:
        own = torch.get_num_threads()
        if bundle.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or _parameters(bundle) > SMALL:
            return own
        on_device_thread(_compute_alone)
        # torch has a number for each thread, and one more that new threads and MKL go by: that one is put back.
        torch.set_num_threads(own)
    return 1


def _compute_alone() -> None:
    # A thread is given its number when it first asks: after that it keeps what it is told.
    torch.get_num_threads()
    torch.set_num_threads(1)


def _parameters(bundle: Bundle) -> int:
    parts: tuple[Any, ...] = (bundle.text.text_encoder, bundle.unet.unet, bundle.vae.module)
    return sum(p.numel() for part in parts for p in part.parameters())
