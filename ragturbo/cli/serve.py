"""`ragturbo serve`: an HTTP endpoint for OpenAI's image clients."""

from __future__ import annotations

import importlib.util
import logging
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from ragturbo.cli import options
from ragturbo.errors import InvalidRequest


def serve(
    model: options.Model = "shapes",
    database: options.Database = None,
    adapter: options.Adapter = None,
    name: Annotated[str | None, typer.Option(help="The model id clients see.")] = None,
    host: Annotated[str, typer.Option(help="The default accepts connections from this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="A file with one key per line. Alternative: RAGTURBO_API_KEYS=key,key")
    ] = None,
    admin_keys: Annotated[
        Path | None, typer.Option(help="The same for POST /admin/database. Alternative: RAGTURBO_ADMIN_KEYS=key,key")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Deadline of a request, in seconds.")] = 10.0,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more are refused.")] = 64,
    batch_sizes: Annotated[str, typer.Option(help="Powers of two.")] = "1,2,4,8",
    batch_window: Annotated[float, typer.Option(help="Seconds to wait for more requests to batch.")] = 0.0,
    max_images: Annotated[int, typer.Option(help="Images per request.")] = 10,
    max_prompt: Annotated[int, typer.Option(help="Characters per prompt.")] = 4000,
    max_body: Annotated[int, typer.Option(help="Bytes per request.")] = 64 * 1024,
    body_timeout: Annotated[float, typer.Option(help="Seconds in which a request has to arrive.")] = 10.0,
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Ignore and report unknown fields instead of refusing them.")
    ] = False,
    max_side: Annotated[int | None, typer.Option(help="Pixels. Default: twice the model's native size.")] = None,
    host_cache: Annotated[str | None, typer.Option(help='Host memory for features, such as "8GiB".')] = None,
    device_cache: Annotated[str | None, typer.Option(help='Device memory for features, such as "1GiB".')] = None,
    prompt_cache: Annotated[int, typer.Option(help="Number of encoded prompts to keep.")] = 0,
    distilled: Annotated[
        bool | None,
        typer.Option(
            "--distilled/--undistilled", help="Whether the model was distilled to few steps. Default: as it says."
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    engine: options.Engine = "auto",
    capture: options.Capture = True,
    retriever: options.Retriever = "auto",
    compose: options.Compose = None,
    attention: options.Attention = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile; starting takes longer.")] = False,
    vae: options.Vae = "full",
    postprocess: Annotated[
        str | None, typer.Option(help="module:function, called on every uint8 batch, such as a safety filter.")
    ] = None,
    drain_delay: Annotated[float, typer.Option(help="Seconds to keep serving after SIGTERM.")] = 0.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log prompts.")] = False,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request, without its prompt.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the hub.")] = None,
    local_files_only: options.LocalFilesOnly = False,
) -> None:
    """Serve images over HTTP at POST /v1/images/generations, in OpenAI's format.

    SIGTERM finishes accepted requests and stops the server; SIGHUP reopens the database. See docs/serving.md.
    """
    _ignore_hangups()
    _require_packages()
    from ragturbo.serve.config import ServeConfig, keys_from_environment, read_keys
    from ragturbo.terminal import quiet_libraries

    quiet_libraries()
    # Keys are not command line arguments: every user of the machine can read those.
    clients, admins = keys_from_environment()
    config = ServeConfig(
        model=model, database=options.path_or_off(database), adapter=options.path_or_off(adapter), name=name,
        device=device, dtype=dtype, distilled=distilled, local_files_only=local_files_only,
        revision=revision, postprocess=postprocess,
        host=host, port=port, drain_delay=drain_delay, log_prompts=log_prompts, access_log=access_log,
        api_keys=clients if api_keys is None else read_keys(api_keys),
        admin_keys=admins if admin_keys is None else read_keys(admin_keys),
        timeout=timeout, body_timeout=body_timeout,
        max_images=max_images, max_prompt=max_prompt, max_body=max_body, max_side=max_side,
        lenient=lenient,
        options={
            "engine": engine, "capture": capture, "compile": compile, "attention": attention, "vae": vae,
            "retriever": retriever, "compose": compose, "host_cache": host_cache, "device_cache": device_cache,
            "batch_sizes": _parse_sizes(batch_sizes), "batch_window": batch_window, "max_queue": max_queue,
            "prompt_cache": prompt_cache,
        },
    )  # fmt: skip
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for logger in ("ragturbo", "uvicorn.access"):
        logging.getLogger(logger).setLevel(logging.INFO)
    from ragturbo.model.find import Hub, is_local, look
    from ragturbo.serve.server import serve as run

    if is_local(model):
        look(
            model, Hub(local_files_only, revision), adapter=config.adapter, database=config.database,
            distilled=distilled, vae=vae,
        )  # fmt: skip

    run(config)


def _ignore_hangups() -> None:
    """Ignore SIGHUP until the server installs its handler: the default action ends the process."""
    if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _require_packages() -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise InvalidRequest(f"ragturbo serve needs {package}: pip install 'ragturbo[serve]'")


def _parse_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise InvalidRequest(f"batch_sizes={text!r} must be whole numbers separated by commas") from None
