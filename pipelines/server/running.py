"""The process of a server: its socket, its event loop, and the signals that end it in good order."""

import asyncio
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from inference.errors import InputError
from pipelines.server.app import make_app
from pipelines.server.service import Service
from pipelines.server.settings import ServerSettings

logger = logging.getLogger(__name__)

_LAST_ANSWERS_S = 5
"""Seconds for what was decoded to reach its clients after the last request has left the engine."""
_KEEP_ALIVE_S = 30
_LINGER_S = 10.0


class Running(uvicorn.Server):
    """A server that drains at the first SIGTERM or ctrl-c, and ends at once at the second.

    Attributes:
        ended_by: the first signal, or None.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.service = Service(settings, on_exit=self._exit)
        self.ended_by: int | None = None
        super().__init__(
            uvicorn.Config(
                make_app(self.service),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_LAST_ANSWERS_S,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called on a signal, and by those who run the server in a thread."""
        if self.ended_by is None:
            self.ended_by = sig
            self.service.drain(seconds=self.service.settings.limits.drain_s)
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: end once drained."""
        if self.service.drained():
            self.should_exit = True
        return await super().on_tick(counter)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end; also closes what a forced end leaves open."""
        try:
            await super().serve(sockets)
        finally:
            if self.force_exit:
                await self.service.close()

    def _exit(self) -> None:
        self.should_exit = True


def listening(settings: ServerSettings) -> socket.socket:
    """A socket that listens where the settings say.

    Raises:
        InputError: nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":
        # Connections inherit it: the kernel itself lets go of a client that acknowledges nothing or never reads, whose
        # request was cancelled before.
        seconds = settings.limits.slow_reader_s + _LINGER_S
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))
    try:
        found.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        found.close()
        raise InputError(
            f"cannot listen on {settings.host}, port {settings.port}: {error}",
            where="--port",
            mend="choose another port or host",
        ) from None
    return found


def serve(settings: ServerSettings) -> int:
    """Serve until a signal; returns the exit code: 130 after ctrl-c, 143 after SIGTERM.

    Raises:
        InputError: it cannot listen, or the pair cannot be served.
        Exception: what the engine failed with.
    """
    found = listening(settings)
    host, port = found.getsockname()[:2]
    logger.info(
        "listening on http://%s:%d, loading %s", f"[{host}]" if ":" in host else host, port, settings.pair.folder
    )
    server = Running(settings)
    try:
        asyncio.run(server.serve(sockets=[found]))
    finally:
        found.close()
    if server.service.failure is not None:
        raise server.service.failure
    return 128 + (server.ended_by or signal.SIGTERM)
