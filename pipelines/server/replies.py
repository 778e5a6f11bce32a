"""Objects of the OpenAI interface, out of answers: whole ones, and chunks of a stream."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from pipelines.server.answers import Answers, Piece
from pipelines.server.errors import ApiError
from pipelines.server.schemas import ChatRequest, CompletionRequest, usage
from pipelines.server.transport import DONE, event
from pipelines.server.versions import Version


class Reply:
    """One request's reply.

    Args:
        asked: the request.
        answers: to it.
        model: name that was asked for.
        version: that answers.
        tells: whether it also says what speculation made of it.
    """

    def __init__(
        self,
        asked: CompletionRequest | ChatRequest,
        answers: Answers,
        *,
        model: str,
        version: Version,
        tells: bool,
    ) -> None:
        self._asked, self._answers, self._tells = asked, answers, tells
        self._chat = isinstance(asked, ChatRequest)
        self._head = {
            "id": ("chatcmpl-" if self._chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": version.label,
        }

    async def whole(self) -> dict[str, Any]:
        """The object of a request that is not streamed.

        Raises:
            ApiError: an answer was given up.
        """
        texts = ["" for _ in self._answers.each]
        async for piece in self._answers.pieces():
            texts[piece.index] += piece.text
        choices = []
        for answer, text in zip(self._answers.each, texts, strict=True):
            said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            tokens = {"token_ids": answer.text.tokens} if self._asked.return_token_ids else {}
            choices.append({"index": answer.index, **said, **tokens, **_ending(answer.finish_reason)})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage(), **self._told()}

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream; one with an error is the last one."""
        try:
            if self._chat:
                yield self._chunk(_choice(0, {"delta": {"role": "assistant", "content": ""}}, None))
            async for piece in self._answers.pieces():
                yield self._chunk(self._piece(piece))
            if self._asked.wants_usage or self._tells:
                yield self._chunk(None, usage=self._usage(), **self._told())
            yield DONE
        except ApiError as error:
            yield event(error.body)

    def _piece(self, piece: Piece) -> dict[str, Any]:
        # As with OpenAI, a last chunk without text has an empty delta.
        said = {"delta": {"content": piece.text} if piece.text else {}} if self._chat else {"text": piece.text}
        tokens = {"token_ids": piece.tokens} if self._asked.return_token_ids else {}
        return _choice(piece.index, {**said, **tokens}, piece.finish_reason)

    def _chunk(self, choice: dict[str, Any] | None, **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return event({**self._head, "object": kind, "choices": [] if choice is None else [choice], **more})

    def _usage(self) -> dict[str, int]:
        return usage(self._answers.prompt_tokens, self._answers.completion_tokens)

    def _told(self) -> dict[str, Any]:
        return {"dspark": self._answers.speculation()} if self._tells else {}


def _choice(index: int, said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, **said, **_ending(finish_reason)}


def _ending(finish_reason: str | None) -> dict[str, Any]:
    return {"logprobs": None, "finish_reason": finish_reason}
