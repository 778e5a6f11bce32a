"""The OpenAI interface as its own client sees it: answers are the engine's, refusals are error objects."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.pipelines.server.serving import TOKEN, Live, Own

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 4},
    {"temperature": 0.7, "top_p": 0.8, "seed": 5},
    {"temperature": 1.3, "seed": 6, "extra_body": {"top_k": 9, "repetition_penalty": 1.2}},
]


def _expected(own: Own, prompt: list[int], *, max_tokens: int, sampling: dict[str, Any]) -> list[int]:
    plain = {name: value for name, value in sampling.items() if name != "extra_body"} | sampling.get("extra_body", {})
    return own.tokens(prompt, max_tokens=max_tokens, **plain)


def _with_tokens(sampling: dict[str, Any]) -> dict[str, Any]:
    return sampling | {"extra_body": sampling.get("extra_body", {}) | {"return_token_ids": True}}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_chat_is_answered_as_the_engine_alone_would(served: Live, own: Own, sampling: dict[str, Any]) -> None:
    reply = served.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=20, **_with_tokens(sampling)
    )
    prompt = own.prompt("hi")
    expected = _expected(own, prompt, max_tokens=20, sampling=sampling)
    [choice] = reply.choices
    assert choice.token_ids == expected and choice.message.content == own.text(expected)
    assert choice.message.role == "assistant" and reply.object == "chat.completion"
    assert choice.finish_reason == ("stop" if expected[-1] in own.version.stops else "length")
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), len(expected))
    assert (reply.model, reply.system_fingerprint) == ("tiny", "tiny/v1")


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_stream_says_what_the_whole_answer_says(served: Live, own: Own, sampling: dict[str, Any]) -> None:
    stream = served.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        max_completion_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
        **_with_tokens(sampling),
    )
    chunks = list(stream)
    expected = _expected(own, own.prompt("hello"), max_tokens=20, sampling=sampling)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == own.text(expected)
    assert [token for choice in choices[1:] for token in choice.token_ids] == expected
    assert choices[0].delta.role == "assistant"
    assert [c.finish_reason for c in choices if c.finish_reason] == [choices[-1].finish_reason]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(expected)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_plain_completion_takes_text_and_tokens_one_or_many(served: Live, own: Own) -> None:
    prompts: list[Any] = ["ab", [65, 66], ["ab", "cde"], [[65, 66], [67]]]
    for prompt in prompts:
        reply = served.client().completions.create(model="tiny", prompt=prompt, max_tokens=9, seed=2)
        each = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        ids = [own.version.pair.target.tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in each]
        answers = [own.tokens(one, max_tokens=9, seed=2) for one in ids]
        assert [choice.text for choice in reply.choices] == [own.text(answer) for answer in answers]
        assert [choice.index for choice in reply.choices] == list(range(len(each)))
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == sum(map(len, ids))
        assert reply.usage.completion_tokens == sum(map(len, answers))


def test_a_stream_of_several_prompts_tells_them_apart(served: Live, own: Own) -> None:
    texts = {0: "", 1: "", 2: ""}
    ends = []
    for chunk in served.client().completions.create(
        model="tiny", prompt=["a", "bc", "def"], max_tokens=12, seed=1, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
        ends += [chunk.choices[0].index] if chunk.choices[0].finish_reason else []
    for index, prompt in enumerate(["a", "bc", "def"]):
        ids = own.version.pair.target.tokenizer(prompt)["input_ids"]
        assert texts[index] == own.text(own.tokens(ids, max_tokens=12, seed=1))
    assert sorted(ends) == [0, 1, 2]


def test_a_completion_that_says_no_length_has_16_tokens_and_a_chat_what_there_is_room_for(
    served: Live, own: Own
) -> None:
    plain = served.client().completions.create(model="tiny", prompt="ab", seed=1, temperature=0)
    assert plain.usage is not None and plain.usage.completion_tokens <= 16
    chat = served.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x" * 280}], seed=1, temperature=0
    )
    prompt = own.prompt("x" * 280)
    expected = own.tokens(prompt, max_tokens=320 - len(prompt), temperature=0.0)
    assert chat.choices[0].message.content == own.text(expected)


def _stoppable(own: Own, prompt: list[int]) -> Iterator[tuple[int, list[int], int]]:
    """Seeds whose answer has, ten characters in, two letters that occur there first: two tokens, as each is a byte."""
    for seed in range(100):
        tokens = own.tokens(prompt, max_tokens=60, seed=seed)
        text = own.text(tokens)
        for at in range(10, len(text) - 1):
            if text[at : at + 2].isascii() and text.find(text[at : at + 2]) == at:
                yield seed, tokens, at


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(served: Live, own: Own, stream: bool) -> None:
    prompt = own.prompt("stop")
    seed, tokens, at = next(_stoppable(own, prompt))
    whole = own.text(tokens)
    reply: Any = served.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "stop"}],
        max_tokens=60,
        seed=seed,
        stop=["never there", whole[at : at + 2]],
        stream=stream,
    )
    if stream:
        choices = [chunk.choices[0] for chunk in reply]
        text, reason = "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
        kept = reply.usage.completion_tokens
        assert own.text(tokens[:kept]) == whole[: at + 2]
    assert (text, reason) == (whole[:at], "stop")


def test_requests_without_a_seed_differ(served: Live) -> None:
    texts = {
        served.client().completions.create(model="tiny", prompt="ab", max_tokens=12).choices[0].text for _ in range(4)
    }
    assert len(texts) == 4


def test_what_speculation_did_is_told_when_asked(served: Live) -> None:
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 30, "temperature": 0}
    with served.http() as client:
        assert "dspark" not in client.post("/v1/completions", json=body).json()
        for told in (
            client.post("/v1/completions", json=body | {"dspark": True}).json(),
            client.post("/v1/completions", json=body, headers={"X-Dspark-Stats": "1"}).json(),
        ):
            found = told["dspark"]
            assert found["tau"] == told["usage"]["completion_tokens"] / found["passes"]
            assert len(found["proposed"]) == len(found["accepted"]) == 3
            assert sum(found["accepted"]) <= sum(found["proposed"])


def test_models_tell_the_version(served: Live) -> None:
    [model] = served.client().models.list().data
    assert (model.id, model.version, model.max_model_len) == ("tiny", "tiny/v1", 320)
    assert served.client().models.retrieve("tiny").id == "tiny"


def test_another_model_is_not_found(served: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="no such model") as caught:
        served.client().completions.create(model="gpt-4", prompt="hi")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="no such model"):
        served.client().models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("more", "message", "code"),
    [
        ({"prompt": "x" * 400}, "the prompt has 400 tokens; give 1 to 319", "context_length_exceeded"),
        ({"prompt": ""}, "the prompt has 0 tokens", "invalid_value"),
        ({"prompt": [99_999]}, "token ids end at", None),
        ({"prompt": "x" * 300, "max_tokens": 100}, "max_tokens is 100; use at most 20", "context_length_exceeded"),
        ({"max_tokens": 5000}, "max_tokens is 5000", "context_length_exceeded"),
        ({"logprobs": 3}, "logprobs is not supported", "unsupported_parameter"),
        ({"colour": "red"}, "unknown field 'colour'", "unknown_parameter"),
        ({"metadata": {"domain": "a b"}}, "a domain is up to 64 letters", None),
    ],
)
def test_what_cannot_be_had_is_refused(served: Live, more: dict[str, Any], message: str, code: str | None) -> None:
    with served.http() as client:
        reply = client.post("/v1/completions", json={"model": "tiny", "prompt": "hi", **more})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error.keys() == {"message", "type", "param", "code"}
    assert error["message"].startswith(message) and error["type"] == "invalid_request_error" and error["code"] == code


def test_without_the_token_nobody_gets_in(served: Live) -> None:
    with pytest.raises(openai.AuthenticationError, match="wants a token"):
        served.client(token="wrong").models.list()
    for header in ({}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer"}):
        for path in ("/v1/models", "/metrics", "/nowhere"):
            reply = httpx.get(f"{served.url}{path}", headers=header)
            assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["WWW-Authenticate"] == "Bearer" and TOKEN not in reply.text
    twice = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer x")]
    assert httpx.get(f"{served.url}/v1/models", headers=twice).status_code == 401


def test_health_is_open_and_tells_the_version(served: Live) -> None:
    reply = httpx.get(f"{served.url}/health")
    assert (reply.status_code, reply.json()) == (200, {"status": "ready", "version": "tiny/v1"})


def test_addresses_and_methods_that_are_not_there_are_refused_in_the_same_shape(served: Live) -> None:
    with served.http() as client:
        for method, path, status in (("GET", "/v1/completions", 405), ("DELETE", "/health", 405), ("GET", "/x", 404)):
            reply = client.request(method, path)
            assert reply.status_code == status and re.match("Not Found|Method Not", reply.json()["error"]["message"])
