"""Options of a Generator, validated when the dataclass is created, and the limits of a request."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ragturbo.errors import InvalidRequest
from ragturbo.messages import short

ENGINES = ("auto", "reference", "graph")
RETRIEVERS = ("auto", "scann", "exact", "bm25", "hybrid")
VAES = ("full", "tiny")
ATTENTIONS = ("auto", "sdpa", "triton", "xformers")
# "lerp" is the control for slerp: the same blend along the chord.
MODES = ("adapter", "slerp", "lerp", "none")
OUTPUT_TYPES = ("pil", "np", "pt", "latent", "uint8", "png", "jpeg", "webp")
# Limits of one request.
MAX_NEIGHBORS = 16
MAX_PHRASES = 4
MAX_SEED = 2**64 - 1
MAX_IMAGES = 4096
MAX_SIDE = 8192
"""Pixels; larger images fit on no device."""

Compose = bool | Callable[[str], list[str]]
"""Whether to search by the phrases of the prompt, or the function that returns them."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(value: int | str | None, name: str) -> int | None:
    """Return a size in bytes from an int, a string such as "8GiB", or None."""
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if not match or match[2].upper() not in _UNITS:
            raise InvalidRequest(f"{name}={value!r} is not a size; write bytes or something like '8GiB'")
        value = int(float(match[1]) * _UNITS[match[2].upper()])
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequest(f"{name}={value!r} must be a size of 0 or more bytes")
    return value


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        # Imported here, as below: `import ragturbo` stays short.
        import difflib

        near = difflib.get_close_matches(str(value).lower(), allowed, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        names = ", ".join(map(repr, allowed))
        raise InvalidRequest(f"{name}={short(value)} is not one of {names}{hint}", option=name)


DTYPES = ("float32", "float16", "bfloat16")


def check_dtype(dtype: Any) -> None:
    """Raise InvalidRequest unless dtype is None, a name in DTYPES, or torch's object of that name."""
    if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
        raise InvalidRequest(f"dtype={short(dtype)} is not one of {', '.join(DTYPES)}", option="dtype")


def check_device(device: Any) -> None:
    """Raise InvalidRequest unless device is None, "cpu", "cuda" or "cuda:1", and this machine may have it."""
    if device is None:
        return
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        raise InvalidRequest(f"device={short(str(device))} is not one of 'cpu', 'cuda', 'cuda:1', …", option="device")
    if str(device).startswith("cuda") and not has_driver():
        raise InvalidRequest(
            f"device={short(str(device))}: this machine has no NVIDIA driver; see `ragturbo info`", option="device"
        )


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def has_driver() -> bool:
    """Whether torch may find a GPU, which is known without importing it: it needs the driver's library."""
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def refuse_graphs(engine: str, capture: bool, *, on_gpu: bool) -> None:
    """Raise InvalidRequest if CUDA graphs are asked for without a GPU."""
    if engine == "graph" and capture and not on_gpu:
        raise InvalidRequest(
            "engine='graph' captures CUDA graphs and needs a CUDA device; use capture=False, or engine='reference' or "
            "'auto' here",
            option="engine",
        )


@dataclass(frozen=True)
class GeneratorConfig:
    """Everything `Generator.from_pretrained` takes besides the model, database and adapter themselves."""

    engine: str = "auto"
    """"reference": plain torch, on any device. "graph": fused modules, under CUDA graphs on a GPU. "auto": the graph
    engine if it can run the model, else the reference."""
    capture: bool = True
    """False: the graph engine calls its segments instead of capturing them. On a CPU, "auto" always does."""
    dtype: Any = None
    """None: the bundle's. Then, on a CPU that is faster in bf16, UNet and VAE of a large fp32 model compute in bf16 if
    their latents agree with those of fp32."""
    retriever: Any = "auto"
    compose: Compose | None = None
    """Default of the requests; None: as the bundle's adapter was trained."""
    vae: str = "full"
    attention: str = "auto"
    compile: bool = False
    host_cache: int | str | None = None
    device_cache: int | str | None = None
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    batch_window: float = 0.0
    max_queue: int = 64
    prompt_cache: int = 0
    """Number of prompts whose encoding is cached, so that a repeated prompt skips the text encoder. The graph engine
    caches the keys and values of all cross-attentions on the device: 3.8 MB per prompt and bucket for SD 2.1."""
    log_prompts: bool = True
    """Whether warnings may quote the prompt. `Output.notes` has the same text for the caller."""

    def __post_init__(self) -> None:
        one_of("engine", self.engine, ENGINES)
        if self.engine == "reference" and not self.capture:
            raise InvalidRequest("capture=False has no effect with engine='reference', which captures nothing")
        check_dtype(self.dtype)
        one_of("attention", self.attention, ATTENTIONS)
        if self.attention == "xformers" and not _installed("xformers"):
            raise InvalidRequest(
                "attention='xformers' needs the package xformers: pip install xformers", option="attention"
            )
        if self.attention == "triton" and self.engine != "graph" and not has_driver():
            raise InvalidRequest(
                "attention='triton' needs a GPU: Triton's kernels do not run on a CPU",
                option="attention",
            )
        if isinstance(self.retriever, str):
            one_of("retriever", self.retriever, RETRIEVERS)
        elif not callable(getattr(self.retriever, "search", None)):
            names = ", ".join(map(repr, RETRIEVERS))
            raise InvalidRequest(
                f"retriever={self.retriever!r} must be one of {names} or implement search(keys, k, *, exclude=None)"
            )
        if not (self.compose is None or isinstance(self.compose, bool) or callable(self.compose)):
            raise InvalidRequest(
                f"compose={self.compose!r} must be True, False or a function from a prompt to its phrases"
            )
        if not isinstance(self.vae, str) or not self.vae:
            raise InvalidRequest(f"vae={self.vae!r} must be 'full', 'tiny' or a path or id of an AutoencoderTiny")
        given = self.batch_sizes if isinstance(self.batch_sizes, (list, tuple, set, range)) else (self.batch_sizes,)
        if not given or any(type(n) is not int or n < 1 or n & (n - 1) for n in given):
            raise InvalidRequest(
                f"batch_sizes={short(self.batch_sizes)} must be powers of two: other sizes would make an image's bits "
                "depend on its place in the batch",
                option="batch_sizes",
            )
        sizes = tuple(sorted(set(given)))
        object.__setattr__(self, "batch_sizes", sizes)
        window = self.batch_window
        if not isinstance(window, (int, float)) or isinstance(window, bool) or not 0 <= window <= 1:
            raise InvalidRequest(f"batch_window={short(window)} must be between 0 and 1 second", option="batch_window")
        if type(self.max_queue) is not int or self.max_queue < 1:
            raise InvalidRequest(f"max_queue={short(self.max_queue)} must be at least 1", option="max_queue")
        for name in ("capture", "compile", "log_prompts"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{name}={short(getattr(self, name))} must be True or False", option=name)
        if isinstance(self.prompt_cache, bool) or not isinstance(self.prompt_cache, int) or self.prompt_cache < 0:
            raise InvalidRequest(f"prompt_cache={self.prompt_cache!r} must be a number of prompts, 0 for none")
        object.__setattr__(self, "host_cache", parse_bytes(self.host_cache, "host_cache"))
        object.__setattr__(self, "device_cache", parse_bytes(self.device_cache, "device_cache"))
