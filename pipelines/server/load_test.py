"""A load on a real server: clients that ask one request after another, every answer checked against the engine alone.

    python -m pipelines.server.load_test --pair registry/smollm2-135m/champion --clients 1,8,64

Servers run in processes of their own, one with the pair and one with its target alone, and take turns at every number
of clients, in both orders, so that a machine that is slower for a while is slower for both. Decides nothing.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx
import torch

from inference.errors import InputError
from inference.pair_files import DEFAULT_CACHE
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import explain_mismatch
from pipelines.files import write_json
from pipelines.server.settings import PairSettings
from pipelines.server.versions import Version, load_version

PAIR, ALONE = "pair", "none"
_STARTED_S = 300.0
_QUESTIONS = (
    "Why is the sky blue?",
    "What should I see in Lisbon in two days?",
    "How do I keep basil alive in a pot?",
    "Explain how a bill becomes a law.",
    "Write a Python function that reverses a linked list.",
    "Write a Python function that counts the words of a file.",
    "What does this do: sorted(set(x), key=len)?",
    "Write a SQL query for the three largest orders of each customer.",
    "A train goes 60 km in 45 minutes. How fast is it?",
    "What is 17 times 23? Show the steps.",
    "Tom has 5 apples, eats 2 and buys 7. How many has he?",
    "Solve 3x + 5 = 20 for x.",
)


@dataclass(frozen=True)
class Asked:
    """One request: everything that decides its answer."""

    prompt: str
    temperature: float
    seed: int


@dataclass(frozen=True)
class Answered:
    """What a client saw. Seconds count from when the request was sent.

    Attributes:
        asked: the request.
        tokens: token ids.
        first_s: to the first of them.
        whole_s: to the end.
    """

    asked: Asked
    tokens: list[int]
    first_s: float
    whole_s: float


@dataclass(frozen=True)
class Figure:
    """One arm under one number of clients.

    Attributes:
        arm: `pair`, or `none` for the target alone.
        clients: that asked at once.
        requests: answered.
        tokens_per_s: of all clients together.
        first_s: median and 95th percentile of the time to the first token.
        whole_s: likewise of the whole request.
        equal: answers that are the engine's own, token for token.
        rounding: greedy answers that part from it at a near-tie of two tokens.
        parted: sampled answers that part from it; see docs/server.md.
        unexplained: greedy answers that part from it with no near-tie: decoding was not lossless.
    """

    arm: str
    clients: int
    requests: int
    tokens_per_s: float
    first_s: tuple[float, float]
    whole_s: tuple[float, float]
    equal: int
    rounding: int
    parted: int
    unexplained: int


@contextmanager
def serving(words: Sequence[str]) -> Iterator[str]:
    """Run `dspark serve` in a process; gives its address.

    Raises:
        InputError: it ended before it served.
    """
    command = [sys.executable, "-m", "pipelines.cli", "serve", "--port", "0", "--quiet", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None, "its errors go into a pipe"
    timer = threading.Timer(_STARTED_S, process.kill)
    timer.start()
    said = ""
    try:
        for line in process.stderr:
            said += line
            if line.endswith("is ready\n"):
                break
        timer.cancel()
        found = re.search(r"listening on (http://\S+),", said)
        if found is None or not said.endswith("is ready\n"):
            last = "".join(said.strip().splitlines()[-1:])
            raise InputError("the server did not start", where=" ".join(words), mend=last)
        # What it says from here on is not wanted, but a pipe that is full would stop it.
        rest = threading.Thread(target=process.stderr.read)
        rest.start()
        try:
            yield found[1]
        finally:
            process.terminate()
            rest.join()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stderr.close()


async def drive(url: str, asked: Sequence[Asked], *, clients: int, max_tokens: int) -> tuple[list[Answered], float]:
    """Let clients ask, each its next request once it has its answer; returns answers and seconds for all of them."""
    waiting, found = list(reversed(asked)), []

    async def client(http: httpx.AsyncClient) -> None:
        while waiting:
            found.append(await _ask(http, waiting.pop(), max_tokens=max_tokens))

    bounds = httpx.Limits(max_connections=clients)
    began = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=bounds) as http, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client(http))
    return found, time.perf_counter() - began


async def _ask(http: httpx.AsyncClient, asked: Asked, *, max_tokens: int) -> Answered:
    body = {
        "model": (await http.get("/v1/models")).raise_for_status().json()["data"][0]["id"],
        "messages": [{"role": "user", "content": asked.prompt}],
        "temperature": asked.temperature,
        "seed": asked.seed,
        "max_tokens": max_tokens,
        "stream": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    began, first = time.perf_counter(), 0.0
    async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                [choice] = json.loads(line[len("data: ") :])["choices"]
                tokens += choice.get("token_ids", [])
                first = first or (time.perf_counter() - began if tokens else 0.0)
    return Answered(asked, tokens, first, time.perf_counter() - began)


class Own:
    """The engine alone, one request at a time; remembers its answers."""

    def __init__(self, version: Version, *, max_tokens: int) -> None:
        self._version, self._max_tokens = version, max_tokens
        self._known: dict[Asked, list[int]] = {}

    def tokens(self, asked: Asked) -> list[int]:
        """Its answer; a greedy one has no use for a seed."""
        asked = asked if asked.temperature else replace(asked, seed=0)
        if asked not in self._known:
            version, prompt = self._version, self._version.pair.prompt_tokens(asked.prompt)
            request = Request(
                settings=SamplingSettings(temperature=asked.temperature),
                max_new_tokens=self._max_tokens,
                stop_tokens=version.stops,
            )
            source = TorchSource.seeded(asked.seed, device=prompt.device)
            handle = version.engine.submit(prompt, request, generator=source)
            while not version.engine.idle:
                version.engine.step()
            self._known[asked] = handle.result.tokens
        return self._known[asked]

    def verdict(self, answered: Answered) -> str:
        """`equal`, or how an answer parts from it; see `Figure`."""
        expected = self.tokens(answered.asked)
        if answered.tokens == expected:
            return "equal"
        if answered.asked.temperature > 0:
            return "parted"
        target = self._version.pair.target
        prompt = self._version.pair.prompt_tokens(answered.asked.prompt)
        found = explain_mismatch(target, prompt, answered.tokens, expected, reference_precision=target.precision)
        return "rounding" if found is not None and found.near_tie else "unexplained"


def figure(arm: str, clients: int, answered: Sequence[Answered], seconds: float, own: Own) -> Figure:
    """What a load gave."""
    verdicts = [own.verdict(one) for one in answered]
    return Figure(
        arm=arm,
        clients=clients,
        requests=len(answered),
        tokens_per_s=round(sum(len(one.tokens) for one in answered) / seconds, 1),
        first_s=_middle_and_tail([one.first_s for one in answered]),
        whole_s=_middle_and_tail([one.whole_s for one in answered]),
        **{name: verdicts.count(name) for name in ("equal", "rounding", "parted", "unexplained")},
    )


def _middle_and_tail(values: Sequence[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return round(cuts[9], 3), round(cuts[18], 3)


def table(figures: Sequence[Figure]) -> str:
    """Markdown."""
    lines = [
        "| clients | arm | requests | tokens/s | first token p50 / p95 (s) | whole p50 / p95 (s) "
        "| equal | rounding | parted |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in figures:
        lines.append(
            f"| {one.clients} | {one.arm} | {one.requests} | {one.tokens_per_s:.1f} "
            f"| {one.first_s[0]:.2f} / {one.first_s[1]:.2f} | {one.whole_s[0]:.2f} / {one.whole_s[1]:.2f} "
            f"| {one.equal} | {one.rounding} | {one.parted} |"
        )
    return "\n".join(lines) + "\n"


def requests_of(count: int, *, temperatures: Sequence[float], seed: int) -> list[Asked]:
    """Questions in a seeded order, each with a temperature and a seed of its own."""
    draw = random.Random(seed)
    questions = [question for _ in range(-(-count // len(_QUESTIONS))) for question in draw.sample(_QUESTIONS, 12)]
    return [Asked(q, draw.choice(temperatures), draw.randrange(1 << 31)) for q in questions[:count]]


def main(argv: list[str]) -> int:
    """Run the load; the table goes to stdout. Returns 1 if an answer is not explained.

    Raises:
        InputError: the pair cannot be served.
    """
    words = _parser().parse_args(argv)
    base = ["--pair", str(words.pair), "--cache", str(words.cache), "--device", words.device]
    base += ["--max-requests", str(words.slots), "--max-waiting", str(max(words.clients)), "--watch-seconds", "0"]
    sizes = {count: max(words.requests, count) for count in words.clients}
    gathered: dict[tuple[int, str], tuple[list[Answered], float]] = {}
    own = base if words.load_costs is None else [*base, "--load-costs", str(words.load_costs)]
    with serving(own) as pair, serving([*base, "--lookahead", "0"]) as alone:
        urls = {PAIR: pair, ALONE: alone}
        for arm in urls:
            asyncio.run(drive(urls[arm], requests_of(4, temperatures=[0.0], seed=0), clients=2, max_tokens=8))
        for clients, count in sizes.items():
            for turn in range(words.turns):
                asked = requests_of(count, temperatures=words.temperatures, seed=turn + 1)
                for arm in (PAIR, ALONE) if turn % 2 == 0 else (ALONE, PAIR):
                    found, seconds = asyncio.run(drive(urls[arm], asked, clients=clients, max_tokens=words.max_tokens))
                    before, spent = gathered.get((clients, arm), ([], 0.0))
                    gathered[clients, arm] = ([*before, *found], spent + seconds)
                    sys.stderr.write(f"{clients} clients, {arm}: {count} requests in {seconds:.1f} s\n")
    figures = _checked(words, gathered)
    sys.stdout.write(table(figures))
    if words.out is not None:
        write_json(words.out, [asdict(one) for one in figures])
    return 1 if any(one.unexplained for one in figures) else 0


def _checked(words: argparse.Namespace, gathered: dict[tuple[int, str], tuple[list[Answered], float]]) -> list[Figure]:
    """Compare with the engine alone, which has the machine to itself by now."""
    settings = PairSettings(folder=words.pair, cache=words.cache, device=words.device, max_requests=1)
    own = {PAIR: Own(load_version(settings), max_tokens=words.max_tokens)}
    alone = PairSettings(folder=words.pair, cache=words.cache, device=words.device, max_requests=1, lookahead=0)
    own[ALONE] = Own(load_version(alone), max_tokens=words.max_tokens)
    return [figure(arm, clients, *found, own[arm]) for (clients, arm), found in gathered.items()]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _shares(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.server.load_test", description=__doc__.split("\n")[0])
    parser.add_argument("--pair", required=True, type=Path, help="a version folder of a registry, or its champion")
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE.expanduser(), help="where converted models are kept"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--clients", type=_numbers, default=[1, 8, 64], help="that ask at once (default: 1,8,64)")
    parser.add_argument("--slots", type=int, default=8, help="of the server (default: 8)")
    parser.add_argument("--requests", type=int, default=12, help="fewest of one turn (default: 12)")
    parser.add_argument("--turns", type=int, default=2, help="of each arm at each number of clients (default: 2)")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer (default: 64)")
    parser.add_argument("--temperatures", type=_shares, default=[0.0], help="drawn for each request (default: 0)")
    parser.add_argument("--load-costs", type=Path, default=None, help="for the server with the pair; see dspark serve")
    parser.add_argument("--out", type=Path, default=None, help="figures as JSON")
    return parser


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main(sys.argv[1:]))
