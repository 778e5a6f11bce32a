"""Answers of the target to many prompts, for corpora, by captured rounds: a prompt's answer begins where another ended.

What `inference.generation.generate_batch` gives, at the speed of a GPU: target-only rounds of many places, prompts read
several at a time. Tokens, states and features of an answer lie on the device until it has ended; all that have ended
with a round are copied out together, beside the rounds that follow.

    answers = CapturedAnswers(model, longest=512, settings=SamplingSettings(temperature=1.0), max_requests=512)
    responses = answers.answer(prompts, max_new_tokens=160, stop_tokens=stops, seed=0)
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inference.generation import Response
from inference.graphed.engine import GraphedEngine, GraphedHandle
from inference.graphed.rounds import Rounds
from inference.graphed.target import ALIGNMENT
from inference.model import CausalModel
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import request_seed

# Prompts wait until so many places are free, or an eighth of all.
_REFILL = 16
# Rounds of all places, of a quarter of them, and so on.
_FEWER = 4
# A request that has ended is in one round more.
_MARGIN = 2


class CapturedAnswers:
    """Captured rounds that answer list after list of prompts with the model itself.

    Args:
        model: the target.
        longest: most tokens of a prompt and its answer.
        settings: sampling; a repetition penalty is not supported here.
        max_requests: most answers at once.
        keep_states: whether to return the head's inputs for the tokens written.
        keep_prompt_states: whether to return them for the prompts' tokens too.
        taps: decoder layers whose outputs are returned as features.

    Raises:
        ValueError: a repetition penalty was asked for.
        InputError: a target that cannot be captured.
    """

    def __init__(
        self,
        model: CausalModel,
        *,
        longest: int,
        settings: SamplingSettings,
        max_requests: int = 512,
        keep_states: bool = False,
        keep_prompt_states: bool = False,
        taps: Sequence[int] = (),
    ) -> None:
        if settings.repetition_penalty != 1.0:
            raise ValueError("answers by captured rounds have no repetition penalty; set repetition_penalty=1")
        if max_requests < 1:
            raise ValueError(f"max_requests is {max_requests}; use at least 1")
        self._settings, self._model = settings, model
        self._keep_states, self._keep_prompt_states = keep_states, keep_prompt_states
        needed = min(longest, model.context_limit) + _MARGIN
        rounds = Rounds(
            model,
            None,
            block=0,
            batch=max_requests,
            capacity=-(-needed // ALIGNMENT) * ALIGNMENT,
            taps=taps,
            keep_states=keep_states or keep_prompt_states,
            top_k=0 if settings.greedy else settings.top_k,
            top_p=1.0 if settings.greedy else settings.top_p,
        )
        refill = max(1, min(_REFILL, max_requests // 8))
        # Few running requests are those of a list's end alone.
        sizes = [max_requests // _FEWER**n for n in range(1, max_requests.bit_length()) if max_requests >= _FEWER**n]
        self._engine = GraphedEngine(rounds, sizes=sizes, refill=refill, on_leave=self._left)
        self._ended: list[_Ended] = []

    def prepare(self, *, longest_prompt: int) -> None:
        """Capture all that is needed, so that nothing is captured while prompts are answered.

        Args:
            longest_prompt: in tokens.
        """
        self._engine.prepare(sampled=not self._settings.greedy, longest_prompt=longest_prompt)

    def answer(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        stop_tokens: frozenset[int],
        seed: int,
        temperatures: Sequence[float] = (),
    ) -> list[Response]:
        """Answer prompts.

        Args:
            prompts: token ids of each.
            max_new_tokens: longest answer; one also ends where its place does.
            stop_tokens: each ends an answer.
            seed: fixes every draw; an answer depends on it, the prompt and its place in the list.
            temperatures: of each prompt, above 0; none for that of the settings.

        Returns:
            One response for each prompt, as `generate_batch` makes them but for states, which lie on the CPU.

        Raises:
            InputError: a prompt is empty or too long.
        """
        engine = self._engine
        settings = [replace(self._settings, temperature=own) for own in temperatures] or [self._settings] * len(prompts)
        # Longest first: prompts that are read together are alike, and the last rounds are those of short ones.
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        handles = {
            index: engine.submit(
                prompts[index],
                Request(settings=settings[index], max_new_tokens=max_new_tokens, stop_tokens=stop_tokens),
                seed=request_seed(seed, "answer", index),
            )
            for index in order
        }
        outbox = _Outbox(engine.rounds.anchors.device)
        while not engine.idle:
            engine.step()
            outbox.send(self._pieces())
            outbox.receive()
        outbox.receive(all_of_them=True)
        return [self._response(handles[index], outbox, stop_tokens) for index in range(len(prompts))]

    def _left(self, handle: GraphedHandle, place: int, tokens: int) -> None:
        self._ended.append(_Ended(handle, place, len(handle.prompt), tokens))

    def _pieces(self) -> list["_Piece"]:
        """What is kept of those that have ended in this step, by what it is."""
        target, pieces = self._engine.rounds.target, []
        for one in self._ended:
            # The last token was never fed; what lies at its position comes from the round after.
            fed = one.prompt + one.tokens - 1
            if target.states is not None:
                start = 0 if self._keep_prompt_states else one.prompt - 1
                end = fed if self._keep_states else one.prompt - 1
                pieces.append(_Piece(one.handle, "states", target.states[one.place, start:end]))
            if target.features is not None:
                pieces.append(_Piece(one.handle, "features", target.features[one.place, :fed]))
        self._ended.clear()
        return pieces

    def _response(self, handle: GraphedHandle, outbox: "_Outbox", stop_tokens: frozenset[int]) -> Response:
        tokens = handle.result.tokens
        response = Response(tokens, stopped=tokens[-1] in stop_tokens)
        states = outbox.received.pop((handle, "states"), None)
        if states is not None:
            written = len(tokens) if self._keep_states else 0
            if self._keep_states:
                response.states = states[states.shape[0] - written :]
            if self._keep_prompt_states:
                response.prompt_states = states[: states.shape[0] - written]
        features = outbox.received.pop((handle, "features"), None)
        if features is not None:
            response.features = features
        return response


@dataclass(frozen=True)
class _Ended:
    """An answer that has left its place: whose, which, and tokens of its prompt and its own."""

    handle: GraphedHandle
    place: int
    prompt: int
    tokens: int


@dataclass(frozen=True)
class _Piece:
    """Rows `[n, width]` on the device that are kept of an answer."""

    handle: GraphedHandle
    name: str
    rows: Tensor


@dataclass(frozen=True)
class _Sent:
    """Pieces of one kind on their way, and when they are there."""

    pieces: list[_Piece]
    host: Tensor
    done: torch.cuda.Event | None


class _Outbox:
    """Copies rows to the CPU beside what the device does; nothing waits for it before it is full.

    Attributes:
        received: by answer and kind; features have a row of zeros behind them.
    """

    def __init__(self, device: torch.device) -> None:
        self.received: dict[tuple[GraphedHandle, str], Tensor] = {}
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._sent: deque[_Sent] = deque()

    def send(self, pieces: Sequence[_Piece]) -> None:
        """Take rows that may be overwritten afterwards."""
        for name in dict.fromkeys(piece.name for piece in pieces):
            own = [piece for piece in pieces if piece.name == name]
            joined = torch.cat([piece.rows for piece in own])
            if self._stream is None:
                self._sent.append(_Sent(own, joined, None))
                continue
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                host = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=True)
                host.copy_(joined, non_blocking=True)
                done = torch.cuda.Event()
                done.record()
            joined.record_stream(self._stream)
            self._sent.append(_Sent(own, host, done))

    def receive(self, *, all_of_them: bool = False) -> None:
        """Part what has arrived, so that its pinned memory is free again."""
        while self._sent:
            sent = self._sent[0]
            if sent.done is not None:
                if all_of_them:
                    sent.done.synchronize()
                elif not sent.done.query():
                    return
            self._sent.popleft()
            lengths = [piece.rows.shape[0] for piece in sent.pieces]
            for piece, rows in zip(sent.pieces, sent.host.split(lengths), strict=True):
                behind = int(piece.name == "features")
                own = torch.empty(rows.shape[0] + behind, rows.shape[1], dtype=rows.dtype)
                own[: rows.shape[0]] = rows
                own[rows.shape[0] :] = 0
                self.received[piece.handle, piece.name] = own
