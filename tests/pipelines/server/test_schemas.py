"""What may be asked: each field is taken, taken where it changes nothing, or refused in one line that names it."""

import json
from typing import Any

import pytest

from pipelines.server.errors import ApiError
from pipelines.server.schemas import ChatRequest, CompletionRequest, parsed

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PLAIN: dict[str, Any] = {"model": "m", "prompt": "hi"}


def _chat(**more: Any) -> ChatRequest:
    return parsed(ChatRequest, json.dumps(CHAT | more).encode())


def _plain(**more: Any) -> CompletionRequest:
    return parsed(CompletionRequest, json.dumps(PLAIN | more).encode())


def test_a_request_that_says_nothing_draws_at_temperature_1() -> None:
    settings = _chat().settings()
    assert (settings.temperature, settings.top_k, settings.top_p, settings.repetition_penalty) == (1.0, 0, 1.0, 1.0)


def test_what_is_asked_is_what_the_decoder_gets() -> None:
    asked = _chat(temperature=0.5, top_p=0.9, top_k=7, repetition_penalty=1.2, seed=3, stop=["a", "b"])
    request = asked.request(max_new_tokens=5, stop_tokens=frozenset({1}))
    settings = request.settings
    assert (settings.temperature, settings.top_k, settings.top_p, settings.repetition_penalty) == (0.5, 7, 0.9, 1.2)
    assert (request.max_new_tokens, request.stop_tokens) == (5, {1})
    assert (asked.drawn_seed(), asked.stops) == (3, ["a", "b"])
    assert _chat(top_k=-1).settings().top_k == 0  # vLLM's word for all


def test_a_request_without_a_seed_gets_a_fresh_one_each_time() -> None:
    assert len({_chat().drawn_seed() for _ in range(10)}) == 10


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("hi", ["hi"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_prompts_are_text_or_tokens_one_or_many(prompt: Any, expected: list[Any]) -> None:
    assert _plain(prompt=prompt).prompts() == expected


def test_a_message_is_text_or_parts_of_it() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = _chat(messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts}])
    assert asked.plain_messages() == [{"role": "system", "content": "x"}, {"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    "harmless",
    [
        {"user": "me", "metadata": {"domain": "code"}, "store": False},
        {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False, "top_logprobs": 0},
        {"stop": None, "seed": None, "stream": None, "temperature": None, "max_tokens": None},
    ],
)
def test_what_changes_nothing_is_taken(harmless: dict[str, Any]) -> None:
    assert _chat(**harmless).settings() == _chat().settings()


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("tools", [{"type": "function"}], "unsupported_parameter"),
        ("tool_choice", "required", "unsupported_parameter"),
        ("response_format", {"type": "json_schema"}, "unsupported_parameter"),
        ("logit_bias", {"5": 1.0}, "unsupported_parameter"),
        ("presence_penalty", 0.5, "unsupported_parameter"),
        ("frequency_penalty", -0.5, "unsupported_parameter"),
        ("logprobs", True, "unsupported_parameter"),
        ("top_logprobs", 3, "unsupported_parameter"),
        ("n", 2, "unsupported_parameter"),
        ("functions", [], "unsupported_parameter"),
        ("reasoning_effort", "high", "unsupported_parameter"),
        ("min_p", 0.1, "unknown_parameter"),
        ("temperature", "warm", "invalid_value"),
        ("temperature", -0.1, "invalid_value"),
        ("temperature", True, "invalid_value"),
        ("top_p", 0.0, "invalid_value"),
        ("top_p", 1.1, "invalid_value"),
        ("top_k", 1.5, "invalid_value"),
        ("repetition_penalty", 0.0, "invalid_value"),
        ("max_tokens", 0, "invalid_value"),
        ("seed", 1 << 63, "invalid_value"),
        ("stop", "", "invalid_value"),
        ("stop", ["a"] * 5, "invalid_value"),
        ("stream", "yes", "invalid_value"),
        ("stream_options", {"colour": 1}, "unknown_parameter"),
        ("messages", [], "invalid_value"),
        ("messages", [{"role": "tool", "content": "x"}], "invalid_value"),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}], "invalid_value"),
        ("messages", [{"role": "user"}], "invalid_value"),
        ("model", 3, "invalid_value"),
        ("metadata", {"a": 1}, "invalid_value"),
    ],
)
def test_what_would_change_an_answer_is_refused(field: str, value: Any, code: str) -> None:
    with pytest.raises(ApiError, match=field) as caught:
        _chat(**{field: value})
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, field, code)
    assert "\n" not in caught.value.message and len(caught.value.message) < 300


@pytest.mark.parametrize(("field", "value"), [("best_of", 2), ("echo", True), ("suffix", "x"), ("logprobs", 1)])
def test_what_plain_completions_do_not_have_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ApiError, match=f"{field} is not supported"):
        _plain(**{field: value})


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [-1], [True], 3, {"a": 1}, [["a"]], ["a"] * 65])
def test_prompts_of_another_shape_are_refused(prompt: Any) -> None:
    with pytest.raises(ApiError, match="prompt") as caught:
        _plain(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b'{"model": NaN}', b"{} {}"],
)
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match=r".") as caught:
        parsed(ChatRequest, body)
    assert caught.value.status == 400 and len(caught.value.message) < 300


def test_a_refusal_repeats_no_prompt() -> None:
    with pytest.raises(ApiError, match="messages") as caught:
        _chat(messages=[{"role": "user", "content": "my secret", "colour": "my secret"}])
    assert "secret" not in str(caught.value.body)
