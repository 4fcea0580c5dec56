"""`ragturbo serve`: an endpoint for OpenAI's image clients."""

from __future__ import annotations

import importlib.util
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from ragturbo.errors import InvalidRequest


def serve(
    model: Annotated[str, typer.Option(help='"shapes" (embedded), a local folder or a hub id.')] = "shapes",
    database: Annotated[str | None, typer.Option(help='A database folder, or "off".')] = None,
    adapter: Annotated[str | None, typer.Option(help='A folder with adapter.safetensors, or "off".')] = None,
    name: Annotated[str | None, typer.Option(help="The model's id for clients.")] = None,
    host: Annotated[str, typer.Option(help="The default is reached from this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="A file with a key a line; or RAGTURBO_API_KEYS, separated by commas.")
    ] = None,
    admin_keys: Annotated[
        Path | None, typer.Option(help="Keys of POST /admin/database, likewise; or RAGTURBO_ADMIN_KEYS.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds; what cannot be done by then is refused.")] = 10.0,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more are refused.")] = 64,
    batch_sizes: Annotated[str, typer.Option(help="Powers of two.")] = "1,2,4,8",
    batch_window: Annotated[float, typer.Option(help="Seconds to wait for company.")] = 0.0,
    max_images: Annotated[int, typer.Option(help="Images a request.")] = 10,
    max_prompt: Annotated[int, typer.Option(help="Characters a prompt.")] = 4000,
    max_body: Annotated[int, typer.Option(help="Bytes a request.")] = 64 * 1024,
    body_timeout: Annotated[float, typer.Option(help="Seconds a client may take to send its request.")] = 10.0,
    max_side: Annotated[int | None, typer.Option(help="Pixels; by default twice the model's own.")] = None,
    host_cache: Annotated[str | None, typer.Option(help='Features in memory, "8GiB".')] = None,
    device_cache: Annotated[str | None, typer.Option(help='Features in the device\'s memory, "1GiB".')] = None,
    prompt_cache: Annotated[int, typer.Option(help="Prompts remembered, encoded.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    engine: Annotated[str, typer.Option(help="auto, eager or graph.")] = "auto",
    retriever: Annotated[str, typer.Option(help="auto, scann, exact or bm25.")] = "auto",
    attention: Annotated[str, typer.Option(help="auto, sdpa, triton or xformers.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="By torch.compile: a slower start.")] = False,
    vae: Annotated[str, typer.Option(help="full, tiny, or the path or id of an AutoencoderTiny.")] = "full",
    postprocess: Annotated[
        str | None, typer.Option(help="module:function, a hook on every uint8 batch: a safety filter.")
    ] = None,
    drain_delay: Annotated[float, typer.Option(help="Seconds to go on serving after SIGTERM.")] = 0.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Prompts are not logged without this.")] = False,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line a request, without its prompt.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of the model on the hub.")] = None,
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Never ask the hub.")] = False,
) -> None:
    """Serve images over HTTP: POST /v1/images/generations, as OpenAI's clients send it.

    SIGTERM finishes what was accepted and ends; SIGHUP opens the database anew. See docs/serving.md.
    """
    _ignore_hangups()
    _require()
    from ragturbo.cli.terminal import quiet_libraries
    from ragturbo.serve.config import ServeConfig, keys_from_environment, read_keys

    quiet_libraries()
    # Never from the command line itself, which every user of the machine can read.
    clients, admins = keys_from_environment()
    config = ServeConfig(
        model=model,
        database=_off(database),
        adapter=_off(adapter),
        device=device,
        dtype=dtype,
        local_files_only=local_files_only,
        revision=revision,
        options={
            "engine": engine,
            "retriever": retriever,
            "attention": attention,
            "compile": compile,
            "vae": vae,
            "batch_sizes": _sizes(batch_sizes),
            "batch_window": batch_window,
            "max_queue": max_queue,
            "host_cache": host_cache,
            "device_cache": device_cache,
            "prompt_cache": prompt_cache,
        },
        name=name,
        postprocess=postprocess,
        host=host,
        port=port,
        api_keys=clients if api_keys is None else read_keys(api_keys),
        admin_keys=admins if admin_keys is None else read_keys(admin_keys),
        timeout=timeout,
        max_images=max_images,
        max_prompt=max_prompt,
        max_body=max_body,
        body_timeout=body_timeout,
        max_side=max_side,
        log_prompts=log_prompts,
        access_log=access_log,
        drain_delay=drain_delay,
    )
    _log()
    from ragturbo.serve.server import serve as run

    run(config)


def _ignore_hangups() -> None:
    """Until the server listens to SIGHUP: one that comes while it starts would end the process."""
    if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _require() -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise InvalidRequest(f"ragturbo serve needs {package}: pip install 'ragturbo[serve]'")


def _off(value: str | None) -> str | bool | None:
    return False if value == "off" else value


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise InvalidRequest(f"batch_sizes={text!r} are whole numbers, separated by commas") from None


def _log() -> None:
    import logging

    settings: dict[str, Any] = {"level": logging.WARNING, "format": "%(asctime)s %(levelname)s %(name)s %(message)s"}
    logging.basicConfig(**settings)
    for name in ("ragturbo", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.INFO)
