"""From loading to the last answer: readiness, draining, signals, and new versions that take over without a failure."""

import asyncio
import gc
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from inference.errors import InputError
from pipelines.server import service as service_module
from pipelines.server.running import Running, serve
from pipelines.server.settings import Limits
from pipelines.server.versions import Version, load_version
from tests.pipelines.server.serving import (
    EVER,
    TOKEN,
    Live,
    Own,
    ended_by,
    live,
    point,
    settings_for,
    until,
    write_registry,
    write_version,
)
from tests.pipelines.tiny import REPOSITORY, write_model

LONG: dict[str, Any] = {"model": "tiny", "prompt": "ab", "max_tokens": 300, "seed": 3}


def _health(here: Live) -> tuple[int, str]:
    reply = httpx.get(f"{here.url}/health")
    return reply.status_code, reply.json()["status"]


def _reload(here: Live) -> httpx.Response:
    with here.http() as client:
        return client.post("/admin/reload")


def _fingerprint(here: Live) -> str | None:
    return here.client().completions.create(model="tiny", prompt="ab", max_tokens=1).system_fingerprint


def test_until_it_has_loaded_it_says_so(alias: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def slow(*args: Any, **options: Any) -> Version:
        assert go.wait(EVER)
        return load_version(*args, **options)

    monkeypatch.setattr(service_module, "load_version", slow)
    with live(settings_for(alias), wait=False) as here:
        until(lambda: here.server.started)
        assert _health(here) == (503, "loading")
        with here.http() as client:
            for reply in (client.get("/v1/models"), client.get("/metrics"), client.post("/v1/completions", json=LONG)):
                assert reply.status_code == 503 and reply.json()["error"]["code"] == "loading"
                assert reply.headers["Retry-After"] == "5"
        go.set()
        until(lambda: _health(here) == (200, "ready"))


def test_a_pair_that_cannot_be_served_ends_it_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pair here"):
        serve(settings_for(tmp_path / "nothing"))


def test_draining_lets_requests_end_and_no_one_in(alias: Path, own: Own) -> None:
    with live(settings_for(alias)) as here:
        stream = here.client().completions.create(stream=True, **LONG)
        text = next(iter(stream)).choices[0].text
        ended_by(here.server)
        assert _health(here) == (503, "draining")
        with pytest.raises(openai.InternalServerError, match="the server is draining"):
            here.client().completions.create(**LONG)
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == own.text(own.tokens(_ids(own, "ab"), max_tokens=300, seed=3))
        until(lambda: here.server.should_exit)
    assert here.server.ended_by == signal.SIGTERM


def _ids(own: Own, text: str) -> list[int]:
    found: list[int] = own.version.pair.target.tokenizer(text)["input_ids"]
    return found


def test_what_outlasts_the_time_to_drain_is_cancelled(alias: Path) -> None:
    limits = Limits(drain_s=0.2, watch_s=0.0)
    with live(settings_for(alias, limits=limits, max_requests=1)) as here:
        stream = here.client().completions.create(stream=True, **(LONG | {"prompt": ["ab"] * 20}))
        next(iter(stream))
        ended_by(here.server)
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        until(lambda: here.server.should_exit)
        assert here.server.service.in_flight == 0


def test_a_second_signal_ends_it_at_once(alias: Path) -> None:
    with live(settings_for(alias, max_requests=1)) as here:
        stream = here.client().completions.create(stream=True, **(LONG | {"prompt": ["ab"] * 40}))
        next(iter(stream))
        began = time.monotonic()
        ended_by(here.server)
        ended_by(here.server)
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(stream)
        assert time.monotonic() - began < 10.0  # forty answers would take longer, and it would wait for them


def test_ctrl_c_ends_it_with_its_exit_code(alias: Path) -> None:
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        assert serve(settings_for(alias)) == 130
    finally:
        timer.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_drains_a_real_process(alias: Path, tmp_path: Path) -> None:
    words = ["serve", "--pair", str(alias), "--device", "cpu", "--cache", str(tmp_path), "--port", "0"]
    environment = os.environ | {"DSPARK_API_KEY": TOKEN, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *words],
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if line.endswith("is ready\n"):
                break
        port = re.search(r"http://127\.0\.0\.1:(\d+)", "".join(lines))
        assert port is not None, lines
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port[1]}/v1", api_key=TOKEN, max_retries=0)
        stream = client.completions.create(stream=True, **LONG)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason in ("stop", "length")
        lines.append(process.communicate(timeout=EVER)[1])
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143
    assert "Traceback" not in "".join(lines) and TOKEN not in "".join(lines)


def test_a_new_version_takes_over_under_load_without_a_failure(tmp_path: Path) -> None:
    alias = write_registry(tmp_path)
    write_model(tmp_path / "other_target", layers=2, seed=9)
    write_version(tmp_path, "v2", draft={"kind": "lookup", "longest": 3, "shortest": 1}, tokens=2)
    write_version(tmp_path, "v3", draft={"kind": "none"}, tokens=0, target="other_target")
    settings = settings_for(alias, limits=Limits(watch_s=0.05))
    own = {}
    for name in ("v1", "v2", "v3"):
        own[f"tiny/{name}"] = Own(settings_for(alias.with_name(name)))
    answers: list[tuple[int, str | None, list[int]]] = []
    going = True

    async def client(here: Live, first: int) -> None:
        async with here.async_client() as asking:
            number = first
            while going:
                reply = await asking.completions.create(
                    model="tiny",
                    prompt=[65, number % 200],
                    max_tokens=12,
                    seed=number,
                    extra_body={"return_token_ids": True},
                )
                answers.append((number, reply.system_fingerprint, reply.choices[0].token_ids))
                number += 1000

    async def moving(here: Live) -> None:
        nonlocal going
        targets = [here.server.service.version.pair.target]  # type: ignore[union-attr]
        for name in ("v2", "v3", "v1"):
            point(alias, name)
            while here.server.service.version.label != f"tiny/{name}":  # type: ignore[union-attr]
                await asyncio.sleep(0.02)
            targets.append(here.server.service.version.pair.target)  # type: ignore[union-attr]
            await asyncio.sleep(0.3)
        going = False
        assert targets[0] is targets[1] and len({id(target) for target in targets}) == 3

    async def all_together(here: Live) -> None:
        async with asyncio.timeout(2 * EVER), asyncio.TaskGroup() as group:
            for first in range(6):
                group.create_task(client(here, first))
            group.create_task(moving(here))

    with live(settings) as here:
        asyncio.run(all_together(here))
        metrics = here.metrics()
        assert metrics["dspark:reloads_total/served"] == 3
        assert metrics["vllm:request_success_total/error"] == metrics["vllm:request_success_total/abort"] == 0
    assert {fingerprint for _, fingerprint, _ in answers} == set(own)
    for number, fingerprint, tokens in answers[:: max(1, len(answers) // 60)]:
        expected = own[str(fingerprint)].tokens([65, number % 200], max_tokens=12, seed=number)
        assert tokens == expected, f"request {number} by {fingerprint}"


def test_a_broken_version_leaves_the_one_before_in_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pipelines.server")
    alias = write_registry(tmp_path)
    (tmp_path / "tiny" / "v2").mkdir()
    (tmp_path / "tiny" / "v2" / "pair.json").write_text("{", encoding="utf-8")
    with live(settings_for(alias, limits=Limits(watch_s=0.05))) as here:
        point(alias, "v2")
        until(lambda: any("the new version is not served" in record.message for record in caplog.records))
        time.sleep(0.3)
        assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1  # once, not at every look
        reply = _reload(here)
        assert reply.status_code == 409 and "pair.json is not JSON" in reply.json()["error"]["message"]
        assert _fingerprint(here) == "tiny/v1" and _health(here) == (200, "ready")
        # Mended by a third version.
        write_version(tmp_path, "v3", draft={"kind": "none"}, tokens=0)
        point(alias, "v3")
        until(lambda: _fingerprint(here) == "tiny/v3")


def test_a_version_that_loads_and_cannot_decode_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alias = write_registry(tmp_path)
    write_version(tmp_path, "v2", draft={"kind": "none"}, tokens=0)

    def broken(*args: Any, **options: Any) -> Version:
        version = load_version(*args, **options)
        if version.label == "tiny/v2":
            monkeypatch.setattr(version.engine, "step", lambda: 1 / 0)
        return version

    monkeypatch.setattr(service_module, "load_version", broken)
    with live(settings_for(alias)) as here:
        assert _reload(here).json() == {"version": "tiny/v1", "changed": False}
        point(alias, "v2")
        assert _reload(here).status_code == 409
        assert _fingerprint(here) == "tiny/v1"


def test_reloading_wants_a_token(alias: Path) -> None:
    with live(settings_for(alias, token="")) as here:
        reply = httpx.post(f"{here.url}/admin/reload")
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "no_token")
        assert httpx.get(f"{here.url}/v1/models").status_code == 200


def test_an_engine_that_fails_takes_the_server_down_and_tells_its_clients(
    alias: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live(settings_for(alias)) as here:
        version = here.server.service.version
        assert version is not None

        def fails() -> None:
            raise MemoryError("no room")

        monkeypatch.setattr(version.engine, "step", fails)
        with here.http() as client:
            reply = client.post("/v1/completions", json=LONG)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "decoding_failed")
        until(lambda: here.server.should_exit)
    assert isinstance(here.server.service.failure, MemoryError)


def test_the_first_signal_is_what_ended_it(alias: Path) -> None:
    server = Running(settings_for(alias))
    ended_by(server, signal.SIGINT)
    ended_by(server, signal.SIGTERM)
    assert server.ended_by == signal.SIGINT and server.should_exit


def test_a_version_that_is_gone_is_let_go(tmp_path: Path) -> None:
    alias = write_registry(tmp_path)
    write_version(tmp_path, "v2", draft={"kind": "none"}, tokens=0)
    with live(settings_for(alias)) as here:
        assert _fingerprint(here) == "tiny/v1"
        before = here.server.service.version
        assert before is not None
        engine, drafter = weakref.ref(before.engine), weakref.ref(before.pair.drafter)
        del before
        point(alias, "v2")
        assert _reload(here).json() == {"version": "tiny/v2", "changed": True}

        def gone() -> bool:
            gc.collect()
            return engine() is None and drafter() is None

        until(gone)


def test_what_nobody_foresaw_is_an_error_object_and_no_end(alias: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(settings_for(alias)) as here:
        with monkeypatch.context() as patch, here.http() as client:
            patch.setattr(here.server.service, "answers", lambda *_, **__: 1 / 0)
            reply = client.post("/v1/completions", json=LONG)
            assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
            assert "division" not in reply.text
        assert _fingerprint(here) == "tiny/v1"
