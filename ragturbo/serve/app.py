"""The ASGI application: routes, OpenAPI schema, and loading and closing the model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ragturbo.errors import DatabaseError, InvalidRequest
from ragturbo.messages import short
from ragturbo.output import Output
from ragturbo.serve import docs_page, paths, schema
from ragturbo.serve.api_errors import APIError, ErrorBody
from ragturbo.serve.body import read_body, read_query
from ragturbo.serve.config import ServeConfig
from ragturbo.serve.middleware import RequestMiddleware
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

    # FastAPI's documentation pages load scripts from other hosts; /docs is ours.
    app = FastAPI(
        title="ragturbo",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # The middleware removes trailing slashes.
        redirect_slashes=False,
    )
    app.state.service = service

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = paths.inside(request.scope)
        if error.status_code == 404:
            raise paths.not_found(path)
        if error.status_code == 405:
            raise paths.not_allowed(request.method, path, (error.headers or {}).get("Allow", ""))
        raise APIError(error.status_code, str(error.detail), code="invalid_request", headers=error.headers)

    _add_api_routes(app, service)
    _add_monitoring_routes(app, service)
    _add_docs_routes(app, service)
    if service.config.admin_keys:
        _add_admin_routes(app, service)
    app.add_middleware(RequestMiddleware, service=service)
    return app


REASONS = {
    400: "A field is unknown, out of range or without effect; see `param`.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or path.",
    408: "The body arrived too slowly.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too many requests are waiting; try again after Retry-After seconds.",
    500: "The model produced NaN or infinity, ran out of device memory, or failed.",
    503: "The model is being loaded, the deadline has passed, or the device is lost; see Retry-After.",
}


def _error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": REASONS[status]} for status in statuses}


def _request_body(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


def _add_api_routes(app: FastAPI, service: Service) -> None:
    config, metrics = service.config, service.metrics
    request_model = schema.limited_request(config.max_prompt, config.max_images)

    @app.post(
        paths.IMAGES,
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
            fields, ignored = await read_body(request, request_model, lenient=config.lenient)
            if fields.model not in (None, config.model_id):
                raise unknown_model(fields.model)
            if not service.retrieves(fields.mode) and fields.return_neighbors:
                message = "return_neighbors has no effect with mode 'none', or without a database"
                raise APIError(400, message, code="invalid_value", param="return_neighbors")
            width, height = service.size(fields.size)
            options = fields.call_options() | {"width": width, "height": height}
            output = await service.generate(fields.prompt, options, disconnected)
            output.notes += service.report_ignored(ignored)
            if fields.return_neighbors:
                # Captions are read from disk, which must not block the event loop.
                response = await asyncio.to_thread(_response, service, fields, options, output)
            else:
                response = _response(service, fields, options, output)
            metrics.record(output, time.perf_counter() - begin)
            return response

    def own_model() -> schema.ModelData:
        return schema.ModelData(id=config.model_id, created=service.created)

    def unknown_model(name: str) -> APIError:
        message = f"there is no model {short(name)} here; this server has {config.model_id!r}"
        return APIError(404, message, code="model_not_found", param="model")

    @app.get(paths.MODELS, operation_id="list_models", summary="List models.", responses=_error_responses(400, 401))
    async def list_models(request: Request) -> schema.ModelList:
        service.report_ignored(read_query(request, lenient=config.lenient))
        return schema.ModelList(data=[own_model()])

    # Ids of the hub contain a slash, which clients may send as it is or as %2F.
    @app.get(
        "/v1/models/{model:path}",
        operation_id="get_model",
        summary="Describe a model.",
        responses=_error_responses(400, 401, 404),
        # Declared here: a parameter of the function would add FastAPI's 422 to the schema.
        openapi_extra={
            "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
        },
    )
    async def get_model(request: Request) -> schema.ModelData:
        service.report_ignored(read_query(request, lenient=config.lenient))
        if (model := request.path_params["model"]) != config.model_id:
            raise unknown_model(model)
        return own_model()


def _response(service: Service, fields: schema.ImageRequest, options: dict[str, Any], output: Output) -> Response:
    data = []
    for i, image in enumerate(output.images):
        b64_json = base64.b64encode(image).decode()
        data.append(schema.ImageData(b64_json=b64_json, seed=output.seeds[i], lam=output.lam[i]))
        if fields.return_neighbors:
            data[i].neighbors = [schema.NeighborData.model_validate(neighbor) for neighbor in output.neighbors[i]]
    body = schema.ImagesResponse(
        created=int(time.time()),
        model=service.config.model_id,
        size=f"{options['width']}x{options['height']}",
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


def _add_docs_routes(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    @app.get(paths.DOCS, include_in_schema=False)
    async def docs(request: Request) -> Response:
        sizes = service.sizes() if service.warm else None
        page = docs_page.render(app.openapi(), service.config, sizes, base_url=str(request.base_url).rstrip("/"))
        return HTMLResponse(page, headers=docs_page.HEADERS)


def _add_admin_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        paths.DATABASE,
        operation_id="swap_database",
        summary="Replace or reopen the database without failing requests.",
        response_model=schema.SwapResponse,
        responses=_error_responses(400, 401, 408, 413, 415, 500, 503),
        openapi_extra=_request_body(schema.SwapRequest),
    )
    async def swap_database(request: Request) -> Response:
        fields, _ = await read_body(request, schema.SwapRequest)
        try:
            return JSONResponse(await asyncio.to_thread(service.swap, fields.path))
        except (DatabaseError, InvalidRequest, OSError, ValueError) as error:
            raise APIError(400, str(error), code="database_refused", param="path") from None
