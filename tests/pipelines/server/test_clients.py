"""Clients that vanish, do not read, or send rubbish: none holds a slot, none gets a 500, and the others are served."""

import json
import logging
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.batch.engine import Outcome
from pipelines.server.settings import Limits
from tests.pipelines.server.serving import TOKEN, Live, live, settings_for, until

MODEL = "m" * 4000
"""A name that makes every chunk of a stream long, so that a client that does not read is noticed."""


@pytest.fixture(scope="module")
def strict(alias: Path) -> Iterator[Live]:
    """A server that has little patience."""
    limits = Limits(slow_reader_s=0.3, body_s=0.5, max_body_bytes=20_000, watch_s=0.0)
    with live(settings_for(alias, limits=limits, max_requests=1, model_name=MODEL), send_buffer=8192) as here:
        yield here


def _request(body: bytes, *, path: str = "/v1/completions", headers: str = "") -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode("latin-1") + body


def _body(**more: object) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "ab", "max_tokens": 300, "seed": 3, **more}).encode()


def _connected(here: Live) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(10.0)
    made.connect(("127.0.0.1", here.port))
    return made


def _raw(here: Live, data: bytes) -> bytes:
    """All that the server answers to these bytes, until it or the client closes."""
    with _connected(here) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while piece := client.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
    return answer


def _aborted(here: Live) -> float:
    return here.metrics()["vllm:request_success_total/abort"]


def _free(here: Live) -> bool:
    metrics = here.metrics()
    return metrics["vllm:num_requests_running"] == metrics["vllm:num_requests_waiting"] == 0


def _serves(here: Live) -> bool:
    with here.http() as client:
        reply = client.post("/v1/completions", json={"model": MODEL, "prompt": "ab", "max_tokens": 2})
    return reply.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_gives_its_slot_back(strict: Live, stream: bool) -> None:
    before = _aborted(strict)
    with _connected(strict) as client:
        client.sendall(_request(_body(stream=stream)))
        if stream:
            assert b"200 OK" in client.recv(2000)
        else:
            until(lambda: strict.server.service.engine_requests == 1)
        [answer] = strict.server.service.under_way
    until(lambda: strict.server.service.in_flight == 0)
    assert answer.job.handle is not None and answer.job.handle.outcome is Outcome.CANCELLED
    assert _aborted(strict) == before + 1 and _free(strict)
    assert _serves(strict)


def test_a_client_that_vanishes_while_it_waits_is_forgotten(strict: Live) -> None:
    before = _aborted(strict)
    with _connected(strict) as first:
        first.sendall(_request(_body(stream=True)))
        first.recv(2000)
        with _connected(strict) as second:
            second.sendall(_request(_body()))
            until(lambda: strict.server.service.engine_requests == 2)
            waiting = next(one for one in strict.server.service.under_way if one.job.result.passes == 0)
        until(lambda: waiting not in strict.server.service.under_way)
        assert waiting.job.handle is not None and waiting.job.handle.outcome is Outcome.CANCELLED
        assert waiting.job.result.passes == 0
    until(lambda: strict.server.service.in_flight == 0)
    assert _aborted(strict) >= before + 1 and _serves(strict)


def test_a_client_that_does_not_read_loses_its_request(strict: Live, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dspark.access")
    with _connected(strict) as client:
        # Sixteen answers of 300 chunks of 4 kB: far more than the buffers between the two hold.
        client.sendall(_request(_body(stream=True, prompt=["ab"] * 16)))
        until(lambda: len(strict.server.service.under_way) == 16)
        answers = list(strict.server.service.under_way)
        until(lambda: any('"slow": true' in record.getMessage() for record in caplog.records))
        until(lambda: strict.server.service.in_flight == 0)
        assert _free(strict) and _serves(strict)
    outcomes = [answer.job.handle.outcome for answer in answers if answer.job.handle is not None]
    assert outcomes.count(Outcome.CANCELLED) >= 8 and _aborted(strict) >= 8  # a few had ended before it was noticed


def test_a_body_that_does_not_come_is_not_waited_for(strict: Live) -> None:
    with _connected(strict) as client:
        client.sendall(_request(_body())[:-5])
        assert b" 408 " in client.recv(2000)
    assert strict.server.service.in_flight == 0


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_long_is_refused(strict: Live, declared: bool) -> None:
    body = _body(prompt="x" * 30_000)
    if declared:
        answer = _raw(strict, _request(body))
    else:
        head = _request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        answer = _raw(strict, head + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n")
    assert b" 413 " in answer and b"body_too_large" in answer


def _rubbish() -> dict[str, bytes]:
    draw = random.Random(0)
    return {
        "random bytes": draw.randbytes(4000),
        "random bytes with an end": draw.randbytes(400) + b"\r\n\r\n",
        "no http": b"hello\r\n\r\n",
        "half a request": b"POST /v1/completions HTTP/1.1\r\nHo",
        "a length that is none": _request(b"{}").replace(b"Content-Length: 2", b"Content-Length: -5"),
        "two lengths": _request(b"{}", headers="Content-Length: 7\r\n"),
        "a header in a header": _request(_body(max_tokens=2), headers="X-Dspark-Domain: a\r\n Injected: b\r\n"),
        "a long header": _request(b"{}", headers=f"X-Long: {'x' * 100_000}\r\n"),
        "deep json": _request(b'{"a":' * 3000 + b"1" + b"}" * 3000),
        "a deep list": _request(b"[" * 19_000),
        "broken json": _request(b'{"model": '),
        "other json": _request(b"[1, 2]"),
        "not utf-8": _request(b'{"model": "\xff"}'),
        "half a pair of surrogates": _request(_body(prompt="\ud800", max_tokens=2)),
        "a zero byte": _request(_body(prompt="\u0000", max_tokens=2)),
        "a huge number": _request(b'{"model": "m", "prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}"),
        "no number": _request(b'{"model": "m", "prompt": "a", "temperature": NaN}'),
        "a wrong type": _request(_body(temperature="hot")),
        "a wrong method": _request(b"{}").replace(b"POST", b"PATCH", 1),
        "a strange path": _request(b"{}", path="/%00%ff/../..//v1/%2e%2e"),
        "another reload": _request(b"{}", path="/admin/reload/../x"),
        "a domain of its own": _request(_body(max_tokens=2), headers='X-Dspark-Domain: "}{\xe9\r\n'),
        "a websocket": b"GET /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n",
    }


@pytest.mark.parametrize("name", _rubbish())
def test_rubbish_is_refused_and_the_server_lives_on(strict: Live, name: str) -> None:
    answer = _raw(strict, _rubbish()[name])
    status = answer.split(b" ", 2)[1:2]
    assert not status or status[0] in (b"200", b"400", b"401", b"404", b"405", b"413"), answer[:200]
    assert b"Traceback" not in answer and b"Injected" not in answer
    assert _serves(strict)


def test_the_access_log_tells_figures_and_neither_prompts_nor_tokens(
    strict: Live, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with strict.http() as client:
        body = {"model": MODEL, "prompt": "my secret", "max_tokens": 3}
        told = client.post("/v1/completions?secret=1", json=body).json()
        client.get("/v1/models", headers={"Authorization": "Bearer another secret"})
    until(lambda: len([r for r in caplog.records if r.name == "dspark.access"]) >= 2)
    first, second = [json.loads(r.getMessage()) for r in caplog.records if r.name == "dspark.access"]
    assert (first["status"], first["path"], first["prompt_tokens"]) == (200, "/v1/completions", 9)
    assert first["completion_tokens"] == told["usage"]["completion_tokens"] and first["version"] == "tiny/v1"
    assert first["finish"] == [told["choices"][0]["finish_reason"]]
    assert second["status"] == 401
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("dspark", "pipelines", "inference"))]
    assert not [line for line in ours if "secret" in line or TOKEN in line]


def test_a_slow_client_that_does_read_is_served(strict: Live) -> None:
    with _connected(strict) as client:
        client.sendall(_request(_body(stream=True, max_tokens=20)))
        answer = b""
        while b"[DONE]" not in answer:
            time.sleep(0.01)
            answer += client.recv(4096)
    assert answer.count(b"data: ") > 5
