"""Bodies in and streams out, with bounds: bodies that are too long or too slow, and clients that vanish or do not read.

A client that vanishes or stops reading loses its request; the engine is never kept waiting by it, since tokens wait in
a list no longer than the answer.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipelines.server.errors import ApiError
from pipelines.server.gate import NOTES

DONE = b"data: [DONE]\n\n"

_Result = TypeVar("_Result")


async def read_body(request: Request, *, most_bytes: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is too long, or does not come.
    """
    too_long = ApiError(413, f"the body is longer than {most_bytes} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > most_bytes:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, "the body did not come in time", code="body_timeout") from None
    return bytes(body)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Do some work for a client, whose request has been read, for as long as it is there.

    Raises:
        ClientDisconnect: it has gone; the work was cancelled.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A stream of server-sent events.

    Args:
        events: what is sent; ended early where the client has gone or does not read.
        close: called at the end, however it comes.
        slow_reader_s: seconds a client may leave what was sent unread.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: Callable[[], AsyncIterator[bytes]], *, close: Callable[[], None], slow_reader_s: float
    ) -> None:
        super().__init__()
        self._events, self._close, self._slow_reader_s = events, close, slow_reader_s
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        notes = scope.setdefault(NOTES, {})
        try:
            await unless_gone(receive, self._send_all(send))
        except ClientDisconnect:
            notes["gone"] = True
        except TimeoutError:
            notes["slow"] = True
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        await self._sent(send({"type": "http.response.start", "status": 200, "headers": self.raw_headers}))
        async with aclosing(self._events()) as events:  # type: ignore[type-var]
            async for data in events:
                await self._sent(send({"type": "http.response.body", "body": data, "more_body": True}))
        await self._sent(send({"type": "http.response.body", "body": b"", "more_body": False}))

    async def _sent(self, sending: Awaitable[None]) -> None:
        async with asyncio.timeout(self._slow_reader_s):
            await sending
