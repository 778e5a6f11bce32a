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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch

from inference.batch.costs import LoadCosts
from inference.batch.drafting import draft_group
from inference.batch.ragged import check_ragged, ragged_logits, worthwhile_passes
from inference.batch.sharing import PassSharing
from inference.decoder import Clock, VerifiedTokens, after_sibling, check_prompt_length, judge, kept_rows, up_to_stop
from inference.drafters import Ask, Drafter, Proposal
from inference.errors import InputError
from inference.lookahead import Lookahead
from inference.lookahead.scheduled import DelayedLookahead, ScheduledLookahead
from inference.model import CausalModel
from inference.randomness import Source
from inference.request import PARTS, Decoded, Request
from inference.sampling_settings import SamplingSettings
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
        result: tokens so far, and what they took; seconds are the engine's, not told apart by request.
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

    def __init__(self, handle: Handle, policy: Lookahead, *, budget: int) -> None:
        self.handle, self.policy, self.budget = handle, policy, budget
        self.context = VerifiedTokens(handle.prompt, capacity=handle.prompt.shape[0] + budget)
        self.proposal = Proposal(handle.prompt[:0])

    def ask(self, policy: Lookahead) -> Ask:
        """What it wants drafted under a policy."""
        handle = self.handle
        # The target adds a token of its own to every round, so the last one needs no proposal.
        limit = min(policy.max_tokens, self.budget - len(handle.result.tokens) - 1)
        return Ask(self.context.tokens, limit, policy, handle.request.settings, handle.generator)

    def block(self) -> list[torch.Tensor]:
        """What the coming pass is fed, in pieces: anchor, chain, siblings."""
        parts = [self.context.tokens[-1:], self.proposal.tokens]
        return parts if self.proposal.siblings is None else [*parts, self.proposal.siblings]

    def accept(self, logits: torch.Tensor, choices: torch.Tensor | None) -> tuple[Verdict, bool]:
        """Verify the block by its rows; returns the verdict and whether the request has ended.

        Args:
            logits: `[w, V]`.
            choices: int64 `[w]`, their likeliest tokens, where they are known; used if that is all the request needs.
        """
        handle, proposal, context = self.handle, self.proposal, self.context.tokens
        settings, generator = handle.request.settings, handle.generator
        known = choices if takes_likeliest(settings) else None
        verdict = judge(proposal, logits, context, settings=settings, generator=generator, choices=known)
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
        costs: of rounds under load; with them a `scheduled` policy decides for all requests of a pass together
            (`inference.batch.sharing`), else each request for itself.
        clock: seconds, for deadlines.

    Attributes:
        seconds: spent so far, by part as in `inference.request.PARTS`; `other` is what a step takes besides.

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
        costs: LoadCosts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_requests < 1:
            raise ValueError(f"max_requests is {max_requests}; use at least 1")
        check_ragged(target)
        self.target, self.lookahead = target, lookahead
        self.max_requests, self.max_waiting, self._clock = max_requests, max_waiting, clock
        self._block = lookahead.longest + sum(lookahead.siblings)
        self._cache = target.new_slots(max_slots=max_requests, max_tokens=target.context_limit + self._block)
        self.max_cache_tokens = max_cache_tokens or max_requests * (target.context_limit + self._block)
        self._waiting: deque[Handle] = deque()
        self._running: list[_Running] = []  # by slot
        self._drafts = draft_group(make_drafter, max_requests=max_requests, max_tokens=target.context_limit)
        self._sharing: PassSharing | None = None
        if costs is not None and isinstance(lookahead, ScheduledLookahead | DelayedLookahead) and not lookahead.learns:
            self._sharing = PassSharing(lookahead, costs)
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._watch = Clock(self.seconds, target.device)

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._waiting and not self._running

    @property
    def num_running(self) -> int:
        """Requests in slots."""
        return len(self._running)

    @property
    def num_held(self) -> int:
        """Requests in slots, and those that wait for one."""
        return len(self._running) + len(self._waiting)

    @property
    def cache_tokens(self) -> int:
        """Positions that the running requests may come to need; never above `max_cache_tokens`."""
        return self._needed([self.room(running.handle) for running in self._running])

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
        handle = Handle(prompt, request, generator, deadline, on_tokens)
        self.take(handle)
        return handle

    def take(self, handle: Handle) -> None:
        """Take a request that waits elsewhere; raises as `submit` does."""
        check_prompt_length(handle.prompt.shape[0], self.target.context_limit)
        if self._needed([self.room(handle)]) > self.max_cache_tokens:
            raise InputError(
                f"the request needs {self.room(handle)} cache positions, there are {self.max_cache_tokens}",
                where="prompt",
                mend="shorten it, ask for fewer tokens, or raise max_cache_tokens",
            )
        if self.max_waiting is not None and len(self._waiting) >= self.max_waiting:
            raise QueueFull(f"{len(self._waiting)} requests are waiting")
        self._waiting.append(handle)

    def cache_tokens_with(self, *handles: Handle) -> int:
        """Positions that its requests, waiting ones too, and these may come to need."""
        held = [*(running.handle for running in self._running), *self._waiting, *handles]
        return self._needed([self.room(one) for one in held])

    def cancel(self, handle: Handle) -> None:
        """Give a request up; what it has emitted stays. Nothing happens to one that has ended."""
        self._end(handle, Outcome.CANCELLED)

    @torch.inference_mode()
    def step(self) -> None:
        """Let late requests go and waiting ones in, then one round of all that run."""
        start, before = self._watch.now(), sum(self.seconds.values())
        now = self._clock()
        for handle in [*self._waiting, *(running.handle for running in self._running)]:
            if handle.deadline is not None and now > handle.deadline:
                self._end(handle, Outcome.LATE)
        with self._watch.part("prefill"):
            self._admit()
        if self._running:
            self._round()
        self.seconds["other"] += max(0.0, self._watch.now() - start - (sum(self.seconds.values()) - before))

    def _round(self) -> None:
        part = self._watch.part
        with part("draft"):
            self._propose()
        with part("verify"):
            blocks = [running.block() for running in self._running]
            widths = [sum(piece.shape[0] for piece in block) for block in blocks]
            slots = [running.proposal.slots for running in self._running]
            fed = torch.cat([piece for block in blocks for piece in block])
            with self.target.tapped(self._drafts.taps) as features:
                logits = ragged_logits(self.target, fed, widths, self._cache, slots=slots)
                taken = features.take()[0].split(widths) if self._drafts.taps else ()
        with part("accept"):
            verdicts, finished = self._accept(logits, widths)
        with part("cache"):
            self._settle(widths, verdicts, taken)
            for handle in [running.handle for running, ended in zip(self._running, finished, strict=True) if ended]:
                self._end(handle, Outcome.DONE)

    def _propose(self) -> None:
        """Draft for all that run; under a shared policy, cut the blocks to what it admits."""
        if self._sharing is None:
            proposals = self._drafts.propose([running.ask(running.policy) for running in self._running])
        else:
            noted = self._sharing.policies(self._sharing.depth(len(self._running)), len(self._running))
            asks = [running.ask(policy) for running, policy in zip(self._running, noted, strict=True)]
            drafted = self._drafts.propose(asks)
            admitted = self._sharing.admit(noted, [len(proposal) for proposal in drafted])
            proposals = [proposal.first(length) for proposal, length in zip(drafted, admitted, strict=True)]
        for running, proposal in zip(self._running, proposals, strict=True):
            running.proposal = proposal

    def _accept(self, logits: torch.Tensor, widths: Sequence[int]) -> tuple[list[Verdict], list[bool]]:
        """Verify all blocks by their rows; the likeliest tokens of all rows are found at once."""
        likeliest = any(takes_likeliest(running.handle.request.settings) for running in self._running)
        choices = logits.argmax(dim=-1).split(list(widths)) if likeliest else [None] * len(widths)
        rows = logits.split(list(widths))
        outcomes = [running.accept(*own) for running, *own in zip(self._running, rows, choices, strict=True)]
        return [verdict for verdict, _ in outcomes], [ended for _, ended in outcomes]

    def _settle(self, widths: list[int], verdicts: Sequence[Verdict], taken: Sequence[torch.Tensor]) -> None:
        """Tell caches, drafts and policies what stands; features are of the blocks' tokens, `[w, m * D]` each."""
        before = [length - width for length, width in zip(self._cache.lengths, widths, strict=True)]
        self._keep(before, verdicts)
        self._drafts.rollback([verdict.num_accepted for verdict in verdicts])
        for slot, (running, verdict) in enumerate(zip(self._running, verdicts, strict=True)):
            if taken:
                kept = kept_rows(running.proposal, verdict)
                self._drafts.read(slot, taken[slot][: len(kept)] if verdict.sibling is None else taken[slot][kept])
            running.policy.observe(len(running.proposal), verdict.num_accepted)

    def _keep(self, before: list[int], verdicts: Sequence[Verdict]) -> None:
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
        admitted: list[int] = []
        while self._waiting and len(self._running) < self.max_requests:
            handle = self._waiting[0]
            rooms = [*(self.room(running.handle) for running in self._running), self.room(handle)]
            if self._needed(rooms) > self.max_cache_tokens:
                break
            self._waiting.popleft()
            admitted.append(self._cache.join())
            self._running.append(_Running(handle, self.lookahead.begin(), budget=self._budget(handle)))
            handle.outcome = Outcome.RUNNING
            self._drafts.join(handle.prompt)
        # A prompt's last token is the first anchor, so that of a single token nothing is prefilled.
        several = [slot for slot in admitted if self._running[slot].handle.prompt.shape[0] > 1]
        for group in worthwhile_passes([self._running[slot].handle.prompt.shape[0] for slot in several]):
            self._prefill([several[index] for index in group])

    def _prefill(self, slots: Sequence[int]) -> None:
        """Feed all of these requests' prompts but the last token of each, in one pass."""
        prompts = [self._running[slot].handle.prompt[:-1] for slot in slots]
        widths = [prompt.shape[0] for prompt in prompts]
        rows = torch.empty(0, dtype=torch.long, device=prompts[0].device)
        with self.target.tapped(self._drafts.taps) as features:
            ragged_logits(self.target, torch.cat(prompts), widths, self._cache, rows=rows, active=slots)
            if self._drafts.taps:
                for slot, own in zip(slots, features.take()[0].split(widths), strict=True):
                    self._drafts.read(slot, own)

    def _end(self, handle: Handle, outcome: Outcome) -> None:
        """Free what a request holds; the last slot's request moves into its place."""
        if handle.ended:
            return
        if handle.outcome is Outcome.WAITING:
            self._waiting.remove(handle)
        else:
            slot = next(i for i, running in enumerate(self._running) if running.handle is handle)
            self._drafts.leave(slot)
            last = self._running.pop()
            if self._cache.leave(slot) is not None:
                self._running[slot] = last
        handle.outcome = outcome

    def _budget(self, handle: Handle) -> int:
        return min(handle.request.max_new_tokens, self.target.context_limit - handle.prompt.shape[0])

    def room(self, handle: Handle) -> int:
        """Positions a request may come to need: prompt, answer, and the block that is verified at its end."""
        return handle.prompt.shape[0] + self._budget(handle) + self._block

    @staticmethod
    def _needed(rooms: list[int]) -> int:
        return len(rooms) * max(rooms, default=0)


def takes_likeliest(settings: SamplingSettings) -> bool:
    """Whether a request takes the likeliest token of every row as it is."""
    return settings.greedy and settings.repetition_penalty == 1.0
