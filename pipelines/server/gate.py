"""What every request passes first: the token, and one line in the access log. Never sees bodies, so logs no prompts."""

import json
import logging
import time
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.server.auth import is_allowed
from pipelines.server.errors import ApiError

logger = logging.getLogger("dspark.access")

NOTES = "dspark.notes"
"""Key of the scope under which handlers leave what the access log is to tell of a request."""
_LONGEST_PATH = 200


class AccessLog:
    """Writes one line of JSON for every request that has been answered or given up."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500  # what follows an exception that nobody foresaw
        notes: dict[str, Any] = scope.setdefault(NOTES, {})

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            line = {
                "method": scope["method"],
                "path": scope["path"][:_LONGEST_PATH],
                "status": status,
                "seconds": round(time.monotonic() - began, 4),
                **notes,
            }
            logger.info("%s", json.dumps(line))


class Gate:
    """Turns away who does not show the token.

    Args:
        app: behind the gate.
        token: that is expected; empty lets everyone in.
        open_paths: answered without it.
    """

    def __init__(self, app: ASGIApp, *, token: str, open_paths: frozenset[str]) -> None:
        self._app, self._token, self._open = app, token, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        closed = scope["type"] == "http" and self._token and scope["path"] not in self._open
        if closed and not is_allowed(scope["headers"], token=self._token):
            refusal = ApiError(401, "this server wants a token: Authorization: Bearer ...", code="invalid_api_key")
            await JSONResponse(refusal.body, status_code=401, headers=refusal.headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)
