"""Speculative decoding of one request: draft, verify in one target pass, accept, roll back. Target-only is the case
of a drafter that proposes nothing, so the baseline runs the same loop.

The last prompt token is the first anchor: the prompt's other tokens are prefilled, and every emitted token then comes
from a round. So tau is emitted tokens over rounds, and exactly 1 for target-only decoding.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from inference.drafters import Drafter, Proposal, ReadsFeatures
from inference.errors import InputError
from inference.lookahead import Lookahead
from inference.model import CausalModel
from inference.randomness import Source
from inference.request import Decoded, Request
from inference.sampling import process_logits
from inference.sampling_settings import SamplingSettings
from inference.verification import Verdict, verify_greedy, verify_sampled


class Clock:
    """Adds wall-clock seconds to parts; on an accelerator it waits for the device, so that parts mean something."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds = seconds
        self._wait = torch.cuda.synchronize if device.type == "cuda" else None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    def now(self) -> float:
        if self._wait is not None:
            self._wait()
        return time.perf_counter()


@torch.inference_mode()
def decode(
    target: CausalModel,
    drafter: Drafter,
    prompt: torch.Tensor,
    *,
    request: Request,
    lookahead: Lookahead,
    generator: Source,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> Decoded:
    """Decode one request losslessly.

    Args:
        target: the model whose law the output follows.
        drafter: proposes tokens.
        prompt: int64 `[T]`, at least one token.
        request: sampling, length and stop rules.
        lookahead: how many tokens are proposed.
        generator: source of every random decision, draft's and target's.
        on_tokens: called with newly emitted tokens after every round, for streaming.

    Raises:
        InputError: the prompt is empty or leaves no room in the context.
    """
    room = target.context_limit - prompt.shape[0]
    check_prompt_length(prompt.shape[0], target.context_limit)
    budget = min(request.max_new_tokens, room)
    result = Decoded()
    clock = Clock(result.seconds, prompt.device)
    start = clock.now()
    context = VerifiedTokens(prompt, capacity=prompt.shape[0] + budget)
    cache = target.new_cache()
    policy = lookahead.begin()
    reader = drafter if isinstance(drafter, ReadsFeatures) else None
    with target.tapped(reader.taps if reader else ()) as features:
        with clock.part("prefill"):
            drafter.begin(prompt)
            if prompt.shape[0] > 1:
                target.logits(prompt[:-1], cache, num_rows=1)
                if reader:
                    reader.read(features.take()[0])

        finished = False
        while not finished:
            with clock.part("draft"):
                # The target adds a token of its own to every round, so the last one needs no proposal.
                limit = min(policy.max_tokens, budget - len(result.tokens) - 1)
                proposal = drafter.propose(
                    context.tokens, limit=limit, lookahead=policy, settings=request.settings, generator=generator
                )
            with clock.part("verify"):
                block = [context.tokens[-1:], proposal.tokens]
                if proposal.siblings is not None:
                    block.append(proposal.siblings)
                width = 1 + len(proposal) + len(proposal.slots)
                logits = target.logits(torch.cat(block), cache, num_rows=width, slots=proposal.slots)
            with clock.part("accept"):
                verdict = judge(proposal, logits, context.tokens, settings=request.settings, generator=generator)
                emitted = [*proposal.tokens[: verdict.num_accepted].tolist(), int(verdict.next_token)]
                if verdict.sibling is not None:
                    row = logits[1 + len(proposal) + verdict.sibling]
                    emitted.append(after_sibling(row, context.tokens, emitted, request.settings, generator))
                result.count(proposal, verdict)
                emitted, finished = up_to_stop(emitted, request.stop_tokens)
                result.tokens += emitted
                context.append(emitted)
                finished = finished or len(result.tokens) >= budget
            with clock.part("cache"):
                result.cache_nbytes = cache.nbytes()
                anchor, kept = cache.length - width, kept_rows(proposal, verdict)
                if verdict.sibling is not None:
                    cache.move(anchor + kept[-1], anchor + len(kept) - 1)
                cache.rollback(anchor + len(kept))
                drafter.rollback(verdict.num_accepted)
                if reader:
                    taken = features.take()[0]
                    reader.read(taken[: len(kept)] if verdict.sibling is None else taken[kept])
                policy.observe(len(proposal), verdict.num_accepted)
            if on_tokens is not None:
                on_tokens(emitted)
    result.seconds["other"] = max(0.0, clock.now() - start - result.total_seconds)
    return result


def judge(
    proposal: Proposal,
    target_logits: torch.Tensor,
    context: torch.Tensor,
    *,
    settings: SamplingSettings,
    generator: Source,
    choices: torch.Tensor | None = None,
) -> Verdict:
    """Process the target's rows as the draft's were processed, and verify.

    Args:
        proposal: l proposed tokens in a chain, w siblings.
        target_logits: `[l + 1 + w, V]`, raw; those of siblings are not looked at.
        context: int64 `[T]`, tokens up to the anchor.
        settings: sampling settings of the request.
        generator: source of random decisions.
        choices: int64 `[l + 1 + w]`, the likeliest tokens of the raw rows, where they are known already; for greedy
            requests that need no processing.
    """
    length = 1 + len(proposal)
    beside, slots = proposal.siblings, proposal.slots
    if choices is not None:
        return verify_greedy(proposal.tokens, choices[:length], siblings=beside, slots=slots)
    processed = process_logits(target_logits[:length], context=context, block=proposal.tokens, settings=settings)
    if settings.greedy:
        return verify_greedy(proposal.tokens, processed.argmax(dim=-1), siblings=beside, slots=slots)
    probs = torch.softmax(processed, dim=-1)
    return verify_sampled(proposal.tokens, proposal.probs, probs, generator=generator, siblings=beside, slots=slots)


def after_sibling(
    row: torch.Tensor, context: torch.Tensor, emitted: list[int], settings: SamplingSettings, generator: Source
) -> int:
    """The token the target adds after a sibling that stands, the last of `emitted`, from the sibling's own raw row."""
    history = torch.cat([context, context.new_tensor(emitted)])
    processed = process_logits(row[None], context=history, block=context[:0], settings=settings)[0]
    return int(processed.argmax() if settings.greedy else generator.categorical(torch.softmax(processed, dim=-1)))


def kept_rows(proposal: Proposal, verdict: Verdict) -> list[int]:
    """Rows of the pass whose tokens stand: the anchor's and the proposed ones'; the next anchor was not fed yet."""
    kept = list(range(1 + verdict.num_accepted))
    return kept if verdict.sibling is None else [*kept, 1 + len(proposal) + verdict.sibling]


def check_prompt_length(num_tokens: int, context_limit: int) -> None:
    """Refuse a prompt that cannot be answered.

    Raises:
        InputError: no token, or no room for an answer.
    """
    if num_tokens < 1:
        raise InputError("the prompt has no tokens", where="prompt", mend="give some text")
    if num_tokens >= context_limit:
        raise InputError(
            f"the prompt has {num_tokens} tokens, the context holds {context_limit}", where="prompt", mend="shorten it"
        )


class VerifiedTokens:
    """Verified tokens in one preallocated buffer, so that no round copies the context."""

    def __init__(self, prompt: torch.Tensor, *, capacity: int) -> None:
        self._buffer = prompt.new_empty(capacity)
        self._buffer[: prompt.shape[0]] = prompt
        self._length = prompt.shape[0]

    @property
    def tokens(self) -> torch.Tensor:
        """View of all verified tokens, int64 `[T]`."""
        return self._buffer[: self._length]

    def append(self, tokens: list[int]) -> None:
        end = self._length + len(tokens)
        self._buffer[self._length : end] = self._buffer.new_tensor(tokens)
        self._length = end


def up_to_stop(tokens: list[int], stops: frozenset[int]) -> tuple[list[int], bool]:
    """Cut after the first stop token, if there is one."""
    for index, token in enumerate(tokens):
        if token in stops:
            return tokens[: index + 1], True
    return tokens, False
