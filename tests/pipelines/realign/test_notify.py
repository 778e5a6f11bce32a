"""Decisions are told to whoever asked, and nobody who does not answer stops a re-alignment."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from pipelines.realign.cycle import PROMOTED, Ended
from pipelines.realign.notify import announce, post

ENDED = Ended("c", "s", "e", PROMOTED, "faster", "v1", "v2", "t", figures={"speed_ratio": 1.2, "why": ["x"]})


class Listener(BaseHTTPRequestHandler):
    """Keeps what is posted; answers 500 below /broken."""

    got: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        Listener.got.append(json.loads(body))
        self.send_response(500 if self.path.startswith("/broken") else 204)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hook() -> Iterator[str]:
    """Address of a listener."""
    Listener.got = []
    server = HTTPServer(("127.0.0.1", 0), Listener)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class Tracker:
    """Keeps what is logged, or fails."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails, self.logged = fails, {}  # type: tuple[bool, dict[str, float]]

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        if self.fails:
            raise ConnectionError("gone")
        self.logged |= metrics

    def finish(self) -> None:
        """Nothing to close."""


def test_webhook_and_tracker_are_told(hook: str) -> None:
    tracker = Tracker()
    announce(ENDED, pair="p", url=f"{hook}/T0KEN", tracker=tracker)
    (event,) = Listener.got
    assert (event["event"], event["pair"], event["outcome"], event["version"]) == ("realign", "p", "promoted", "v2")
    assert tracker.logged == {"realign/promoted": 1.0, "speed_ratio": 1.2}


@pytest.mark.parametrize("path", ["/broken/T0KEN", None])
def test_whoever_does_not_answer_is_named_without_the_secret(
    hook: str, path: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{hook}{path}" if path else "http://127.0.0.1:9/T0KEN"
    with caplog.at_level(logging.WARNING):
        assert not post(url, {"event": "realign"})
        announce(ENDED, pair="p", url=url, tracker=Tracker(fails=True))
    assert "the decision stands all the same" in caplog.text and "T0KEN" not in caplog.text


def test_without_a_webhook_nothing_is_sent() -> None:
    assert not post("", {})
