"""The HTTP side: addresses, statuses, and every refusal in OpenAI's shape. Decides nothing about decoding."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from pipelines.server.errors import ApiError, invalid
from pipelines.server.gate import NOTES, AccessLog, Gate
from pipelines.server.replies import Reply
from pipelines.server.schemas import ChatRequest, CompletionRequest, parsed
from pipelines.server.service import READY, Service
from pipelines.server.transport import EventStream, read_body, unless_gone

DOMAIN_HEADER = "x-dspark-domain"
TELL_HEADER = "x-dspark-stats"
_DOMAIN = re.compile(r"[A-Za-z0-9_.-]{0,64}")
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CLIENT_GONE = 499


def make_app(service: Service) -> FastAPI:
    """The application of one server, which starts and ends with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    settings = service.settings
    app = FastAPI(title="dspark", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    open_paths = frozenset({"/health", *(["/metrics"] if settings.open_metrics else [])})
    app.add_middleware(Gate, token=settings.token, open_paths=open_paths)
    app.add_middleware(AccessLog)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unforeseen)
    _add_completions(app, service)
    _add_about(app, service)
    return app


def _add_completions(app: FastAPI, service: Service) -> None:
    """The two that decode."""

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, request, ChatRequest)


def _add_about(app: FastAPI, service: Service) -> None:
    """Those that tell of the server."""

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.serving(name)
        return JSONResponse(_model(service))

    @app.get("/health")
    async def health() -> Response:
        label = None if service.version is None else service.version.label
        status = 200 if service.state == READY else 503
        return JSONResponse({"status": service.state, "version": label}, status_code=status)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=_METRICS_TYPE)

    @app.post("/admin/reload")
    async def reload() -> Response:
        if not service.settings.token:
            raise ApiError(403, "this server has no token, so nobody may reload it", code="no_token")
        changed = await service.reload()
        return JSONResponse({"version": service.serving().label, "changed": changed})


async def _answer(service: Service, request: Request, kind: type[CompletionRequest] | type[ChatRequest]) -> Response:
    """Read, check, decode and answer one request."""
    limits = service.settings.limits
    service.serving()
    body = await read_body(request, most_bytes=limits.max_body_bytes, seconds=limits.body_s)
    asked = parsed(kind, body)
    domain = request.headers.get(DOMAIN_HEADER) or asked.domain
    if not _DOMAIN.fullmatch(domain):
        raise invalid("a domain is up to 64 letters, digits, dots, dashes and underscores", param="metadata")
    version = service.serving(asked.model)
    answers = await service.answers(asked, domain=domain)
    reply = Reply(
        asked,
        answers,
        model=asked.model,
        version=version,
        tells=asked.dspark or request.headers.get(TELL_HEADER) == "1",
    )

    def close() -> None:
        answers.close()
        request.scope[NOTES] |= {
            "version": version.label,
            "prompt_tokens": answers.prompt_tokens,
            "completion_tokens": answers.completion_tokens,
            "finish": [answer.finish_reason for answer in answers.each],
        }

    if asked.stream:
        return EventStream(reply.events, close=close, slow_reader_s=limits.slow_reader_s)
    try:
        return JSONResponse(await unless_gone(request.receive, reply.whole()))
    finally:
        close()


def _model(service: Service) -> dict[str, Any]:
    version = service.serving()
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "dspark",
        "version": version.label,
        "max_model_len": version.context_limit,
    }


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "this handler is registered for it"
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """What routing refuses: addresses that are not there, and methods they do not take."""
    assert isinstance(error, HTTPException), "this handler is registered for it"
    body = ApiError(error.status_code, f"{error.detail}: see /v1/models", code="no_such_address").body
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this any more; it is for the access log."""
    return PlainTextResponse("", status_code=_CLIENT_GONE)


async def _unforeseen(request: Request, error: Exception) -> Response:
    """A mistake of ours. The server goes on, and the traceback is in its log."""
    return JSONResponse(ApiError(500, "internal error; the server's log says more").body, status_code=500)
