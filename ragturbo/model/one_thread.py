"""Load a small model on one CPU thread.

Its tensors take microseconds to copy or pack. Waking torch's other threads for each takes longer, and if another
process occupies a core, every operation waits for it: loading the embedded model took 0.6 s longer beside a busy
process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

# Parameters of text encoder, UNet and VAE together: the embedded model has 4 million, SD 2.1 1.3 billion.
SMALL = 64_000_000
# Around changes of torch's global setting, which are read and restored.
lock = threading.Lock()
T = TypeVar("T")


def on_one_thread(function: Callable[[], T], device: torch.device, networks: Iterable[Any]) -> T:
    """Call `function` on a thread of its own, where torch uses one thread, if the networks together are small.

    On a GPU, of a large model, or if OMP_NUM_THREADS is set, call it on this thread.
    """
    parameters = sum(parameter.numel() for network in networks for parameter in network.parameters())
    if device.type != "cpu" or parameters > SMALL or "OMP_NUM_THREADS" in os.environ:
        return function()
    with ThreadPoolExecutor(1, thread_name_prefix="ragturbo-load") as pool:
        with lock:
            own = torch.get_num_threads()
            pool.submit(use_one_thread).result()
            # torch has a setting per thread and a global one for new threads and MKL: restore the latter.
            torch.set_num_threads(own)
        return pool.submit(function).result()


def use_one_thread() -> None:
    """Make the calling thread use one thread for torch's operations."""
    # A thread copies the global setting at its first query, which would overwrite a setting made before that.
    torch.get_num_threads()
    torch.set_num_threads(1)
