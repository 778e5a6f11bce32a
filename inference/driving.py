"""Drives one engine with a load: requests kept running in a closed loop, or coming as a Poisson process.

Either engine, kernel by kernel or of captured rounds. What is written down is `inference.batch.load`'s; all seconds
count from the start of the run, by the clock that is passed in.
"""

import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from inference.batch.engine import BatchEngine, Handle, Outcome
from inference.batch.load import Asked, Served, Trace
from inference.batch.timing import Clock, PassTimer, clocked, timed_passes
from inference.graphed.engine import GraphedEngine, GraphedHandle
from inference.randomness import TorchSource
from inference.records import tokens_digest


def closed_loop(
    engine: BatchEngine | GraphedEngine, asked: Sequence[Asked], *, concurrency: int, clock: Clock = time.perf_counter
) -> tuple[Trace, list[list[int]]]:
    """Keep a number of requests running: each that ends is replaced by the next of the list, until all have ended.

    Args:
        engine: idle, with as many places at least; of captured rounds just as many, since it lets those that wait in by
            itself as soon as a place is free.
        asked: the list.
        concurrency: requests that are kept running.
        clock: seconds.

    Returns:
        What happened, and the tokens of every request, in the order of the list.

    Raises:
        ValueError: fewer requests than are to run at once, or another number of places than the engine needs.
    """
    if not 1 <= concurrency <= min(len(asked), engine.max_requests):
        raise ValueError(
            f"{len(asked)} requests and {engine.max_requests} places cannot keep {concurrency} requests running"
        )
    if isinstance(engine, GraphedEngine) and concurrency != engine.max_requests:
        raise ValueError(f"captured rounds of {engine.max_requests} places keep as many requests, not {concurrency}")
    with _watching(engine, asked, clock) as driver:
        window: float | None = None
        while driver.num_waiting or not engine.idle:
            while driver.num_waiting and (driver.lets_in or driver.num_open < concurrency):
                driver.submit_next(arrival=None if driver.lets_in else driver.now())
            if window is None and driver.num_open < concurrency:
                window = driver.now()
            driver.step()
        # Where all of the last ones end in one round, no place was ever free.
        window = driver.now() if window is None else window
        return driver.trace(window), driver.answers()


def timed_load(
    engine: BatchEngine | GraphedEngine,
    asked: Sequence[Asked],
    arrivals: Sequence[float],
    *,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Trace, list[list[int]]]:
    """Let requests come at given moments, whatever the engine is doing, until all have ended.

    A request has arrived at its moment even where a round kept the engine from taking it, so that waiting counts.

    Args:
        engine: idle.
        asked: the list.
        arrivals: of each request, ascending, seconds from the start; see `poisson_arrivals`. All at 0 is a batch.
        clock: seconds.
        sleep: waits for so many seconds, while nothing runs.

    Returns:
        What happened, and the tokens of every request, in the order of the list.
    """
    with _watching(engine, asked, clock) as driver:
        coming = deque(arrivals)
        assert len(coming) == driver.num_waiting, "each request arrives once"
        while coming or not engine.idle:
            while coming and coming[0] <= driver.now():
                driver.submit_next(arrival=coming.popleft())
            if engine.idle:
                sleep(max(0.0, coming[0] - driver.now()))
            else:
                driver.step()
        return driver.trace(driver.now()), driver.answers()


def poisson_arrivals(count: int, *, rate: float, seed: int) -> list[float]:
    """Moments of a Poisson process: gaps are exponential with mean 1 / rate.

    Args:
        count: arrivals.
        rate: a second.
        seed: fixes them; another rate stretches the same pattern.
    """
    draw, moment, found = random.Random(seed), 0.0, []
    for _ in range(count):
        moment += draw.expovariate(1.0) / rate
        found.append(moment)
    return found


@dataclass
class _Watched:
    """A request that was submitted. Where it came with its place, its arrival is known when it starts."""

    asked: Asked
    handle: Handle | GraphedHandle
    arrival: float | None
    start: float | None
    emissions: list[tuple[float, int]]

    @property
    def started(self) -> bool:
        """Whether it was let in."""
        handle = self.handle
        return handle.outcome is not Outcome.WAITING if isinstance(handle, Handle) else handle.started


class _Driver(ABC):
    """Submits the requests of a list in its order, steps and takes the times.

    Attributes:
        lets_in: whether the engine itself fills a place that comes free with one that waits, before anyone else could.
    """

    lets_in = False

    def __init__(self, asked: Sequence[Asked], clock: Clock) -> None:
        self._coming = deque(enumerate(asked))
        self._watched: list[_Watched] = []
        self._open: list[_Watched] = []
        self._clock = clock
        self._began = clock()

    @property
    def num_waiting(self) -> int:
        """Requests that were not yet submitted."""
        return len(self._coming)

    @property
    def num_open(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._open)

    def now(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    def submit_next(self, *, arrival: float | None) -> None:
        """Hand the next request to the engine.

        Args:
            arrival: when it came; None for when it starts.
        """
        emissions: list[tuple[float, int]] = []
        index, asked = self._coming.popleft()
        handle = self._submit(index, asked, lambda tokens: emissions.append((self.now(), len(tokens))))
        self._watched.append(_Watched(asked, handle, arrival, None, emissions))
        self._open.append(self._watched[-1])

    def step(self) -> None:
        """One round."""
        began = self.now()
        self._step()
        for one in self._open:
            if one.start is None and one.started:
                one.start = began
        self._open = [one for one in self._open if not one.handle.ended]

    def trace(self, window: float) -> Trace:
        """All that was seen."""
        elapsed = self.now()
        rounds, passes, drafting = self._spent()
        return Trace(
            window=_rounded(window),
            elapsed=_rounded(elapsed),
            rounds=rounds,
            pass_seconds=_rounded(passes),
            draft_seconds=_rounded(drafting),
            served=[_served(one) for one in self._watched],
        )

    def answers(self) -> list[list[int]]:
        """Tokens of every request."""
        return [one.handle.result.tokens for one in self._watched]

    @abstractmethod
    def _submit(self, index: int, asked: Asked, on_tokens: Callable[[list[int]], None]) -> Handle | GraphedHandle:
        """Hand one to the engine, by its place in the list."""

    @abstractmethod
    def _step(self) -> None:
        """One round of the engine."""

    @abstractmethod
    def _spent(self) -> tuple[int, float, float]:
        """Rounds, and seconds of passes and of drafting in them."""


class _BatchDriver(_Driver):
    """Kernel by kernel; the clock waits for the device."""

    def __init__(self, engine: BatchEngine, asked: Sequence[Asked], clock: Clock, timer: PassTimer) -> None:
        self._engine, self._timer = engine, timer
        self._drafted, self._rounds = engine.seconds["draft"], 0
        super().__init__(asked, clocked(engine.target.device, clock))

    def _submit(self, index: int, asked: Asked, on_tokens: Callable[[list[int]], None]) -> Handle:
        generator = TorchSource.seeded(asked.seed, device=asked.prompt.device)
        return self._engine.submit(asked.prompt, asked.request, generator=generator, on_tokens=on_tokens)

    def _step(self) -> None:
        self._engine.step()
        self._rounds += 1

    def _spent(self) -> tuple[int, float, float]:
        return self._rounds, self._timer.seconds, self._engine.seconds["draft"] - self._drafted


class _CapturedDriver(_Driver):
    """By captured rounds. The clock does not wait for the device, which is at the next round when tokens come: a moment
    is when the host had them."""

    lets_in = True

    def __init__(self, engine: GraphedEngine, asked: Sequence[Asked], clock: Clock) -> None:
        self._engine = engine
        self._rounds, self._spent_before = engine.num_rounds, engine.device_seconds
        # Fetched before the start: to fetch one waits for the round on its way.
        self._prompts = [one.prompt.tolist() for one in asked]
        device = engine.rounds.anchors.device
        clocked(device, clock)()
        super().__init__(asked, clock)

    def _submit(self, index: int, asked: Asked, on_tokens: Callable[[list[int]], None]) -> GraphedHandle:
        return self._engine.submit(self._prompts[index], asked.request, seed=asked.seed, on_tokens=on_tokens)

    def _step(self) -> None:
        self._engine.step()

    def _spent(self) -> tuple[int, float, float]:
        return self._engine.num_rounds - self._rounds, self._engine.device_seconds - self._spent_before, 0.0


@contextmanager
def _watching(engine: BatchEngine | GraphedEngine, asked: Sequence[Asked], clock: Clock) -> Iterator[_Driver]:
    """A driver whose clock starts now."""
    assert engine.idle, "an engine under load serves no one else"
    if isinstance(engine, GraphedEngine):
        yield _CapturedDriver(engine, asked, clock)
        return
    with timed_passes(engine.target, clock=clock) as timer:
        yield _BatchDriver(engine, asked, clock, timer)


def _served(one: _Watched) -> Served:
    assert one.start is not None and one.emissions, "a request that has ended was let in and has emitted"
    result = one.handle.result
    arrival = one.start if one.arrival is None else one.arrival
    return Served(
        prompt_id=one.asked.prompt_id,
        domain=one.asked.domain,
        temperature=one.asked.request.settings.temperature,
        arrival=_rounded(arrival),
        start=_rounded(one.start),
        end=_rounded(one.emissions[-1][0]),
        emissions=[(_rounded(moment), count) for moment, count in one.emissions],
        passes=result.passes,
        proposed=result.proposed,
        accepted=result.accepted,
        blocks={str(length): rounds for length, rounds in sorted(result.blocks.items())},
        digest=tokens_digest(result.tokens),
    )


def _rounded(seconds: float) -> float:
    """Microseconds are enough, and keep a line short."""
    return round(seconds, 6)
