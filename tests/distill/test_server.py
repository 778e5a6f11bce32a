"""The client against a real HTTP server in this process: good answers, and every way of not giving one."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from distill.prompts import Prompt
from distill.responses._context import AnswerContext
from distill.responses._http import retry_after_s
from distill.responses.server import Config
from inference.errors import InputError

Reply = tuple[int, dict[str, str], bytes]
KEY = "sk-very-secret"


def completion(text: str, finish_reason: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return json.dumps({"model": "tiny", "choices": [choice], "usage": usage}).encode()


class Served:
    """What a test server saw, and what it answers."""

    def __init__(self, reply: Callable[["Served", str, dict[str, Any]], Reply]) -> None:
        self.reply = reply
        self.lock = threading.Lock()
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.busy = self.most_busy = 0
        self.url = ""

    def handle(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Reply:
        with self.lock:
            self.requests.append((path, headers, body))
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        try:
            return self.reply(self, path, body)
        finally:
            with self.lock:
                self.busy -= 1


@contextmanager
def serving(reply: Callable[[Served, str, dict[str, Any]], Reply]) -> Iterator[Served]:
    served = Served(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: dict[str, Any]) -> None:
            status, headers, content = served.handle(self.path, dict(self.headers), body)
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client stopped waiting, which is what the test is about

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is on this machine; a proxy of the environment is not to be asked for it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def config(url: str, **settings: Any) -> Config:
    return Config(**{"base_url": url, "model": "tiny", "backoff_s": 0.01, "timeout_s": 5.0, "retries": 2, **settings})


def ask(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def echo(served: Served, path: str, body: dict[str, Any]) -> Reply:
    return 200, {}, completion("re: " + body["messages"][-1]["content"])


def after(failures: list[Reply]) -> Callable[[Served, str, dict[str, Any]], Reply]:
    """Fail in the given ways first, then echo."""

    def reply(served: Served, path: str, body: dict[str, Any]) -> Reply:
        with served.lock:
            number = len(served.requests) - 1
        return failures[number] if number < len(failures) else echo(served, path, body)

    return reply


def always(status: int, content: bytes = b"", **headers: str) -> Callable[[Served, str, dict[str, Any]], Reply]:
    return lambda served, path, body: (status, headers, content)


def test_answers_come_in_the_order_of_the_conversations() -> None:
    def late_first(served: Served, path: str, body: dict[str, Any]) -> Reply:
        time.sleep(0.1 if body["messages"][-1]["content"] == "0" else 0.0)
        return echo(served, path, body)

    with serving(late_first) as served:
        answers = config(served.url).respond(ask(*"01234567"), seed=0)
    assert [answer.text for answer in answers] == [f"re: {i}" for i in range(8)]
    first = answers[0]
    assert (first.finish_reason, first.model, first.prompt_tokens, first.completion_tokens) == ("stop", "tiny", 7, 3)


def test_the_request_holds_the_settings_and_a_seed_of_its_own() -> None:
    with serving(echo) as served:
        config(f"{served.url}/", temperature=0.7, top_p=0.9, max_new_tokens=11).respond(ask("a", "b"), seed=40)
    assert {path for path, _, _ in served.requests} == {"/v1/chat/completions"}
    bodies = sorted((body for _, _, body in served.requests), key=lambda body: body["seed"])
    assert [body.pop("seed") for body in bodies] == [40, 41]
    assert bodies[0] == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 11,
        "stream": False,
    }
    assert all("Authorization" not in headers for _, headers, _ in served.requests)


def test_nothing_to_ask_asks_nothing() -> None:
    assert config("http://127.0.0.1:9/v1").respond([], seed=0) == []


def test_no_more_requests_are_under_way_than_allowed() -> None:
    def slow(served: Served, path: str, body: dict[str, Any]) -> Reply:
        time.sleep(0.05)
        return echo(served, path, body)

    with serving(slow) as served:
        config(served.url, concurrency=3).respond(ask(*map(str, range(12))), seed=0)
    assert served.most_busy == 3  # the bound is kept, and used


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_a_busy_or_failing_server_is_asked_again(status: int) -> None:
    with serving(after([(status, {}, b"busy"), (status, {}, b"busy")])) as served:
        assert config(served.url).respond(ask("a"), seed=0)[0].text == "re: a"
    assert len(served.requests) == 3


def test_a_server_that_keeps_failing_is_given_up() -> None:
    with serving(always(503, b"overloaded")) as served:
        with pytest.raises(InputError, match=r"answered 503, saying: overloaded \(3 attempts\) \[http.*\]: check that"):
            config(served.url).respond(ask("a"), seed=0)
    assert len(served.requests) == 3


def test_waits_grow_and_are_never_shorter_than_the_server_asks(caplog: pytest.LogCaptureFixture) -> None:
    failures = [(429, {"Retry-After": "1"}, b""), (503, {}, b"")]
    with serving(after(failures)) as served, caplog.at_level(logging.WARNING):
        started = time.perf_counter()
        config(served.url, backoff_s=0.1).respond(ask("a"), seed=0)
        took = time.perf_counter() - started
    # 1 s because the server asked for it, then 0.1 x 2 s shortened by up to half.
    assert 1.1 <= took < 3
    assert "attempt 2 of 3 in 1.0 s" in caplog.text


def test_retry_after_may_be_seconds_or_a_date() -> None:
    def asked(value: str) -> float:
        return retry_after_s(httpx.Headers({"Retry-After": value}))

    assert asked("2.5") == 2.5
    assert asked("-3") == asked("soon") == asked("Mon, 01 Jan 2001 00:00:00 GMT") == asked("nan") == 0
    assert asked("Fri, 01 Jan 2100 00:00:00 GMT") == asked("1e9") == 600  # nobody waits longer unseen
    assert retry_after_s(httpx.Headers()) == 0


GARBAGE = [
    b"<html>hello</html>",
    b"",
    b"\xff\xfe",
    b"[]",
    b"7",
    b"{}",
    b'{"choices": []}',
    b'{"choices": [{"message": {"content": null}}]}',
    b'{"choices": [{"message": null}]}',
    b'{"choices": [{"message": {"content": "x"}}], "usage": 3}',
    completion("cut off")[:-9],
]


@pytest.mark.parametrize("content", GARBAGE)
def test_garbage_is_asked_for_again_then_refused(content: bytes) -> None:
    with serving(after([(200, {}, content)])) as served:
        assert config(served.url).respond(ask("a"), seed=0)[0].text == "re: a"
    with serving(always(200, content)) as served:
        with pytest.raises(InputError, match=r"not the JSON expected .*\(2 attempts\)"):
            config(served.url, retries=1).respond(ask("a"), seed=0)
    assert len(served.requests) == 2


def test_a_closed_port_is_refused_after_the_retries() -> None:
    with serving(echo) as served:
        url = served.url
    with pytest.raises(InputError, match=r"cannot connect to the server .*\(2 attempts\) \[http://127.0.0.1"):
        config(url, retries=1).respond(ask("a", "b"), seed=0)


def test_a_silent_server_times_out() -> None:
    release = threading.Event()

    def silent(served: Served, path: str, body: dict[str, Any]) -> Reply:
        release.wait(10)
        return echo(served, path, body)

    with serving(silent) as served:
        try:
            with pytest.raises(InputError, match=r"did not answer within 0.2 s \(2 attempts\)"):
                config(served.url, timeout_s=0.2, retries=1).respond(ask("a"), seed=0)
        finally:
            release.set()


@pytest.mark.parametrize(
    ("status", "mend"),
    [(400, "check corpus.model"), (401, "corpus.api_key_env"), (404, "ends in /v1"), (307, "address it redirects to")],
)
def test_a_rejected_request_is_not_repeated(status: int, mend: str) -> None:
    with serving(always(status, b"no", Location="http://127.0.0.1:9/")) as served:
        with pytest.raises(InputError, match=f"answered {status}, saying: no.*{mend}"):
            config(served.url).respond(ask("a"), seed=0)
    assert len(served.requests) == 1


def test_one_rejected_request_stops_the_others() -> None:
    def reject_one(served: Served, path: str, body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["content"] == "0":
            return 400, {}, b"too long"
        time.sleep(0.02)
        return 503, {"Retry-After": "60"}, b""  # its waiting is cut short, too

    with serving(reject_one) as served:
        started = time.perf_counter()
        with pytest.raises(InputError, match="too long"):
            config(served.url, concurrency=2).respond(ask(*map(str, range(200))), seed=0)
    assert time.perf_counter() - started < 10
    assert len(served.requests) < 20


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    with serving(after([(429, {}, f"key {KEY} is busy".encode())])) as served, caplog.at_level(logging.DEBUG):
        config(served.url, api_key_env="MY_KEY").respond(ask("a"), seed=0)
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in served.requests)
    with serving(always(401, f"wrong key {KEY}".encode())) as served, caplog.at_level(logging.DEBUG):
        with pytest.raises(InputError, match=r"answered 401, saying: wrong key \*\*\*"):
            config(served.url, api_key_env="MY_KEY").respond(ask("a"), seed=0)
    assert KEY not in caplog.text
    assert KEY not in repr(config(served.url, api_key_env="MY_KEY"))


def test_a_missing_key_is_refused_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with serving(echo) as served:
        with pytest.raises(InputError, match="environment variable MY_KEY is not set"):
            config(served.url, api_key_env="MY_KEY").respond(ask("a"), seed=0)
        monkeypatch.setenv("MY_KEY", "two\nlines")
        with pytest.raises(InputError, match="characters that no key has"):
            config(served.url, api_key_env="MY_KEY").respond(ask("a"), seed=0)
    assert served.requests == []


def models(*names: str) -> Callable[[Served, str, dict[str, Any]], Reply]:
    def reply(served: Served, path: str, body: dict[str, Any]) -> Reply:
        if path == "/v1/models":
            return 200, {}, json.dumps({"data": [{"id": name} for name in names]}).encode()
        return echo(served, path, body)

    return reply


def test_without_a_name_the_only_model_served_is_taken() -> None:
    with serving(models("smol")) as served:
        assert config(served.url, model="").served_model() == "smol"
        config(served.url, model="").respond(ask("a"), seed=0)
    assert served.requests[-1][2]["model"] == "smol"
    assert config("http://127.0.0.1:9/v1").served_model() == "tiny"  # named: nobody is asked


def test_without_a_name_several_models_are_listed() -> None:
    with serving(models("smol", "big")) as served:
        with pytest.raises(InputError, match=r"serves 2 models: smol, big .*set corpus.model"):
            config(served.url, model="").respond(ask("a"), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "use http://host:port/v1"),
        ({"base_url": "ftp://host/v1"}, "use http://host:port/v1"),
        ({"base_url": ""}, "use http://host:port/v1"),
        ({"base_url": "http://me:pw@host/v1"}, "holds a password"),
        ({"base_url": "http://host/v1?key=pw"}, "holds a password or a query"),
        ({"api_key_env": "sk-123"}, "give the name, not the key"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": 0.0}, "top_p <= 1"),
        ({"concurrency": 0}, "at least 1"),
        ({"retries": -1}, "retries >= 0"),
        ({"timeout_s": 0.0}, "positive seconds"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Config(**settings)
    assert "pw" not in str(caught.value)
    assert "sk-123" not in str(caught.value)


def test_conversations_are_answered_turn_by_turn_and_put_into_tokens(chatml: PreTrainedTokenizerFast) -> None:
    def reply(served: Served, path: str, body: dict[str, Any]) -> Reply:
        said = body["messages"][-1]["content"]
        return 200, {}, completion(said.upper(), "length" if said == "b" else "stop")

    prompts = [Prompt("1", "chat", "s", ("a", "b"), system="Be kind."), Prompt("2", "code", "s", ("c",))]
    context = AnswerContext(chatml, frozenset(), None)
    with serving(reply) as served:
        cfg = config(served.url, concurrency=1)
        samples = cfg.answer(prompts, splits=["train", "validation"], context=context, seed=0)
    assert not cfg.needs_target()
    assert [len(body["messages"]) for _, _, body in served.requests] == [2, 1, 4]
    assert [(s.id, s.split, s.text, s.states) for s in samples] == [
        ("1", "train", "B", None),
        ("2", "validation", "C", None),
    ]
    # "B" was cut off: the end-of-turn token behind it is the template's, not the target's.
    own = [chatml.decode(s.tokens[s.mask].tolist()) for s in samples]
    assert own == ["A<|im_end|>B", "C<|im_end|>"]
