"""Answers of the target to many prompts, for corpora: a prompt's answer begins where another one has ended.

Target-only, without padding: the prompts of a pass lie one after another, and every answer has a slot of its own length
(`inference.batch.cache`). What all prompts begin with is read once, and copied into each slot. Draws are made for all
rows of a pass at once, so that tokens depend on which prompts are given together, and on nothing else. Along with the
tokens it can keep what training needs of the target: the states that entered the head, and tapped layers.
"""

import itertools
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.batch.cache import SlotCache
from inference.batch.ragged import check_ragged, ragged_logits, worthwhile_passes
from inference.decoder import check_prompt_length
from inference.errors import InputError
from inference.features import Features
from inference.generation import Response, draw_tokens, generate_batch, shared_tokens
from inference.model import CausalModel
from inference.sampling_settings import SamplingSettings

_LOG = logging.getLogger(__name__)

# Prompts wait until so many places of `max_running` are free, so that passes of prompts are few.
_REFILL_SHARE = 8


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What answers are to be, and what is kept of the target along with them.

    Attributes:
        settings: sampling; a repetition penalty is not supported here.
        max_new_tokens: longest answer; one also ends where its prompt leaves no more room in the context.
        stop_tokens: each ends an answer.
        keep_states: return the head's inputs for the tokens written.
        keep_prompt_states: return them for the prompts' tokens too.
        taps: decoder layers whose outputs are returned as features.
    """

    settings: SamplingSettings
    max_new_tokens: int
    stop_tokens: frozenset[int]
    keep_states: bool = False
    keep_prompt_states: bool = False
    taps: tuple[int, ...] = ()


def answer_all(
    model: CausalModel,
    prompts: Sequence[list[int]],
    wanted: Wanted,
    *,
    max_running: int,
    seed: int,
    temperatures: Sequence[float] = (),
) -> list[Response]:
    """Answer prompts with the model itself; in batches, padded, where its requests cannot share a pass otherwise.

    Args:
        model: the target.
        prompts: token ids of each.
        wanted: of every answer.
        max_running: most answers at once.
        seed: fixes every draw.
        temperatures: of each prompt, above 0; none for that of `wanted`.

    Returns:
        One response for each prompt, in their order.

    Raises:
        ValueError: a repetition penalty was asked for, or no room for a single answer.
        InputError: a prompt is empty or does not fit the context.
    """
    if max_running < 1:
        raise ValueError(f"max_running is {max_running}; use at least 1")
    if wanted.settings.repetition_penalty != 1.0:
        raise ValueError("answers to many prompts have no repetition penalty; set repetition_penalty=1")
    for prompt in prompts:
        check_prompt_length(len(prompt), model.context_limit)
    if not prompts:
        return []
    try:
        check_ragged(model)
        return _Answering(model, prompts, wanted, temperatures, max_running=max_running, seed=seed).all()
    except InputError as error:
        _LOG.info("answers are made in padded batches: %s", error)
    starts = range(0, len(prompts), max_running)
    return [
        response
        for number, start in enumerate(starts)
        for response in generate_batch(
            model,
            list(prompts[start : start + max_running]),
            settings=wanted.settings,
            max_new_tokens=wanted.max_new_tokens,
            stop_tokens=wanted.stop_tokens,
            seed=seed + number,
            temperatures=temperatures[start : start + max_running],
            keep_states=wanted.keep_states,
            keep_prompt_states=wanted.keep_prompt_states,
            taps=wanted.taps,
        )
    ]


@dataclass(eq=False)
class _Answer:
    """One prompt, and what was written so far."""

    prompt: list[int]
    budget: int
    temperature: float | None = None
    response: Response = field(default_factory=Response)
    states: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)


class _Answering:
    """The answers to some prompts; running ones have the slots behind that of what all prompts begin with."""

    def __init__(
        self,
        model: CausalModel,
        prompts: Sequence[list[int]],
        wanted: Wanted,
        temperatures: Sequence[float],
        *,
        max_running: int,
        seed: int,
    ) -> None:
        self._model, self._wanted = model, wanted
        self._generator = torch.Generator(device=model.device).manual_seed(seed)
        limit = model.context_limit
        self._answers = [
            _Answer(prompt, min(wanted.max_new_tokens, limit - len(prompt)), temperature)
            for prompt, temperature in itertools.zip_longest(prompts, temperatures)
        ]
        self._waiting = deque(self._answers)
        self._running: list[_Answer] = []
        self._places = min(max_running, len(prompts))
        self._shared = shared_tokens(prompts)
        self._first = int(self._shared > 0)  # slot of the first running answer
        self._shared_states = self._shared_features = torch.empty(0)
        # The last token of an answer is never fed.
        longest = max((len(answer.prompt) + answer.budget - 1 for answer in self._answers), default=1)
        self._cache: SlotCache = model.new_slots(max_slots=self._places + self._first, max_tokens=longest)

    @torch.inference_mode()
    def all(self) -> list[Response]:
        """Make them."""
        refill = max(1, self._places // _REFILL_SHARE)
        with self._model.captured_states() as states, self._model.tapped(self._wanted.taps) as features:
            if self._shared:
                self._read_shared(states, features)
            while self._waiting or self._running:
                free = self._places - len(self._running)
                if self._waiting and free >= min(refill, len(self._waiting)):
                    self._admit(free, states, features)
                if self._running:
                    self._step(states, features)
        return [_finished(answer) for answer in self._answers]

    def _read_shared(self, states: list[Tensor], features: Features) -> None:
        tokens = self._answers[0].prompt[: self._shared]
        self._pass(tokens, [len(tokens)], [self._cache.join()], rows=[len(tokens) - 1])
        self._shared_states = states.pop()[0]
        self._shared_features = self._tapped(features)

    def _admit(self, free: int, states: list[Tensor], features: Features) -> None:
        """Read waiting prompts, in passes of so many tokens as are worth one, and write the first token of each."""
        new = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        ended: list[_Answer] = []
        for indices in worthwhile_passes([len(answer.prompt) - self._shared for answer in new]):
            group = [new[index] for index in indices]
            slots = [self._cache.fork(0, self._shared) if self._first else self._cache.join() for _ in group]
            parts = [answer.prompt[self._shared :] for answer in group]
            widths = [len(part) for part in parts]
            ends = torch.tensor(widths).cumsum(0) - 1
            logits = self._pass([token for part in parts for token in part], widths, slots, rows=ends.tolist())
            self._running += group
            if self._wanted.taps:
                for answer, own in zip(group, self._tapped(features).split(widths), strict=True):
                    answer.features += [self._shared_features, own] if self._shared else [own]
            read = states.pop()[0]
            if self._wanted.keep_prompt_states:
                for answer, own in zip(group, read.split(widths), strict=True):
                    pieces = [self._shared_states, own[:-1]] if self._shared else [own[:-1]]
                    answer.response.prompt_states = torch.cat(pieces)
            ended += self._write(group, logits, read[ends.to(read.device)])
        self._leave(ended)

    def _step(self, states: list[Tensor], features: Features) -> None:
        """One more token of every running answer."""
        running = self._running
        slots = range(self._first, self._first + len(running))
        logits = self._pass([answer.response.tokens[-1] for answer in running], [1] * len(running), slots)
        if self._wanted.taps:
            for answer, row in zip(running, self._tapped(features).split(1), strict=True):
                answer.features.append(row)
        self._leave(self._write(running, logits, states.pop()[0]))

    def _pass(
        self, tokens: list[int], widths: Sequence[int], slots: Sequence[int], *, rows: list[int] | None = None
    ) -> Tensor:
        """Feed blocks to slots; logits of some rows, or of all."""
        device = self._model.device
        return ragged_logits(
            self._model,
            torch.tensor(tokens, device=device),
            widths,
            self._cache,
            rows=None if rows is None else torch.tensor(rows, device=device),
            active=slots,
        )

    def _tapped(self, features: Features) -> Tensor:
        """Features of the latest pass, on the CPU."""
        return features.take()[0].to(torch.bfloat16).cpu() if self._wanted.taps else torch.empty(0)

    def _write(self, answers: Sequence[_Answer], logits: Tensor, states: Tensor) -> list[_Answer]:
        """Draw a token of each by logits `[R, V]`, keep its state of `[R, D]`; returns the answers that end so."""
        own = [answer.temperature for answer in answers if answer.temperature is not None]
        tokens = draw_tokens(logits, self._wanted.settings, self._generator, temperatures=own).tolist()
        kept = states.split(1) if self._wanted.keep_states else ()
        for answer, state in zip(answers, kept, strict=False):
            answer.states.append(state)
        for answer, token in zip(answers, tokens, strict=True):
            answer.response.tokens.append(token)
            answer.response.stopped = token in self._wanted.stop_tokens
        return [a for a in answers if a.response.stopped or len(a.response.tokens) == a.budget]

    def _leave(self, ended: Sequence[_Answer]) -> None:
        """Free their slots; the last slot's answer moves into each."""
        for answer in ended:
            place = self._running.index(answer)
            self._cache.leave(self._first + place)
            last = self._running.pop()
            if last is not answer:
                self._running[place] = last


def _finished(answer: _Answer) -> Response:
    """The response, its pieces joined; features end with zeros for the last token, which was never fed."""
    response = answer.response
    if answer.states:
        response.states = torch.cat(answer.states)
    if answer.features:
        last = answer.features[0].new_zeros(1, answer.features[0].shape[1])
        response.features = torch.cat([*answer.features, last])
    return response
