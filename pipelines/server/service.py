"""The server without HTTP: which version serves, who is let in, what becomes of requests, and how it all ends.

Everything here runs on the event loop's thread, apart from loading, tokenizing and logging, which have a thread each.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import jinja2

from inference.batch.engine import BatchEngine
from inference.errors import InputError, first_line
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.traffic import TrafficLog, record_from
from pipelines.server.answers import Answer, Answers
from pipelines.server.engine_loop import EngineLoop, Job, Update
from pipelines.server.errors import ApiError, invalid
from pipelines.server.metrics import Metrics
from pipelines.server.schemas import Asked, ChatRequest, CompletionRequest
from pipelines.server.settings import ServerSettings
from pipelines.server.texts import AnswerText
from pipelines.server.versions import Version, identity, load_version

logger = logging.getLogger(__name__)

LOADING, READY, DRAINING, FAILED = "loading", "ready", "draining", "failed"
COMPLETION_TOKENS = 16
"""Length of a plain completion that does not say one, as with OpenAI."""
_PROBE_TOKENS = 4

Prompt = str | list[int] | list[dict[str, str]]


class Service:
    """One server.

    Args:
        settings: of the server.
        on_exit: called when it has nothing more to do, having failed or drained.

    Attributes:
        state: `loading`, `ready`, `draining` or `failed`.
        version: that new requests go to; None while the first is loaded.
        failure: what keeps it from serving.
        in_flight: requests that were let in and have not left their engine.
        under_way: their answers, once an engine has been given them.
    """

    def __init__(self, settings: ServerSettings, *, on_exit: Callable[[], None] = lambda: None) -> None:
        self.settings, self.on_exit = settings, on_exit
        self.state = LOADING
        self.version: Version | None = None
        self.failure: Exception | None = None
        self.in_flight = 0
        self.started = int(time.time())
        self._metrics: Metrics | None = None
        self._engines = EngineLoop(self._failed_on_thread)
        self._traffic = (
            None if settings.traffic is None else TrafficLog(settings.traffic, config=settings.traffic_config)
        )
        self._loader, self._tokenizing, self._logging = (
            ThreadPoolExecutor(1, thread_name_prefix=f"dspark-{name}") for name in ("load", "text", "log")
        )
        self.under_way: set[Answer] = set()
        self._seen = identity(settings.pair.folder)
        self._refused = False
        self._reloading = asyncio.Lock()
        self._drain_until = 0.0

    async def start(self) -> None:
        """Begin to load; answers come once that is done."""
        self._loop = asyncio.get_running_loop()
        self._engines.start()
        self._life = asyncio.create_task(self._live())

    async def close(self) -> None:
        """Cancel what is under way and let all threads end."""
        self._life.cancel()
        with suppress(asyncio.CancelledError):
            await self._life
        await asyncio.to_thread(self._engines.stop)
        for pool in (self._loader, self._tokenizing, self._logging):
            await asyncio.to_thread(pool.shutdown)

    @property
    def model_name(self) -> str:
        """What clients ask for."""
        return self.settings.model_name or ("" if self.version is None else self.version.name)

    @property
    def metrics(self) -> Metrics:
        """What is counted.

        Raises:
            ApiError: nothing yet.
        """
        if self._metrics is None:
            raise self._not_ready()
        return self._metrics

    @property
    def engine_requests(self) -> int:
        """Requests that engines hold, as of the last step."""
        return self._engines.num_running + self._engines.num_waiting

    def serving(self, model: str | None = None) -> Version:
        """The version that new requests go to.

        Raises:
            ApiError: it is loading or draining, or another model is asked for.
        """
        if self.state != READY or self.version is None:
            raise self._not_ready()
        if model is not None and model not in (self.model_name, self.version.label):
            known = f"this server has {self.model_name!r}"
            raise ApiError(404, f"no such model; {known}", param="model", code="model_not_found")
        return self.version

    async def answers(self, asked: CompletionRequest | ChatRequest, *, domain: str) -> Answers:
        """Let a request in and hand it to the engine.

        Raises:
            ApiError: it is not let in, or asks for what does not fit.
        """
        arrival = time.monotonic()
        version = self.serving(asked.model)
        prompts: list[Prompt] = [asked.plain_messages()] if isinstance(asked, ChatRequest) else list(asked.prompts())
        self._admit(len(prompts))
        try:
            tokens = await self._tokens(version, prompts)
            requests = [self._request(version, asked, len(own)) for own in tokens]
        except BaseException:
            self.in_flight -= len(prompts)
            raise
        each = []
        for index, (prompt, own, request) in enumerate(zip(prompts, tokens, requests, strict=True)):
            answer = self._answer(version, own, request, asked, index=index, prompt=prompt, arrival=arrival)
            each.append(answer)
            self.under_way.add(answer)
            self.metrics.prompt(len(own))
            self._engines.submit(answer.job)
        return Answers(each, on_finished=partial(self._finished, version, domain))

    async def reload(self) -> bool:
        """Look where the pair's path leads, and serve that if it is new; returns whether it was.

        Raises:
            ApiError: what is there cannot be served; the version before goes on.
        """
        before = self.serving()
        async with self._reloading:
            seen = await asyncio.to_thread(identity, self.settings.pair.folder)
            if seen == self._seen and not self._refused:
                return False
            self._seen = seen
            try:
                version = await self._loaded(beside=before)
            except Exception as error:
                self._refused = True
                self.metrics.reloaded("refused")
                reason = first_line(error)
                logger.warning("the new version is not served, %s goes on: %s", before.label, reason)
                raise ApiError(409, f"the new version is not served: {reason}", code="reload_failed") from None
            self._refused = False
            self._serve(version)
            self.metrics.reloaded("served")
            logger.info("%s serves from now on, after %s", version.label, before.label)
            return True

    def drain(self, *, seconds: float) -> None:
        """Let no one in any more; what runs has so many seconds."""
        if self.state != FAILED:
            self.state = DRAINING
        self._drain_until = time.monotonic() + seconds

    def drained(self) -> bool:
        """Whether the server may end; late requests are cancelled first. Asked again and again while draining."""
        if self.state == FAILED:
            return True
        if self.state != DRAINING:
            return False
        if self.in_flight and time.monotonic() >= self._drain_until:
            logger.warning("%d requests are cancelled, the time to drain is over", self.in_flight)
            for answer in self.under_way:
                self._engines.cancel(answer.job)
            self._drain_until = time.monotonic() + 1.0
        return self.in_flight == 0

    async def _live(self) -> None:
        """Load the first version, then look for others."""
        try:
            version = await self._loaded(beside=None)
        except Exception as error:
            self._fail(error)
            return
        self._metrics = Metrics(
            self.settings.model_name or version.name,
            running=lambda: self._engines.num_running,
            waiting=lambda: self._engines.num_waiting,
        )
        self._serve(version)
        self.state = READY if self.state == LOADING else self.state
        logger.info("%s is ready", version.label)
        while self.settings.limits.watch_s:
            await asyncio.sleep(self.settings.limits.watch_s)
            if self.state == READY and await asyncio.to_thread(identity, self.settings.pair.folder) != self._seen:
                with suppress(ApiError):  # it is logged, and the version before goes on
                    await self.reload()

    async def _loaded(self, *, beside: Version | None) -> Version:
        """Load what the path leads to, and let it decode a few tokens."""
        load = partial(load_version, self.settings.pair, beside=beside)
        version = await self._loop.run_in_executor(self._loader, load)
        ended: asyncio.Future[Update] = self._loop.create_future()

        def note(update: Update) -> None:
            if update.outcome is not None:
                self._loop.call_soon_threadsafe(ended.set_result, update)

        request = Request(settings=SamplingSettings(), max_new_tokens=_PROBE_TOKENS)
        self._engines.submit(Job(version.engine, [0, 0], request, 0, note))
        update = await ended
        if update.error is not None:
            raise update.error
        return version

    def _serve(self, version: Version) -> None:
        self.version = version
        self.metrics.version(version.label)

    def _admit(self, count: int) -> None:
        most = self.settings.pair.max_requests + self.settings.limits.max_waiting
        if count > most:
            raise invalid(f"{count} prompts, this server takes {most} at once", param="prompt")
        if self.in_flight + count > most:
            raise ApiError(429, "too many requests are waiting; try again", code="queue_full", retry_after_s=1)
        self.in_flight += count

    async def _tokens(self, version: Version, prompts: Sequence[Prompt]) -> list[list[int]]:
        return [await self._loop.run_in_executor(self._tokenizing, _encoded, version, prompt) for prompt in prompts]

    def _request(self, version: Version, asked: CompletionRequest | ChatRequest, prompt_tokens: int) -> Request:
        """What the decoder is asked; lengths that cannot be had are refused."""
        limits = self.settings.limits
        most = min(limits.max_prompt_tokens or version.context_limit, version.context_limit - 1)
        if not 1 <= prompt_tokens <= most:
            code = "context_length_exceeded" if prompt_tokens else "invalid_value"
            raise invalid(f"the prompt has {prompt_tokens} tokens; give 1 to {most}", param="prompt", code=code)
        length, param = asked.max_tokens, "max_tokens"
        if isinstance(asked, ChatRequest):
            if asked.max_completion_tokens is not None:
                length, param = asked.max_completion_tokens, "max_completion_tokens"
        elif length is None:
            length = min(COMPLETION_TOKENS, limits.max_tokens)
        room = version.context_limit - prompt_tokens
        if length is not None and length > min(room, limits.max_tokens):
            code = "context_length_exceeded" if length > room else "invalid_value"
            raise invalid(f"{param} is {length}; use at most {min(room, limits.max_tokens)}", param=param, code=code)
        return asked.request(max_new_tokens=length or min(room, limits.max_tokens), stop_tokens=version.stops)

    def _answer(
        self,
        version: Version,
        tokens: list[int],
        request: Request,
        asked: Asked,
        *,
        index: int,
        prompt: Prompt,
        arrival: float,
    ) -> Answer:
        def update(update: Update) -> None:
            self._loop.call_soon_threadsafe(self._push, answer, update)

        deadline = arrival + self.settings.limits.timeout_s
        answer = Answer(
            index=index,
            job=Job(version.engine, tokens, request, asked.drawn_seed(), update, deadline),
            text=AnswerText(version.pair.target.tokenizer, asked.stops),
            prompt=prompt,
            metrics=self.metrics,
            cancel=self._engines.cancel,
            arrival=arrival,
        )
        return answer

    def _push(self, answer: Answer, update: Update) -> None:
        if update.outcome is not None:
            self.in_flight -= 1
            self.under_way.discard(answer)
            self.metrics.decoded(answer.job.result)
        answer.push(update)

    def _finished(self, version: Version, domain: str, answer: Answer) -> None:
        """Log the traffic."""
        if self._traffic is None:
            return
        assert answer.ended is not None, "a finished answer has left its engine"
        tokenizer = version.pair.target.tokenizer
        prompt = answer.prompt
        record = record_from(
            answer.job.result,
            request_id=uuid.uuid4().hex,
            pair=version.label,
            target=version.pair.target_digest,
            arm=str(version.pair.info["draft"].get("name") or version.pair.info["draft"]["kind"]),
            domain=domain,
            temperature=answer.job.request.settings.temperature,
            prompt=str(tokenizer.decode(prompt)) if _are_tokens(prompt) else prompt,  # type: ignore[arg-type]
            response=str(tokenizer.decode(answer.text.tokens, skip_special_tokens=True)),
            seconds=answer.ended.at - answer.arrival,
        )
        self._logging.submit(self._traffic.append, record)

    def _failed_on_thread(self, engine: BatchEngine, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._engine_failed, engine, error)

    def _engine_failed(self, engine: BatchEngine, error: Exception) -> None:
        """A version that was only tried or is on its way out may fail; that which serves takes the server down."""
        if self.version is not None and self.version.engine is engine:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure, self.state = error, FAILED
        self.on_exit()

    def _not_ready(self) -> ApiError:
        return ApiError(503, f"the server is {self.state}", code=self.state, retry_after_s=5)


def _encoded(version: Version, prompt: Prompt) -> list[int]:
    """Token ids of a prompt. Plain text becomes what the tokenizer makes of it, messages go through the chat template.

    Raises:
        ApiError: the template refuses the messages, or token ids are none of the target's.
    """
    if _are_tokens(prompt):
        ids = [int(token) for token in prompt if isinstance(token, int)]
        if max(ids) >= version.pair.target.vocab_size:
            raise invalid(f"token ids end at {version.pair.target.vocab_size - 1}", param="prompt")
        return ids
    if isinstance(prompt, str):
        return list(version.pair.target.tokenizer(prompt)["input_ids"])
    try:
        found: list[int] = version.pair.prompt_tokens(prompt).tolist()  # type: ignore[arg-type]
    except InputError as error:
        raise invalid(str(error), param="messages") from None
    except jinja2.TemplateError as error:
        raise invalid(f"the chat template refuses these messages: {first_line(error)}", param="messages") from None
    return found


def _are_tokens(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and isinstance(prompt[0], int)
