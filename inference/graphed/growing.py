"""Captured rounds for the requests of a published pair, one after another and of any length: what `Pair.generate` goes
by on a GPU. Says which pairs and requests can go by them; the others are the ordinary decoder's.

Buffers have room for a power of two of tokens, prompt and answer together, so that few lengths are captured. When a
longer request comes they are made anew. Without a GPU the same rounds run uncaptured.
"""

import gc
import logging
from collections.abc import Callable

import torch

from inference.decoder import check_prompt_length
from inference.drafters import Drafter
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.graphed.arms import can_be_captured, captured_decoder, longest_block
from inference.graphed.asked import CAPTURED_AUTO, CAPTURED_COMPILED, CAPTURED_OFF, CAPTURED_ON, PAIR_CAPTURED
from inference.graphed.decode import GraphedDecoder, Timed, follows
from inference.graphed.target import static_layers
from inference.lookahead import Lookahead
from inference.lookahead.fixed import FixedLookahead, tree_of, tree_when_sampled
from inference.model import CausalModel
from inference.parallel import ParallelModel
from inference.request import Decoded, Request
from inference.trees import Tree

logger = logging.getLogger(__name__)


def growing_decoder(
    target: CausalModel, drafter: Drafter, lookahead: Lookahead, *, asked: str
) -> "GrowingDecoder | None":
    """The captured rounds of a pair; None where it goes kernel by kernel. Makes no buffers and captures nothing yet.

    Args:
        target: verifies.
        drafter: proposes.
        lookahead: how many tokens, and the tree of rounds that propose one.
        asked: see `inference.graphed.asked`.

    Raises:
        InputError: `on` or `compiled`, and the pair cannot be captured.
        ValueError: another word.
    """
    if asked not in PAIR_CAPTURED:
        raise ValueError(f"captured is {asked!r}; choose one of {', '.join(PAIR_CAPTURED)}")
    if asked == CAPTURED_OFF or (asked == CAPTURED_AUTO and not _on_gpu(target)):
        return None
    strict = asked in (CAPTURED_ON, CAPTURED_COMPILED)
    if reason := obstacle(target, drafter, lookahead):
        if strict:
            raise _refusal(reason)
        logger.info("no captured rounds: %s", reason)
        return None
    # A block of nothing is target-only decoding, whoever would draft.
    drafter, tree = (drafter, tree_of(lookahead)) if lookahead.longest else (NoDrafter(), None)
    block = min(lookahead.longest, longest_block(drafter))
    return GrowingDecoder(
        target,
        drafter,
        block=block,
        strict=strict,
        tree=tree,
        tree_when_sampled=tree_when_sampled(lookahead),
        compiled=asked == CAPTURED_COMPILED,
    )


def obstacle(target: CausalModel, drafter: Drafter, lookahead: Lookahead) -> str:
    """Why a pair cannot be captured, whatever the request; empty where nothing is in the way."""
    if isinstance(target, ParallelModel):
        return "the target is spread over several processes"
    if not isinstance(lookahead, FixedLookahead) or any(lookahead.siblings):
        return "captured rounds propose a fixed number of tokens, without siblings"
    if lookahead.longest and not can_be_captured(drafter):
        return "rounds of this draft cannot be captured"
    try:
        static_layers(target)
    except InputError as error:
        return error.what
    return ""


class GrowingDecoder:
    """Decodes one request after another, never two at once: the buffers are the request's that is answered.

    Args:
        target: see `captured_decoder`.
        drafter: likewise.
        block: likewise.
        strict: refuse a request that captured rounds do not follow, instead of leaving it to others.
        tree: likewise.
        tree_when_sampled: likewise.
        compiled: likewise. Parts of rounds are not told apart then, as each would take a minute to compile too.
    """

    def __init__(
        self,
        target: CausalModel,
        drafter: Drafter,
        *,
        block: int,
        strict: bool,
        tree: Tree | None = None,
        tree_when_sampled: bool = False,
        compiled: bool = False,
    ) -> None:
        self._target, self._drafter, self._strict, self._compiled = target, drafter, strict, compiled
        self._block, self._tree, self._tree_when_sampled = block, tree, tree_when_sampled
        self._decoder: GraphedDecoder | None = None
        self._timed: Timed = {}
        # Fewest tokens that no buffers could be made for, and why.
        self._refused: tuple[int, str] | None = None

    @property
    def room(self) -> int:
        """Tokens of the longest request that the buffers hold; 0 before there are any."""
        return 0 if self._decoder is None else self._decoder.rounds.capacity - self._decoder.rounds.width

    def decode(
        self,
        prompt: torch.Tensor,
        *,
        request: Request,
        seed: int,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> Decoded | None:
        """Answer a request as `GraphedDecoder.decode` does; None leaves it to the ordinary decoder.

        A round is timed by part before the first greedy and the first sampled request, unless it is compiled.

        Args:
            prompt: int64 `[T]`, at least one token.
            request: sampling, length and stop rules.
            seed: fixes every random decision.
            on_tokens: called with newly emitted tokens after every round.

        Raises:
            InputError: the prompt is empty or leaves no room; or `strict`, and captured rounds do not follow.
        """
        check_prompt_length(prompt.shape[0], self._target.context_limit)
        try:
            decoder = self._decoder_for(prompt.shape[0] + request.max_new_tokens, request)
        except InputError as error:
            if self._strict:
                raise _refusal(error.what) from None
            return None
        sampled = not request.settings.greedy
        if not self._compiled:
            decoder.timed(decoder.proposed(sampled=sampled), sampled=sampled)
        return decoder.decode(prompt, request=request, seed=seed, on_tokens=on_tokens)

    def _decoder_for(self, tokens: int, request: Request) -> GraphedDecoder:
        """The decoder, with room for so many tokens.

        Raises:
            InputError: captured rounds do not follow such a request.
        """
        if not follows(request.settings):
            raise InputError("captured rounds know temperatures alone")
        tokens = min(tokens, self._target.context_limit)
        if self._decoder is None or self.room < tokens:
            self._decoder = self._made(1 << (tokens - 1).bit_length())
        return self._decoder

    def _made(self, tokens: int) -> GraphedDecoder:
        """A decoder of requests of so many tokens; what the last one held is free before.

        Raises:
            InputError: the target cannot be captured at this length, or the device has no room.
        """
        if self._refused is not None and tokens >= self._refused[0]:
            raise InputError(self._refused[1])
        if self._decoder is not None:
            self._decoder = None
            gc.collect()  # rounds and what is captured of them hold each other
        try:
            return captured_decoder(
                self._target,
                self._drafter,
                block=self._block,
                tokens=tokens,
                tree=self._tree,
                tree_when_sampled=self._tree_when_sampled,
                timed=self._timed,
                compiled=self._compiled,
            )
        except torch.OutOfMemoryError:
            reason = f"the device has no room for captured rounds of {tokens} tokens"
        except InputError as error:
            reason = error.what
        self._refused = (tokens, reason)
        raise InputError(reason)


def _on_gpu(target: CausalModel) -> bool:
    return target.device.type == "cuda"


def _refusal(reason: str) -> InputError:
    return InputError(reason, where="captured", mend="use auto or off")
