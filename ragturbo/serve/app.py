"""The application: routes, their schema, and the life of the model behind them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ragturbo import __version__
from ragturbo.errors import DatabaseError, InvalidRequest
from ragturbo.output import Output
from ragturbo.serve.border import Border
from ragturbo.serve.config import ServeConfig
from ragturbo.serve.problems import ErrorBody, Problem, invalid, problem_of
from ragturbo.serve.schema import (
    Health,
    ImageRequest,
    ImagesResponse,
    ModelData,
    ModelList,
    Swap,
    Swapped,
    finite,
    limited,
    neighbors_of,
)
from ragturbo.serve.service import ClientGone, Service

if TYPE_CHECKING:
    from collections.abc import Callable

    from ragturbo.generate import Generator

log = logging.getLogger("ragturbo")
# What nginx writes for a client that closed the connection: nobody reads it but the metrics.
CLIENT_GONE = 499
METRICS = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    config: ServeConfig | None = None,
    *,
    generator: Generator | None = None,
    background: bool = True,
    on_failure: Callable[[], None] | None = None,
) -> FastAPI:
    """generator: a loaded one, which the caller closes. background: answer /health while the model loads; otherwise
    start-up waits for it. on_failure: called where loading failed in the background."""
    service = Service(config or ServeConfig(), generator)
    owned = generator is None

    async def load() -> None:
        try:
            await asyncio.wrap_future(_loading(service))
        except Exception as error:
            service.error = error
            if not background:
                raise
            log.error("the model could not be loaded: %s", error)
            if on_failure is not None:
                on_failure()

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(load())
        if not background:
            await loading
        yield
        service.draining = True
        if not loading.done():
            # It cannot be stopped half-way, and may take minutes.
            service.abandon()
            loading.cancel()
        elif owned:
            await asyncio.to_thread(service.close)

    # No pages that fetch scripts from elsewhere.
    app = FastAPI(title="ragturbo", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.service = service
    _add_refusals(app, service)
    _add_images(app, service)
    _add_operations(app, service)
    if service.config.admin_keys:
        _add_admin(app, service)
    app.add_middleware(Border, service=service)
    return app


def _loading(service: Service) -> Future[None]:
    """In a thread of its own: asyncio would wait for one of its pool before it lets the process end."""
    future: Future[None] = Future()
    # Running from the start: whoever stops waiting for it does not cancel it.
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            service.load()
        except BaseException as error:  # it belongs to whoever waits
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="ragturbo-load", daemon=True).start()
    return future


def _add_refusals(app: FastAPI, service: Service) -> None:
    # Coroutines: a plain function would be sent to a thread, and a refusal would wait for one.
    async def refuse(request: Request, error: Any) -> Response:
        service.metrics.rejections.labels(error.code).inc()
        return error.response()

    async def refuse_http(request: Request, error: Any) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return await refuse(request, Problem(error.status_code, str(error.detail), code=code, headers=error.headers))

    app.add_exception_handler(Problem, refuse)
    app.add_exception_handler(HTTPException, refuse_http)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


async def _read(request: Request, model: type[BaseModel]) -> Any:
    """The body as `model`, from its bytes: whatever is wrong with them ends in one kind of 400."""
    if request.scope["query_string"]:
        message = "the query string is not read here: fields go into the body"
        raise Problem(400, message, code="unknown_parameter", param="query")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps a web page from making a browser ask on its behalf.
        raise Problem(415, f"content-type {kind!r} is not application/json", code="unsupported_media_type")
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        raise invalid(error, list(model.model_fields)) from None


def _add_images(app: FastAPI, service: Service) -> None:
    config, metrics = service.config, service.metrics
    takes = limited(config.max_prompt, config.max_images)

    @app.post(
        "/v1/images/generations",
        operation_id="create_image",
        summary="Text to image.",
        response_model=ImagesResponse,
        responses=_errors(400, 401, 404, 408, 413, 415, 429, 500, 503),
        openapi_extra=_takes(takes),
    )
    async def create_image(request: Request) -> Response:
        begin = time.perf_counter()

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        with metrics.in_flight.track_inprogress():
            try:
                fields: ImageRequest = await _read(request, takes)
                if fields.model not in (None, config.model_id):
                    message = f"there is no model {fields.model[:80]!r} here; /v1/models names those there are"
                    raise Problem(404, message, code="model_not_found", param="model")
                if fields.return_neighbors and not service.blends(fields.mode):
                    message = "return_neighbors has no effect where nothing is blended in: mode 'none', or no database"
                    raise Problem(400, message, code="invalid_value", param="return_neighbors")
                options = fields.call_options()
                output = await service.draw(fields.prompt, options, gone)
                own = service.serving().default_size
                size = f"{options.get('width', own)}x{options.get('height', own)}"
                if fields.return_neighbors:
                    # A neighbour's record is read from the disk when it is looked at: not on the loop's thread.
                    answer = await asyncio.to_thread(_answer, config.model_id, size, fields, output)
                else:
                    answer = _answer(config.model_id, size, fields, output)
            except (ClientGone, ClientDisconnect):
                metrics.cancellations.inc()
                return Response(status_code=CLIENT_GONE)
            except asyncio.CancelledError:
                # Ray's way of saying the same.
                metrics.cancellations.inc()
                raise
            except Exception as error:
                raise problem_of(error, quote=config.log_prompts) from None
            metrics.made(output, time.perf_counter() - begin)
            return answer

    @app.get("/v1/models", operation_id="list_models", summary="What is served.", responses=_errors(401))
    async def list_models() -> ModelList:
        return ModelList(data=[ModelData(id=config.model_id, created=service.created)])


def _answer(model: str, size: str, fields: ImageRequest, output: Output) -> Response:
    data = []
    for i, image in enumerate(output.images):
        entry = {"b64_json": base64.b64encode(image).decode(), "seed": output.seeds[i], "lam": finite(output.lam[i])}
        data.append(entry | ({"neighbors": neighbors_of(output, i)} if fields.return_neighbors else {}))
    body = {
        "created": int(time.time()),
        "model": model,
        "size": size,
        "output_format": fields.output_format or "png",
        "mode": output.mode,
        "data": data,
        "timings": output.timings,
        "notes": output.notes,
    }
    return Response(json.dumps(body), media_type="application/json")


def _add_operations(app: FastAPI, service: Service) -> None:
    unavailable: dict[int | str, dict[str, Any]] = {503: {"model": Health}}

    @app.get("/health/live", operation_id="live", summary="Whether to keep this process.", responses=unavailable)
    async def live() -> Response:
        return JSONResponse({"status": service.status}, 200 if service.alive else 503)

    @app.get("/health/ready", operation_id="ready", summary="Whether to send requests here.", responses=unavailable)
    async def ready() -> Response:
        return JSONResponse({"status": service.status}, 200 if service.status == "ready" else 503)

    @app.get(
        "/metrics",
        operation_id="metrics",
        summary="For Prometheus.",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": METRICS})


def _add_admin(app: FastAPI, service: Service) -> None:
    @app.post(
        "/admin/database",
        operation_id="swap_database",
        summary="Puts another database, or this one's newest generation, in use; no request fails for it.",
        response_model=Swapped,
        responses=_errors(400, 401, 408, 413, 415, 500, 503),
        openapi_extra=_takes(Swap),
    )
    async def swap_database(request: Request) -> Response:
        try:
            asked = await _read(request, Swap)
            return JSONResponse(await asyncio.to_thread(service.swap, asked.path))
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except (DatabaseError, InvalidRequest, OSError, ValueError) as error:
            raise Problem(400, str(error), code="database_refused", param="path") from None
        except Exception as error:
            raise problem_of(error, quote=service.config.log_prompts) from None
