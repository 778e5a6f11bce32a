"""Many clients at once: every answer is the engine's own, counters agree with what clients were told, nothing grows."""

import asyncio
import gc
import logging
import tracemalloc
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from inference.traffic import TrafficConfig, read_traffic
from pipelines.server.answers import Answer
from pipelines.server.engine_loop import Job
from pipelines.server.settings import Limits
from pipelines.traffic_counters import records_of
from pipelines.traffic_scrapes import parse_scrape
from tests.pipelines.server.serving import Live, Own, live, settings_for, until
from tests.pipelines.tiny import tokenizer


@dataclass(frozen=True)
class _Asked:
    """One request of a load, all that decides its answer."""

    number: int

    @property
    def content(self) -> str:
        return f"question {self.number}"

    @property
    def sampling(self) -> dict[str, Any]:
        return {"temperature": [0.0, 0.7, 1.0][self.number % 3], "seed": self.number}

    @property
    def max_tokens(self) -> int:
        return 4 + self.number % 9

    def expected(self, own: Own) -> list[int]:
        return own.tokens(own.prompt(self.content), max_tokens=self.max_tokens, **self.sampling)


async def _ask(client: openai.AsyncOpenAI, asked: _Asked) -> tuple[list[int], Any]:
    """Every second one streams. Returns token ids and usage."""
    common: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": asked.content}],
        "max_tokens": asked.max_tokens,
        "extra_body": {"return_token_ids": True},
        **asked.sampling,
    }
    if asked.number % 2:
        reply = await client.chat.completions.create(**common)
        return reply.choices[0].token_ids, reply.usage
    tokens: list[int] = []
    usage = None
    stream = await client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **common)
    async for chunk in stream:
        tokens += chunk.choices[0].model_dump().get("token_ids") or [] if chunk.choices else []
        usage = chunk.usage or usage
    return tokens, usage


async def _closed_loop(here: Live, asked: list[_Asked], clients: int) -> dict[int, tuple[list[int], Any]]:
    """So many clients, each with its next request as soon as its last is answered."""
    found = {}
    waiting = list(asked)

    async def client() -> None:
        async with here.async_client() as own_client:
            while waiting:
                one = waiting.pop()
                found[one.number] = await _ask(own_client, one)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return found


@pytest.mark.parametrize("clients", [1, 8, 64])
def test_every_answer_is_the_engines_own(served: Live, own: Own, clients: int) -> None:
    asked = [_Asked(number) for number in range(max(12, clients))]
    before = served.metrics()
    found = asyncio.run(_closed_loop(served, asked, clients))
    for one in asked:
        assert found[one.number][0] == one.expected(own), f"request {one.number} of {clients} clients"
    after = served.metrics()

    def grown(name: str) -> float:
        return after[name] - before[name]

    assert grown("vllm:prompt_tokens_total") == sum(usage.prompt_tokens for _, usage in found.values())
    assert grown("vllm:generation_tokens_total") == sum(usage.completion_tokens for _, usage in found.values())
    assert grown("vllm:generation_tokens_total") == sum(len(tokens) for tokens, _ in found.values())
    ended = sum(grown(f"vllm:request_success_total/{reason}") for reason in ("stop", "length"))
    assert ended == len(asked) == grown("vllm:e2e_request_latency_seconds_count")
    assert grown("vllm:time_to_first_token_seconds_count") == len(asked)
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:request_success_total/abort"] == after["vllm:request_success_total/error"] == 0


def test_counters_of_speculation_are_the_engines(served: Live, own: Own) -> None:
    before = served.metrics()
    body = {"model": "tiny", "prompt": [65, 66], "max_tokens": 40, "temperature": 0, "dspark": True}
    with served.http() as client:
        told = client.post("/v1/completions", json=body).json()["dspark"]
    after = served.metrics()
    grown = {name: after[name] - before.get(name, 0.0) for name in after if "spec_decode" in name}
    assert grown["vllm:spec_decode_num_accepted_tokens_total"] == sum(told["accepted"])
    by_position = [grown[f"vllm:spec_decode_num_accepted_tokens_per_pos_total/{k}"] for k in range(3)]
    assert by_position == told["accepted"]
    # Position 1 is verified in every round that proposes anything.
    assert grown["vllm:spec_decode_num_drafts_total"] == told["proposed"][0]
    assert grown["vllm:spec_decode_num_draft_tokens_total"] >= sum(told["proposed"])


def test_the_traffic_import_reads_our_metrics(served: Live) -> None:
    with served.http() as client:
        before = client.get("/metrics").text
        reply = client.post("/v1/completions", json={"model": "tiny", "prompt": "ab", "max_tokens": 30, "seed": 1})
        after = client.get("/metrics").text
    scrapes = [parse_scrape(text, where="here", at=at) for at, text in enumerate((before, after))]
    [record] = records_of(scrapes, engine="vllm", pair="tiny/v1", target="x")
    assert (record.requests, record.emitted) == (1, reply.json()["usage"]["completion_tokens"])
    assert record.rate is not None and record.tau is not None and record.tau >= 1.0


def test_a_full_queue_is_told_so_and_loses_no_one(alias: Path) -> None:
    limits = Limits(max_waiting=2, watch_s=0.0)
    with live(settings_for(alias, limits=limits, max_requests=1)) as here:

        async def all_at_once() -> list[httpx.Response]:
            body = {"model": "tiny", "prompt": "ab", "max_tokens": 100, "seed": 1}
            headers = {"Authorization": f"Bearer {here.server.service.settings.token}"}
            async with httpx.AsyncClient(base_url=here.url, headers=headers, timeout=30) as client:
                return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(8)))

        replies = asyncio.run(all_at_once())
        refused = [reply for reply in replies if reply.status_code == 429]
        answered = [reply for reply in replies if reply.status_code == 200]
        assert len(refused) == 5 and len(answered) == 3  # one slot and two that wait
        assert len({reply.json()["choices"][0]["text"] for reply in answered}) == 1
        for reply in refused:
            assert reply.headers["Retry-After"] == "1" and reply.json()["error"]["code"] == "queue_full"
        with here.http() as client:
            many = client.post("/v1/completions", json={"model": "tiny", "prompt": ["a"] * 4})
            assert many.status_code == 400 and "this server takes 3 at once" in many.text
            assert client.post("/v1/completions", json={"model": "tiny", "prompt": ["a"] * 3}).status_code == 200


def test_a_request_that_takes_too_long_is_given_up(alias: Path) -> None:
    limits = Limits(timeout_s=0.001, watch_s=0.0)
    with live(settings_for(alias, limits=limits)) as here:
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 300}
        with here.http() as client:
            reply = client.post("/v1/completions", json=body)
            assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"
        with pytest.raises(openai.APIError, match="took longer than this server allows"):
            list(here.client().completions.create(stream=True, **body))
        assert here.server.service.in_flight == 0


def test_traffic_is_logged_one_record_a_finished_request(alias: Path, tmp_path: Path) -> None:
    settings = settings_for(alias, traffic=tmp_path / "log", traffic_config=TrafficConfig(text="keep"))
    with live(settings) as here:
        client = here.client()
        chat = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=10,
            temperature=0.5,
            extra_headers={"X-Dspark-Domain": "code"},
        )
        plain = client.completions.create(
            model="tiny", prompt=[65, 66], max_tokens=10, extra_body={"metadata": {"domain": "maths"}}
        )
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt="x" * 400)
    first, second = read_traffic(tmp_path / "log").records
    assert (first.pair, first.domain, first.temperature, first.arm) == ("tiny/v1", "code", 0.5, "small")
    assert first.prompt == [{"role": "user", "content": "hi"}]
    assert first.response == chat.choices[0].message.content
    assert chat.usage is not None and first.emitted == chat.usage.completion_tokens
    assert (second.domain, second.response) == ("maths", plain.choices[0].text)
    assert second.prompt == [{"role": "user", "content": tokenizer().decode([65, 66])}]
    assert second.passes > 0 and second.seconds > 0


def test_nothing_grows_with_the_number_of_requests(served: Live) -> None:
    def some() -> None:
        asyncio.run(_closed_loop(served, [_Asked(number) for number in range(40)], 8))
        until(lambda: served.server.service.in_flight == 0)
        gc.collect()

    # The test runner keeps every line that is logged, and Hydra's runs before this one leave the level at INFO.
    logging.disable(logging.CRITICAL)
    try:
        some()
        tracemalloc.start()
        held = []
        for _ in range(4):
            some()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        logging.disable(logging.NOTSET)
    # Forty requests that stayed would be far more: jobs, answers, token lists and their text, some kilobytes each.
    # Libraries fill caches now and then; what stayed of requests would show every time.
    assert min(after - before for before, after in pairwise(held)) < 50_000
    service = served.server.service
    assert service.version is not None
    # Of this server: others of the same process may be remembered by what they ended with.
    jobs = [one.job if type(one) is Answer else one for one in gc.get_objects() if type(one) in (Answer, Job)]
    assert not [job for job in jobs if job.engine is service.version.engine]
    assert (service.in_flight, service.engine_requests) == (0, 0)
    assert service.version.engine.idle


def test_tokens_behind_a_stop_string_are_counted_nowhere(served: Live) -> None:
    before = served.metrics()["vllm:generation_tokens_total"]
    told = 0
    for seed in range(30):
        reply = served.client().completions.create(
            model="tiny", prompt="ab", max_tokens=60, seed=seed, temperature=0.6, stop=["e", "t", "A", "!"]
        )
        assert reply.usage is not None
        told += reply.usage.completion_tokens
    assert served.metrics()["vllm:generation_tokens_total"] - before == told
