"""Responses from a server that runs the target: any OpenAI-compatible chat endpoint (vLLM, SGLang, llama.cpp, hosted).

Not a way to learn from some other model: the server must run the very target of this run, or acceptance suffers. It
gives texts, which are put into tokens through the target's chat template; states of the target it cannot give.
Example: `dspark corpus corpus=server corpus.base_url=http://localhost:8000/v1`.
"""

import os
import random
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill.chat import Message, conversation_tokens, end_of_turn, messages_for
from distill.prompts import Prompt
from distill.responses import check_answers
from distill.responses._context import AnswerContext, sample_of
from inference.errors import InputError

if TYPE_CHECKING:
    import httpx

    from distill.corpus import Sample
    from distill.responses._http import JsonClient


@dataclass(frozen=True)
class ServerResponse:
    """One answer."""

    text: str
    finish_reason: str
    """`stop` (the target ended its turn), `length` (cut at max_new_tokens), or the server's own word."""
    model: str
    """Name under which the server answered."""
    prompt_tokens: int
    """As counted by the server (-1 = not told)."""
    completion_tokens: int
    """As counted by the server (-1 = not told)."""


@dataclass
class Config:
    """How to reach the server and how it samples."""

    kind: str = "server"
    base_url: str = "http://localhost:8000/v1"
    """Address up to and including the version, without /chat/completions."""
    model: str = ""
    """Name of the target on the server (empty = the only one it serves)."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key (empty = no key). Never the key itself."""
    temperature: float = 0.8
    """Sampling temperature (0 = greedy)."""
    top_p: float = 1.0
    """Nucleus mass (1 = off)."""
    max_new_tokens: int = 512
    """Longest response of one turn, in tokens."""
    answers: int = 1
    """Most answers to one training prompt, where its domain has fewer prompts than responses are wanted."""
    batch_size: int = 64
    """Conversations in one shard, which is what a killed run loses at most."""
    concurrency: int = 16
    """Requests under way at a time."""
    retries: int = 5
    """Further attempts after a failed one."""
    timeout_s: float = 300.0
    """Seconds to wait for the server to connect, and for the next bytes."""
    backoff_s: float = 1.0
    """Seconds before the first retry; doubled for each further one, up to 60, and shortened at random by up to half."""

    def __post_init__(self) -> None:
        url = _url(self.base_url)
        if url is None or url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"server: base_url is {self.base_url!r}: use http://host:port/v1 or https://host/v1")
        if url.userinfo or url.query:
            raise ValueError(
                "server: base_url holds a password or a query: put the key into the variable of api_key_env"
            )
        if self.api_key_env and not self.api_key_env.isidentifier():
            raise ValueError("server: api_key_env is no name of an environment variable: give the name, not the key")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"server: temperature {self.temperature}, top_p {self.top_p}: use temperature >= 0 and 0 < top_p <= 1"
            )
        check_answers(self.answers, temperature=self.temperature)
        if min(self.max_new_tokens, self.batch_size, self.concurrency) < 1 or self.retries < 0:
            raise ValueError("server: use max_new_tokens, batch_size and concurrency of at least 1, and retries >= 0")
        if self.timeout_s <= 0 or self.backoff_s < 0:
            raise ValueError(f"server: timeout_s {self.timeout_s}, backoff_s {self.backoff_s}: use positive seconds")

    def conversations_per_shard(self) -> int:
        """Conversations of a shard."""
        return self.batch_size

    def needs_target(self) -> bool:
        """Whether `answer` runs the target in this process."""
        return False

    def answer(self, prompts: list[Prompt], *, splits: list[str], context: AnswerContext, seed: int) -> "list[Sample]":
        """Have the server answer a batch of prompts, turn by turn.

        Args:
            prompts: one shard.
            splits: split of each prompt.
            context: its tokenizer puts the texts into tokens.
            seed: sent with the requests.

        Raises:
            InputError: see `respond`; or the target has no chat template.
        """
        threads = [messages_for(prompt.turns, system=prompt.system) for prompt in prompts]
        finished: list[list[bool]] = [[] for _ in prompts]
        for turn in range(max(len(prompt.turns) for prompt in prompts)):
            waiting = [index for index, prompt in enumerate(prompts) if turn < len(prompt.turns)]
            for index in waiting if turn > 0 else ():
                threads[index].append({"role": "user", "content": prompts[index].turns[turn]})
            responses = self.respond([threads[index] for index in waiting], seed=seed + turn * len(prompts))
            for index, response in zip(waiting, responses, strict=True):
                threads[index].append({"role": "assistant", "content": response.text})
                finished[index].append(response.finish_reason != "length")
        return [
            _sample(prompt, messages, split=split, ended=ended, context=context)
            for prompt, messages, split, ended in zip(prompts, threads, splits, finished, strict=True)
        ]

    def respond(self, conversations: Sequence[Sequence[Message]], *, seed: int) -> list[ServerResponse]:
        """Return the server's answer to each conversation, in the order given.

        At most `concurrency` requests are under way at a time. Busy, failing, silent or garbled answers are retried
        with exponential backoff; the first request that fails for good stops the others.

        Args:
            conversations: message lists, each ending with a user's turn.
            seed: request i is sent with seed + i; servers that honour it give the same answers again.

        Raises:
            InputError: refused, timed out or garbled to the last retry; rejected by the server; no key.
        """
        if not conversations:
            return []
        with self._client() as client:
            model = self.model or _only_model(client)
            with ThreadPoolExecutor(self.concurrency, thread_name_prefix="server") as pool:
                futures = [
                    pool.submit(self._complete, client, conversation, model=model, seed=(seed + index) % 2**31)
                    for index, conversation in enumerate(conversations)
                ]
                try:
                    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                    failed = next((future for future in futures if future in done and future.exception()), None)
                    return [failed.result()] if failed else [future.result() for future in futures]
                finally:
                    client.stopped.set()
                    pool.shutdown(wait=False, cancel_futures=True)

    def served_model(self) -> str:
        """Return the name under which the server knows the target: `model`, or the only one it serves.

        Raises:
            InputError: the server cannot be reached, or serves several models.
        """
        if self.model:
            return self.model
        with self._client() as client:
            return _only_model(client)

    def _client(self) -> "JsonClient":
        from distill.responses._http import JsonClient

        return JsonClient(
            self.base_url,
            key=_key(self.api_key_env),
            connections=self.concurrency,
            retries=self.retries,
            timeout_s=self.timeout_s,
            backoff_s=self.backoff_s,
        )

    def _complete(
        self, client: "JsonClient", conversation: Sequence[Message], *, model: str, seed: int
    ) -> ServerResponse:
        """Send one conversation."""
        body = {
            "model": model,
            "messages": list(conversation),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_new_tokens,
            "seed": seed,
            "stream": False,
        }
        return client.request("POST", "chat/completions", body=body, parse=_response, jitter=random.Random(seed))


def _sample(
    prompt: Prompt, messages: list[Message], *, split: str, ended: list[bool], context: AnswerContext
) -> "Sample":
    """Put a conversation into tokens. The end-of-turn token of a response that was cut off is not the target's own."""
    ids, mask = conversation_tokens(context.tokenizer, messages)
    closing = end_of_turn(context.tokenizer)
    last_of_runs = [i for i, own in enumerate(mask) if own and not (i + 1 < len(mask) and mask[i + 1])]
    for index, complete in zip(last_of_runs, ended, strict=False):
        if not complete and ids[index] == closing:
            mask[index] = False
    return sample_of(prompt, split=split, ids=ids, mask=mask, states=None, text=messages[-1]["content"])


def _key(variable: str) -> str:
    """Return the key from the environment, or "" if no variable is configured."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {variable} is not set",
            where="corpus.api_key_env",
            mend=f"export {variable}=..., or set corpus.api_key_env='' for a server without keys",
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"the environment variable {variable} holds characters that no key has",
            where="corpus.api_key_env",
            mend="export it again, without line breaks",
        )
    return key


def _only_model(client: "JsonClient") -> str:
    """Ask the server what it serves."""
    names = client.request(
        "GET", "models", parse=lambda value: [str(entry["id"]) for entry in value["data"]], jitter=random.Random(0)
    )
    if len(names) != 1:
        raise InputError(
            f"the server serves {len(names)} models: {', '.join(names) or 'none'}",
            where=client.base_url,
            mend="set corpus.model to one of them",
        )
    return names[0]


def _response(value: Any) -> ServerResponse:
    """Read a chat completion; KeyError, IndexError, TypeError or AttributeError if it is none."""
    choice = value["choices"][0]
    text = choice["message"]["content"]
    if not isinstance(text, str):
        raise TypeError(f"content is a {type(text).__name__}")
    usage = value.get("usage") or {}
    return ServerResponse(
        text=text,
        finish_reason=str(choice.get("finish_reason") or "stop"),
        model=str(value.get("model", "")),
        prompt_tokens=int(usage.get("prompt_tokens", -1)),
        completion_tokens=int(usage.get("completion_tokens", -1)),
    )


def _url(text: str) -> "httpx.URL | None":
    import httpx

    try:
        return httpx.URL(text)
    except (httpx.InvalidURL, TypeError):
        return None
