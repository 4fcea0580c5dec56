"""From options to parts: which device, which engine, which source."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from ragturbo.errors import InvalidRequest, ModelError

if TYPE_CHECKING:
    from ragturbo.config import GeneratorConfig
    from ragturbo.engine.database import DatabaseSource
    from ragturbo.engine.step import Engine
    from ragturbo.model.bundle import Bundle

log = logging.getLogger("ragturbo")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(device: Any, dtype: Any) -> tuple[torch.device, torch.dtype]:
    """None: cuda/float16 where there is a GPU, else cpu/float32."""
    try:
        where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise InvalidRequest(f"device={device!r} is not a device: {error}") from None
    if where.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"device={device!r}: ragturbo runs on cpu and cuda")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest(f"device={device!r}, but torch sees no CUDA GPU here; see `ragturbo info`")
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype.removeprefix("torch."), dtype)
    if dtype is None:
        dtype = torch.float16 if where.type == "cuda" else torch.float32
    if dtype not in _DTYPES.values():
        raise InvalidRequest(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}")
    return where, dtype


def make_engine(bundle: Bundle, config: GeneratorConfig) -> Engine:
    """ "auto" is CUDA graphs on a GPU, and eager elsewhere; a named engine runs or raises.

    Eager on a GPU, or compiled, is the graphs' own steps, called; on a CPU, and for a model that cannot be folded, it
    is plain torch over the model's own modules.
    """
    if bundle.unet.unet.config.time_cond_proj_dim:
        raise ModelError(
            f"{bundle.name} is a latent consistency model: its UNet is told the guidance (time_cond_proj_dim), which "
            "no engine here does. Run it through diffusers' own pipeline; `ragturbo eval` has it as lcm:<folder>."
        )
    if config.engine == "graph" and bundle.device.type != "cuda":
        raise InvalidRequest("engine='graph' captures CUDA graphs and needs a CUDA device; use 'eager' or 'auto' here")
    why_plain = "the fused modules are for GPUs"
    if bundle.device.type == "cuda" or config.compile:
        from ragturbo.engine.graph_engine import GraphEngine
        from ragturbo.engine.cuda_graphs import Direct

        captured = bundle.device.type == "cuda" and config.engine != "eager"
        try:
            return GraphEngine(bundle, config, None if captured else Direct(bundle.device))
        except ModelError as error:
            if config.engine == "graph" or config.compile:
                raise
            why_plain = str(error)
            log.warning("the model runs in plain torch: %s", error)
    from ragturbo.engine.reference import ReferenceEngine

    set_attention(bundle, config.attention)
    return ReferenceEngine(bundle, prompt_cache=config.prompt_cache, why_plain=why_plain)


def set_attention(bundle: Bundle, name: str) -> None:
    """diffusers' own processors run torch's scaled_dot_product_attention, which is "sdpa" and "auto"."""
    if name == "triton":
        raise InvalidRequest("attention='triton' is for the fused modules; plain torch runs sdpa or xformers")
    if name == "xformers":
        try:
            bundle.unet.unet.enable_xformers_memory_efficient_attention()
        except Exception as error:  # diffusers and xformers each raise their own kinds
            raise InvalidRequest(f"attention='xformers' cannot run here: {error}") from error


def open_source(database: Any, bundle: Bundle, config: GeneratorConfig) -> DatabaseSource:
    """Opens a folder where it must, and refuses a database that another model made."""
    from ragturbo.engine.database import DatabaseSource
    from ragturbo.retrieval import Database

    if isinstance(database, (str, os.PathLike)):
        database = Database.open(database)
    if not isinstance(database, Database):
        raise InvalidRequest(f"database={database!r} must be a folder or a ragturbo.Database")
    return DatabaseSource.open(database, bundle, config)
