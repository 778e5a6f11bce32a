"""A tiny pair, a real server on a free port in a thread, and the engine's own answer to compare with."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai

from inference.batch.engine import BatchEngine
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.target import target_digest
from pipelines.server.running import Running, listening
from pipelines.server.settings import Limits, PairSettings, ServerSettings
from pipelines.server.versions import Version, load_version
from tests.pipelines.tiny import tokenizer, write_model

TOKEN = "a-token-for-tests"
_TELLING = ("finished_reason", "position", "outcome")
EVER = 30.0
"""Seconds that nothing in these tests takes."""


def write_registry(root: Path) -> Path:
    """A registry with a target, one version of a pair and its alias; returns the alias."""
    write_model(root / "target", layers=2)
    write_version(root, "v1", draft={"kind": "model"}, tokens=3)
    alias = root / "tiny" / "champion"
    alias.symlink_to("v1")
    return alias


def write_version(root: Path, name: str, *, draft: dict[str, object], tokens: int, target: str = "target") -> Path:
    """One version of the pair."""
    folder = root / "tiny" / name
    (folder / "draft").mkdir(parents=True)
    if draft["kind"] == "model":
        write_model(folder / "draft", layers=1, seed=1)
    (folder / "draft" / "draft.json").write_text(json.dumps(draft), encoding="utf-8")
    reference = {"path": str(root / target), "revision": "", "digest": target_digest(root / target)}
    info = {
        "schema_version": 1,
        "name": "tiny",
        "version": name,
        "target": reference | {"attention": "sdpa"},
        "draft": {"kind": draft["kind"], "name": "small"},
        "decoding": {"precision": "fp32", "lookahead": {"kind": "fixed", "tokens": tokens}},
    }
    (folder / "pair.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def point(alias: Path, version: str) -> None:
    """Move the alias as the registry does."""
    aside = alias.with_name(".aside")
    aside.symlink_to(version)
    os.replace(aside, alias)


def settings_for(alias: Path, *, limits: Limits | None = None, **changes: Any) -> ServerSettings:
    """Settings of a server on any free port, with four slots; keys of the pair's settings count too."""
    pair = {
        name: changes.pop(name)
        for name in ("max_requests", "lookahead", "load_costs", "max_cache_tokens")
        if name in changes
    }
    own = PairSettings(folder=alias, device="cpu", cache=alias.parent.parent / "cache", max_requests=4)
    settings = ServerSettings(pair=replace(own, **pair), port=0, limits=limits or Limits(watch_s=0.0), token=TOKEN)
    return replace(settings, **changes)


@dataclass
class Live:
    """A server in a thread.

    Attributes:
        server: itself.
        port: it listens on.
        raised: what its thread ended with.
    """

    server: Running
    port: int
    raised: list[BaseException] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, *, token: str = TOKEN) -> openai.OpenAI:
        """A client that tries once."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=EVER)

    def async_client(self) -> openai.AsyncOpenAI:
        """The same for many requests at once."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, timeout=EVER)

    def http(self) -> httpx.Client:
        """A plain client that shows the token."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=EVER)

    def metrics(self) -> dict[str, float]:
        """Samples by name and the label that tells them apart, where they have one."""
        from prometheus_client.parser import text_string_to_metric_families

        with self.http() as client:
            text = client.get("/metrics").raise_for_status().text
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                more = [sample.labels[key] for key in _TELLING if key in sample.labels]
                found["/".join([sample.name, *more])] = sample.value
        return found


@contextlib.contextmanager
def live(settings: ServerSettings, *, wait: bool = True, send_buffer: int = 0) -> Iterator[Live]:
    """Run a server, and end it; with a send buffer of so many bytes, or as the kernel has it."""
    found = listening(settings)
    if send_buffer:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = Running(settings)
    here = Live(server, found.getsockname()[1])

    def run() -> None:
        try:
            asyncio.run(server.serve(sockets=[found]))
        except BaseException as error:
            here.raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        if wait:
            until(lambda: server.service.state == "ready" or not thread.is_alive())
        yield here
    finally:
        server.service.drain(seconds=0.0)
        thread.join(EVER)
        found.close()
    assert not thread.is_alive() and not here.raised, f"the server ended badly: {here.raised}"


def until(holds: Callable[[], bool], *, seconds: float = EVER) -> None:
    """Wait for something that comes soon."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def ended_by(server: Running, number: int = signal.SIGTERM) -> None:
    """What a signal does, from a thread."""
    server.handle_exit(number, None)


class Own:
    """The engine alone, for one request at a time."""

    def __init__(self, settings: ServerSettings) -> None:
        self.version: Version = load_version(settings.pair)

    @property
    def engine(self) -> BatchEngine:
        """Idle between requests."""
        return self.version.engine

    def prompt(self, content: str) -> list[int]:
        """Tokens of a user's message."""
        found: list[int] = self.version.pair.prompt_tokens(content).tolist()
        return found

    def tokens(self, prompt: list[int], *, max_tokens: int, seed: int = 0, **sampling: Any) -> list[int]:
        """What the engine emits."""
        import torch

        settings = SamplingSettings(**({"temperature": 1.0} | sampling))
        request = Request(settings=settings, max_new_tokens=max_tokens, stop_tokens=self.version.stops)
        handle = self.engine.submit(torch.tensor(prompt), request, generator=TorchSource.seeded(seed))
        while not self.engine.idle:
            self.engine.step()
        return handle.result.tokens

    def text(self, tokens: list[int]) -> str:
        """As a client reads it."""
        return str(tokenizer().decode(tokens, skip_special_tokens=True))
