"""Many requests decoded together, losslessly: they join and leave between rounds, and one target pass a round verifies
all their blocks.

Every request has its own drafter, policy, sampling, seed and stop rules, and advances by its own accepted length, so
its tokens are those it would get alone. Nothing here knows of text, or of time but for deadlines.

    engine = BatchEngine(target, make_drafter, FixedLookahead(3), max_requests=8)
    handle = engine.submit(prompt, request, generator=TorchSource.seeded(0))
    while not engine.idle:
        engine.step()
    handle.result.tokens
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch

from inference.batch.ragged import check_ragged, ragged_logits
from inference.decoder import (
    Decoded,
    Request,
    VerifiedTokens,
    after_sibling,
    check_prompt_length,
    judge,
    kept_rows,
    up_to_stop,
)
from inference.drafters import Drafter, Proposal, ReadsFeatures
from inference.errors import InputError
from inference.lookahead import Lookahead
from inference.model import CausalModel
from inference.randomness import Source
from inference.verification import Verdict


class Outcome(Enum):
    """What has become of a request."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    LATE = "late"


class QueueFull(Exception):
    """No further request is taken now; try again when one has ended."""


@dataclass(eq=False)
class Handle:
    """One request, as the caller sees it.

    Attributes:
        prompt: int64 `[T]`.
        request: what was asked.
        generator: source of its random decisions, draft's and target's.
        deadline: `time.monotonic()` after which it is given up; None for never.
        on_tokens: called with newly emitted tokens after every round.
        outcome: what has become of it.
        result: tokens so far, and what they took; seconds are not told apart by request.
    """

    prompt: torch.Tensor
    request: Request
    generator: Source
    deadline: float | None = None
    on_tokens: Callable[[list[int]], None] | None = None
    outcome: Outcome = Outcome.WAITING
    result: Decoded = field(default_factory=Decoded)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.outcome not in (Outcome.WAITING, Outcome.RUNNING)


class _Running:
    """A request in a slot."""

    def __init__(self, handle: Handle, drafter: Drafter, policy: Lookahead, *, budget: int) -> None:
        self.handle, self.drafter, self.policy, self.budget = handle, drafter, policy, budget
        self.reader = drafter if isinstance(drafter, ReadsFeatures) else None
        self.context = VerifiedTokens(handle.prompt, capacity=handle.prompt.shape[0] + budget)
        self.proposal = Proposal(handle.prompt[:0])

    def propose(self) -> torch.Tensor:
        """Draft; returns the block for the coming pass: anchor, chain, siblings."""
        handle = self.handle
        # The target adds a token of its own to every round, so the last one needs no proposal.
        limit = min(self.policy.max_tokens, self.budget - len(handle.result.tokens) - 1)
        self.proposal = self.drafter.propose(
            self.context.tokens,
            limit=limit,
            lookahead=self.policy,
            settings=handle.request.settings,
            generator=handle.generator,
        )
        parts = [self.context.tokens[-1:], self.proposal.tokens]
        return torch.cat(parts if self.proposal.siblings is None else [*parts, self.proposal.siblings])

    def accept(self, logits: torch.Tensor) -> tuple[Verdict, bool]:
        """Verify the block by its rows `[w, V]`; returns the verdict and whether the request has ended."""
        handle, proposal, context = self.handle, self.proposal, self.context.tokens
        settings, generator = handle.request.settings, handle.generator
        verdict = judge(proposal, logits, context, settings=settings, generator=generator)
        emitted = [*proposal.tokens[: verdict.num_accepted].tolist(), int(verdict.next_token)]
        if verdict.sibling is not None:
            row = logits[1 + len(proposal) + verdict.sibling]
            emitted.append(after_sibling(row, context, emitted, settings, generator))
        handle.result.count(proposal, verdict)
        emitted, finished = up_to_stop(emitted, handle.request.stop_tokens)
        handle.result.tokens += emitted
        self.context.append(emitted)
        if handle.on_tokens is not None:
            handle.on_tokens(emitted)
        return verdict, finished or len(handle.result.tokens) >= self.budget

    def settle(self, verdict: Verdict, features: torch.Tensor | None) -> None:
        """Tell drafter and policy what stands; features are of the block's tokens, `[w, m * D]`."""
        self.drafter.rollback(verdict.num_accepted)
        if self.reader is not None and features is not None:
            kept = kept_rows(self.proposal, verdict)
            self.reader.read(features[: len(kept)] if verdict.sibling is None else features[kept])
        self.policy.observe(len(self.proposal), verdict.num_accepted)


class BatchEngine:
    """Continuous batching over a slotted cache.

    Args:
        target: the model whose law every output follows.
        make_drafter: a drafter for one request; drafters keep the state of their request, and may share weights.
        lookahead: policy; every request gets its own from `begin`.
        max_requests: most requests at once.
        max_cache_tokens: positions of the cache that running requests may come to need, counted as slots times the
            longest of them, since that is what a slotted cache holds; None for what `max_requests` of the whole context
            need.
        max_waiting: most requests that wait for a slot; None for any number.
        clock: seconds, for deadlines.

    Raises:
        InputError: a target whose requests cannot share a pass.
    """

    def __init__(
        self,
        target: CausalModel,
        make_drafter: Callable[[], Drafter],
        lookahead: Lookahead,
        *,
        max_requests: int,
        max_cache_tokens: int | None = None,
        max_waiting: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_requests < 1:
            raise ValueError(f"max_requests is {max_requests}; use at least 1")
        check_ragged(target)
        self.target, self.lookahead = target, lookahead
        self.max_requests, self.max_waiting, self._clock = max_requests, max_waiting, clock
        self._make_drafter = make_drafter
        self._spare: list[Drafter] = []
        self._block = lookahead.longest + sum(lookahead.siblings)
        self._cache = target.new_slots(max_slots=max_requests, max_tokens=target.context_limit + self._block)
        self.max_cache_tokens = max_cache_tokens or max_requests * (target.context_limit + self._block)
        self._waiting: deque[Handle] = deque()
        self._running: list[_Running] = []  # by slot
        example = self._drafter()
        self._taps = example.taps if isinstance(example, ReadsFeatures) else ()
        self._spare.append(example)

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._waiting and not self._running

    @property
    def num_running(self) -> int:
        """Requests in slots."""
        return len(self._running)

    @property
    def cache_tokens(self) -> int:
        """Positions that the running requests may come to need; never above `max_cache_tokens`."""
        return self._needed([self._room(running.handle) for running in self._running])

    def submit(
        self,
        prompt: torch.Tensor,
        request: Request,
        *,
        generator: Source,
        deadline: float | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> Handle:
        """Take a request; it runs as soon as there is room, in the order of arrival.

        Raises:
            InputError: a prompt without tokens, too long, or of more cache than there will ever be.
            QueueFull: `max_waiting` requests wait already.
        """
        check_prompt_length(prompt.shape[0], self.target.context_limit)
        handle = Handle(prompt, request, generator, deadline, on_tokens)
        if self._needed([self._room(handle)]) > self.max_cache_tokens:
            raise InputError(
                f"the request needs {self._room(handle)} cache positions, there are {self.max_cache_tokens}",
                where="prompt",
                mend="shorten it, ask for fewer tokens, or raise max_cache_tokens",
            )
        if self.max_waiting is not None and len(self._waiting) >= self.max_waiting:
            raise QueueFull(f"{len(self._waiting)} requests are waiting")
        self._waiting.append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """Give a request up; what it has emitted stays. Nothing happens to one that has ended."""
        self._end(handle, Outcome.CANCELLED)

    @torch.inference_mode()
    def step(self) -> None:
        """Let late requests go and waiting ones in, then one round of all that run."""
        now = self._clock()
        for handle in [*self._waiting, *(running.handle for running in self._running)]:
            if handle.deadline is not None and now > handle.deadline:
                self._end(handle, Outcome.LATE)
        self._admit()
        if self._running:
            self._round()

    def _round(self) -> None:
        blocks = [running.propose() for running in self._running]
        widths = [block.shape[0] for block in blocks]
        slots = [running.proposal.slots for running in self._running]
        with self.target.tapped(self._taps) as features:
            logits = ragged_logits(self.target, torch.cat(blocks), widths, self._cache, slots=slots)
            taken = features.take()[0].split(widths) if self._taps else [None] * len(widths)
        before = [length - width for length, width in zip(self._cache.lengths, widths, strict=True)]
        verdicts, finished = zip(
            *(running.accept(rows) for running, rows in zip(self._running, logits.split(widths), strict=True)),
            strict=True,
        )
        self._keep(before, verdicts)
        for running, verdict, states in zip(self._running, verdicts, taken, strict=True):
            running.settle(verdict, states)
        for handle in [running.handle for running, ended in zip(self._running, finished, strict=True) if ended]:
            self._end(handle, Outcome.DONE)

    def _keep(self, before: list[int], verdicts: tuple[Verdict, ...]) -> None:
        """Let siblings that stand take their places, and forget what does not, in every slot at once."""
        kept = [kept_rows(running.proposal, verdict) for running, verdict in zip(self._running, verdicts, strict=True)]
        moved = [slot for slot, verdict in enumerate(verdicts) if verdict.sibling is not None]
        self._cache.move(
            moved,
            [before[slot] + kept[slot][-1] for slot in moved],
            [before[slot] + len(kept[slot]) - 1 for slot in moved],
        )
        self._cache.rollback([length + len(rows) for length, rows in zip(before, kept, strict=True)])

    def _admit(self) -> None:
        """Give slots to waiting requests in order, and prefill them."""
        while self._waiting and len(self._running) < self.max_requests:
            handle = self._waiting[0]
            rooms = [*(self._room(running.handle) for running in self._running), self._room(handle)]
            if self._needed(rooms) > self.max_cache_tokens:
                return
            self._waiting.popleft()
            running = _Running(handle, self._drafter(), self.lookahead.begin(), budget=self._budget(handle))
            slot = self._cache.join()
            self._running.append(running)
            handle.outcome = Outcome.RUNNING
            self._prefill(running, slot)

    def _prefill(self, running: _Running, slot: int) -> None:
        """Feed all of a prompt but its last token, which is the first anchor."""
        prompt = running.handle.prompt
        running.drafter.begin(prompt)
        if prompt.shape[0] < 2:
            return
        with self.target.tapped(self._taps) as features:
            rows = torch.empty(0, dtype=torch.long, device=prompt.device)
            ragged_logits(self.target, prompt[:-1], [prompt.shape[0] - 1], self._cache, rows=rows, active=[slot])
            if running.reader is not None:
                running.reader.read(features.take()[0])

    def _end(self, handle: Handle, outcome: Outcome) -> None:
        """Free what a request holds; the last slot's request moves into its place."""
        if handle.ended:
            return
        if handle.outcome is Outcome.WAITING:
            self._waiting.remove(handle)
        else:
            slot = next(i for i, running in enumerate(self._running) if running.handle is handle)
            self._spare.append(self._running[slot].drafter)
            last = self._running.pop()
            if self._cache.leave(slot) is not None:
                self._running[slot] = last
        handle.outcome = outcome

    def _drafter(self) -> Drafter:
        """A drafter that no running request uses: one that has served before, or a new one."""
        return self._spare.pop() if self._spare else self._make_drafter()

    def _budget(self, handle: Handle) -> int:
        return min(handle.request.max_new_tokens, self.target.context_limit - handle.prompt.shape[0])

    def _room(self, handle: Handle) -> int:
        """Positions a request may come to need: prompt, answer, and the block that is verified at its end."""
        return handle.prompt.shape[0] + self._budget(handle) + self._block

    @staticmethod
    def _needed(rooms: list[int]) -> int:
        return len(rooms) * max(rooms, default=0)
