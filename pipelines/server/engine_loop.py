"""The one thread that decodes: it takes requests from a queue, steps the engines and tells what they emitted.

All torch work of the server happens here, so no engine ever sees two threads. Usually there is one engine; while a new
version of the pair takes over there are two, stepped in turn, until the old one has no request left.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue

import torch

from inference.batch.engine import BatchEngine, Handle, Outcome
from inference.randomness import TorchSource
from inference.request import Decoded, Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What a step brought a request.

    Attributes:
        tokens: newly emitted.
        at: `time.monotonic()` when they were there.
        outcome: how the request has ended, or None while it goes on.
        error: what kept it from being decoded.
    """

    tokens: list[int]
    at: float
    outcome: Outcome | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """One request on its way to an engine.

    Attributes:
        engine: that decodes it.
        prompt: token ids.
        request: sampling, length and stop rules.
        seed: of its random decisions.
        deadline: `time.monotonic()` after which it is given up; None for never.
        on_update: called on the decoding thread with what each step brought; after one with an outcome comes no other.
        handle: the engine's, once it has taken the request.
    """

    engine: BatchEngine
    prompt: list[int]
    request: Request
    seed: int
    on_update: Callable[[Update], None]
    deadline: float | None = None
    handle: Handle | None = None
    fresh: list[int] = field(default_factory=list)

    @property
    def result(self) -> Decoded:
        """What the engine counted; final once the request has ended."""
        return Decoded() if self.handle is None else self.handle.result


class EngineLoop:
    """Steps engines for as long as they have requests.

    Args:
        on_failure: called on the decoding thread with what an engine raised; all its requests have been told.

    Attributes:
        num_running: requests in slots, as of the last step.
        num_waiting: requests that wait for one.
    """

    def __init__(self, on_failure: Callable[[BatchEngine, Exception], None]) -> None:
        self._on_failure = on_failure
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._jobs: list[Job] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="dspark-engine", daemon=True)
        self.num_running = self.num_waiting = 0

    def start(self) -> None:
        """Begin to wait for requests."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hand over a request, from any thread; what comes of it comes by `on_update`."""
        self._inbox.put(partial(self._submit, job))

    def cancel(self, job: Job) -> None:
        """Give a request up before the next step, from any thread; nothing happens to one that has ended."""
        self._inbox.put(partial(self._cancel, job))

    def stop(self, *, timeout_s: float = 30.0) -> None:
        """Cancel what there is, end the thread and wait for it."""
        self._inbox.put(self._stop)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping:
            self._take_in()
            self._step_all()
            self._tell()

    def _take_in(self) -> None:
        """Do what other threads asked for; with nothing to decode, wait for something."""
        if not self._jobs:
            self._inbox.get()()
        while not self._stopping:
            try:
                self._inbox.get_nowait()()
            except Empty:
                return

    def _submit(self, job: Job) -> None:
        device = job.engine.target.device
        try:
            job.handle = job.engine.submit(
                torch.tensor(job.prompt, device=device),
                job.request,
                generator=TorchSource.seeded(job.seed, device=device),
                deadline=job.deadline,
                on_tokens=job.fresh.extend,
            )
        except Exception as error:
            job.on_update(Update([], time.monotonic(), Outcome.CANCELLED, error))
            return
        self._jobs.append(job)

    def _cancel(self, job: Job) -> None:
        if job.handle is not None:
            job.engine.cancel(job.handle)

    def _stop(self) -> None:
        for job in self._jobs:
            self._cancel(job)
        self._stopping = True

    def _step_all(self) -> None:
        """One round of every engine that has requests; none is remembered, so that an old version can be let go."""
        for engine in dict.fromkeys(job.engine for job in self._jobs):
            self._step(engine)

    def _step(self, engine: BatchEngine) -> None:
        try:
            engine.step()
        except Exception as error:
            # Whatever it was, the state of this engine is lost, and with it its requests; others go on.
            logger.exception("decoding failed")
            lost = [job for job in self._jobs if job.engine is engine]
            self._jobs = [job for job in self._jobs if job.engine is not engine]
            for job in lost:
                job.on_update(Update([], time.monotonic(), Outcome.CANCELLED, error))
            self._on_failure(engine, error)

    def _tell(self) -> None:
        """Hand out what was emitted and what has ended."""
        now = time.monotonic()
        jobs, self._jobs = self._jobs, []
        engines = dict.fromkeys(job.engine for job in jobs)
        self.num_running = sum(engine.num_running for engine in engines)
        self.num_waiting = sum(engine.num_held for engine in engines) - self.num_running
        for job in jobs:
            assert job.handle is not None, "a job in the list has been submitted"
            outcome = job.handle.outcome if job.handle.ended else None
            if outcome is None:
                self._jobs.append(job)
            if job.fresh or outcome is not None:
                tokens = job.fresh.copy()
                job.fresh.clear()
                job.on_update(Update(tokens, now, outcome))
