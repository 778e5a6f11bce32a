"""Answers under way: what the engine emitted becomes pieces of text, a finish reason and figures.

All of it runs on the event loop's thread; the engine's thread only calls `Answer.push` through the loop.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from inference.batch.engine import Outcome
from inference.errors import InputError
from pipelines.server.engine_loop import Job, Update
from pipelines.server.errors import ApiError, invalid
from pipelines.server.metrics import Metrics
from pipelines.server.texts import AnswerText

STOP, LENGTH, ABORT, ERROR = "stop", "length", "abort", "error"


@dataclass(frozen=True)
class Piece:
    """What one or more rounds added to an answer.

    Attributes:
        index: of the answer among those of its request.
        text: without what stop strings cut off.
        tokens: those behind the text, and those of characters that are not complete yet.
        finish_reason: on the last piece `stop` or `length`, else None.
    """

    index: int
    text: str
    tokens: list[int]
    finish_reason: str | None


@dataclass(eq=False)
class Answer:
    """One answer under way.

    Attributes:
        index: among those of its request.
        job: what the engine was given.
        text: so far.
        prompt: messages, text or token ids, for the traffic log.
        metrics: that count it.
        cancel: gives the job up.
        arrival: `time.monotonic()` when the request came.
        finish_reason: None while it goes on.
    """

    index: int
    job: Job
    text: AnswerText
    prompt: str | list[dict[str, str]] | list[int]
    metrics: Metrics
    cancel: Callable[[Job], None]
    arrival: float
    finish_reason: str | None = None
    first_at: float | None = None
    ended: Update | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    _updates: list[Update] = field(default_factory=list)
    _last_at: float = 0.0

    def push(self, update: Update) -> None:
        """Take what a step brought."""
        self._updates.append(update)
        if update.outcome is not None:
            self.ended = update
        self.ready.set()

    def take(self) -> Piece | None:
        """What has come since the last call, or None.

        Raises:
            ApiError: it was given up.
        """
        start, text = len(self.text.tokens), ""
        updates, self._updates = self._updates, []
        for update in updates:
            text += self._add(update)
        if self.text.stopped and self.ended is None:
            self.cancel(self.job)
        if self.ended is not None:
            text += self._finish(self.ended)
        tokens = self.text.tokens[start:]
        if not tokens and not text and self.finish_reason is None:
            return None
        return Piece(self.index, text, tokens, self.finish_reason)

    def close(self) -> None:
        """Give it up if it is still under way."""
        if self.finish_reason is None:
            self.finish_reason = ABORT
            self.metrics.ended(ABORT, seconds=time.monotonic() - self.arrival)
            if self.ended is None:
                self.cancel(self.job)

    def _add(self, update: Update) -> str:
        before = len(self.text.tokens)
        text = self.text.add(update.tokens)
        if kept := len(self.text.tokens) - before:
            since = self.arrival if self.first_at is None else self._last_at
            self.metrics.emitted(kept, since_s=update.at - since, first=self.first_at is None)
            self.first_at = update.at if self.first_at is None else self.first_at
            self._last_at = update.at
        return text

    def _finish(self, ended: Update) -> str:
        """The rest of the text, and why it ends."""
        if ended.outcome is not Outcome.DONE and not self.text.stopped:
            self._fail(ended)
        rest = self.text.finish()
        stopped = self.text.stopped or self.text.tokens[-1] in self.job.request.stop_tokens
        self.finish_reason = STOP if stopped else LENGTH
        self.metrics.ended(self.finish_reason, seconds=ended.at - self.arrival)
        return rest

    def _fail(self, ended: Update) -> None:
        self.finish_reason = ABORT if ended.error is None else ERROR
        self.metrics.ended(self.finish_reason, seconds=ended.at - self.arrival)
        if isinstance(ended.error, InputError):
            raise invalid(str(ended.error), param="prompt")
        if ended.error is not None:
            raise ApiError(500, "decoding failed; the server's log says why", code="decoding_failed")
        if ended.outcome is Outcome.LATE:
            raise ApiError(504, "the request took longer than this server allows", code="timeout")
        raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5)


class Answers:
    """The answers of one request.

    Args:
        answers: one a prompt.
        on_finished: called with each that has come to its end.
    """

    def __init__(self, answers: list[Answer], *, on_finished: Callable[[Answer], None]) -> None:
        self.each, self._on_finished = answers, on_finished
        self._ready = asyncio.Event()
        for answer in answers:
            answer.ready = self._ready

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all answers, as they come; of each in order, and its last one with a finish reason.

        Raises:
            ApiError: one was given up.
        """
        under_way = list(self.each)
        while under_way:
            await self._ready.wait()
            self._ready.clear()
            for answer in list(under_way):
                piece = answer.take()
                if piece is None:
                    continue
                if piece.finish_reason is not None:
                    under_way.remove(answer)
                    self._on_finished(answer)
                yield piece

    def close(self) -> None:
        """Give up those that are still under way."""
        for answer in self.each:
            answer.close()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(answer.job.prompt) for answer in self.each)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(len(answer.text.tokens) for answer in self.each)

    def speculation(self) -> dict[str, object]:
        """What speculation made of finished answers: tokens a pass, and by position how many were verified and stood.

        Counts are the engine's, which for an answer cut at a stop string has decoded up to a round more.
        """
        results = [answer.job.result for answer in self.each]
        passes = sum(result.passes for result in results)
        depth = max((len(result.proposed) for result in results), default=0)

        def summed(counts: list[list[int]]) -> list[int]:
            return [sum(own[k] for own in counts if k < len(own)) for k in range(depth)]

        return {
            "tau": sum(len(result.tokens) for result in results) / passes if passes else None,
            "passes": passes,
            "proposed": summed([result.proposed for result in results]),
            "accepted": summed([result.accepted for result in results]),
        }
