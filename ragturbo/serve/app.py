"""The ASGI application: routes, OpenAPI schema, and loading and closing the model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from ragturbo.errors import DatabaseError, InvalidRequest
from ragturbo.output import Output
from ragturbo.serve import schema
from ragturbo.serve.api_errors import APIError, ErrorBody, validation_error
from ragturbo.serve.config import ServeConfig
from ragturbo.serve.middleware import IMAGES, RequestMiddleware
from ragturbo.serve.service import Service
from ragturbo.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from ragturbo.generate import Generator

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    config: ServeConfig | None = None,
    *,
    generator: Generator | None = None,
    background: bool = True,
    on_failure: Callable[[], None] | None = None,
) -> FastAPI:
    """Create the application.

    Args:
        generator: a loaded Generator, which the caller closes; None: load one as `config` says.
        background: load while the server already answers /health; otherwise start-up waits for the model.
        on_failure: called if loading in the background fails.
    """
    service = Service(config or ServeConfig(), generator)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.wrap_future(service.start_loading(on_failure))
        if not background:
            await loading
            if service.error is not None:
                raise service.error
        yield
        service.draining = True
        if not loading.done():
            # Loading cannot be interrupted and may take minutes.
            service.abandoned = True
            loading.cancel()
        elif generator is None:
            await asyncio.to_thread(service.close)

    # FastAPI's documentation pages load scripts from other hosts.
    app = FastAPI(title="ragturbo", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        raise APIError(error.status_code, str(error.detail), code=code, headers=error.headers)

    _add_api_routes(app, service)
    _add_monitoring_routes(app, service)
    if service.config.admin_keys:
        _add_admin_routes(app, service)
    app.add_middleware(RequestMiddleware, service=service)
    return app


def _error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


def _request_body(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


async def _parse_body(request: Request, model: type[BaseModel]) -> Any:
    """Parse the body as `model`. Raises APIError with status 400 for anything invalid."""
    if request.scope["query_string"]:
        message = "query parameters are not supported; send fields in the body"
        raise APIError(400, message, code="unknown_parameter", param="query")
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        # This also prevents cross-site requests: browsers send JSON to another origin only after a preflight.
        raise APIError(415, f"content-type {media_type!r} is not application/json", code="unsupported_media_type")
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        raise validation_error(error, list(model.model_fields)) from None


def _add_api_routes(app: FastAPI, service: Service) -> None:
    config, metrics = service.config, service.metrics
    request_model = schema.limited_request(config.max_prompt, config.max_images)

    @app.post(
        IMAGES,
        operation_id="create_image",
        summary="Generate images from text.",
        response_model=schema.ImagesResponse,
        responses=_error_responses(400, 401, 404, 408, 413, 415, 429, 500, 503),
        openapi_extra=_request_body(request_model),
    )
    async def create_image(request: Request) -> Response:
        begin = time.perf_counter()

        async def disconnected() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        with metrics.in_flight.track_inprogress():
            fields: schema.ImageRequest = await _parse_body(request, request_model)
            if fields.model not in (None, config.model_id):
                message = f"model {fields.model[:80]!r} not found; see /v1/models"
                raise APIError(404, message, code="model_not_found", param="model")
            if fields.return_neighbors and not service.retrieves(fields.mode):
                message = "return_neighbors has no effect with mode 'none', or without a database and an adapter"
                raise APIError(400, message, code="invalid_value", param="return_neighbors")
            options = fields.call_options()
            output = await service.generate(fields.prompt, options, disconnected)
            if fields.return_neighbors:
                # Captions are read from disk, which must not block the event loop.
                response = await asyncio.to_thread(_response, service, fields, options, output)
            else:
                response = _response(service, fields, options, output)
            metrics.record(output, time.perf_counter() - begin)
            return response

    @app.get("/v1/models", operation_id="list_models", summary="List models.", responses=_error_responses(401))
    async def list_models() -> schema.ModelList:
        return schema.ModelList(data=[schema.ModelData(id=config.model_id, created=service.created)])


def _response(service: Service, fields: schema.ImageRequest, options: dict[str, Any], output: Output) -> Response:
    default = service.loaded_generator().default_size
    data = []
    for i, image in enumerate(output.images):
        b64_json = base64.b64encode(image).decode()
        data.append(schema.ImageData(b64_json=b64_json, seed=output.seeds[i], lam=output.lam[i]))
        if fields.return_neighbors:
            data[i].neighbors = [schema.NeighborData.model_validate(neighbor) for neighbor in output.neighbors[i]]
    body = schema.ImagesResponse(
        created=int(time.time()),
        model=service.config.model_id,
        size=f"{options.get('width', default)}x{options.get('height', default)}",
        output_format=options["output_type"],
        mode=output.mode,
        data=data,
        timings=output.timings,
        notes=output.notes,
    )
    # NaN is written as null; neighbors are left out if they were not requested.
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")


def _add_monitoring_routes(app: FastAPI, service: Service) -> None:
    unavailable: dict[int | str, dict[str, Any]] = {503: {"model": schema.Health}}

    @app.get("/health/live", operation_id="live", summary="503 if a restart is needed.", responses=unavailable)
    async def live() -> Response:
        return JSONResponse({"status": service.status}, 200 if service.alive else 503)

    @app.get("/health/ready", operation_id="ready", summary="200 if requests are accepted.", responses=unavailable)
    async def ready() -> Response:
        return JSONResponse({"status": service.status}, 200 if service.status == "ready" else 503)

    @app.get(
        "/metrics",
        operation_id="metrics",
        summary="Prometheus metrics.",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": METRICS_TYPE})


def _add_admin_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/admin/database",
        operation_id="swap_database",
        summary="Replace or reopen the database without failing requests.",
        response_model=schema.SwapResponse,
        responses=_error_responses(400, 401, 408, 413, 415, 500, 503),
        openapi_extra=_request_body(schema.SwapRequest),
    )
    async def swap_database(request: Request) -> Response:
        fields = await _parse_body(request, schema.SwapRequest)
        try:
            return JSONResponse(await asyncio.to_thread(service.swap, fields.path))
        except (DatabaseError, InvalidRequest, OSError, ValueError) as error:
            raise APIError(400, str(error), code="database_refused", param="path") from None
