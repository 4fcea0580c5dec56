"""From options to parts: device and dtype, engine, database."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from ragturbo.config import check_device, check_dtype, refuse_graphs
from ragturbo.engine import packing
from ragturbo.errors import InvalidRequest, ModelError

if TYPE_CHECKING:
    from ragturbo.config import GeneratorConfig
    from ragturbo.engine.database import DatabaseGeneration
    from ragturbo.engine.executor import Engine
    from ragturbo.model.bundle import Bundle

log = logging.getLogger("ragturbo")


def choose_device(device: Any, dtype: Any) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype; None is cuda and float16 if there is a GPU, else cpu and float32."""
    check_device(device)
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest(f"device={device!r}: torch sees no CUDA GPU here; see `ragturbo info`", option="device")
    check_dtype(dtype)
    if dtype is None:
        return where, torch.float16 if where.type == "cuda" else torch.float32
    return where, getattr(torch, str(dtype).removeprefix("torch."))


def make_engine(bundle: Bundle, config: GeneratorConfig) -> Engine:
    """Choose the engine: a named one runs or raises, "auto" is the graph engine if it can run the model fast.

    Raises:
        InvalidRequest: the options exclude each other or this device.
        ModelError: no engine, or not the named one, can run the model.
    """
    if bundle.unet.unet.config.time_cond_proj_dim:
        raise ModelError(
            f"{bundle.name} is a latent consistency model: its UNet takes the guidance scale as an input "
            "(time_cond_proj_dim), which no engine here supports. Run it through diffusers' own pipeline; "
            "`ragturbo eval` has it as lcm:<folder>."
        )
    on_gpu = bundle.device.type == "cuda"
    refuse_graphs(config.engine, config.capture, on_gpu=on_gpu)
    if config.engine == "reference" and config.compile:
        raise InvalidRequest("compile=True is for the graph engine; use engine='auto', or 'graph' with capture=False")
    packs, reason = packing.choose(bundle.device, bundle.dtype, config.compile)
    if config.engine == "reference":
        reason = "it was requested"
    if config.engine == "graph" or (config.engine == "auto" and (on_gpu or config.compile or packs)):
        from ragturbo.engine.graph_engine import GraphEngine

        try:
            return GraphEngine(bundle, config)
        except ModelError as error:
            if config.engine == "graph" or config.compile:
                raise
            reason = str(error)
            log.warning("the model runs in the reference engine: %s", error)
    from ragturbo.engine.reference import ReferenceEngine

    set_attention(bundle, config.attention)
    return ReferenceEngine(bundle, prompt_cache=config.prompt_cache, reason=reason)


def set_attention(bundle: Bundle, name: str) -> None:
    """Set the attention of diffusers' modules, whose default is torch's scaled_dot_product_attention."""
    if name == "triton":
        raise InvalidRequest("attention='triton' is for the graph engine; the reference engine runs sdpa or xformers")
    if name == "xformers":
        try:
            bundle.unet.unet.enable_xformers_memory_efficient_attention()
        except Exception as error:  # diffusers and xformers each raise their own kinds
            raise InvalidRequest(f"attention='xformers' cannot run here: {error}") from error


def open_database(database: Any, bundle: Bundle, config: GeneratorConfig) -> DatabaseGeneration:
    """Open a folder or take a Database.

    Raises:
        DatabaseMismatch: another model encoded the database.
    """
    from ragturbo.engine.database import DatabaseGeneration
    from ragturbo.retrieval import Database

    if isinstance(database, (str, os.PathLike)):
        database = Database.open(database)
    if not isinstance(database, Database):
        raise InvalidRequest(f"database={database!r} must be a folder or a ragturbo.Database")
    return DatabaseGeneration.open(database, bundle, config)
