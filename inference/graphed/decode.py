"""Answers requests by replaying captured rounds: the host looks once a round, at what was emitted, and by then has sent
the next one on its way."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch

from inference.decoder import Clock, check_prompt_length, up_to_stop
from inference.drafters._token import plain
from inference.graphed.proposals import SIGNALS
from inference.graphed.rounds import Rounds
from inference.graphed.timing import RoundSeconds, round_seconds
from inference.lookahead import RecordingLookahead, Signals, Visible
from inference.precision import model_nbytes
from inference.request import Decoded, Request
from inference.sampling_settings import SamplingSettings
from inference.trees import Tree

Timed = dict[tuple[int | Tree, bool], RoundSeconds]
"""Rounds by what they propose, so many tokens in a chain or a tree, and whether sampled."""

# As in the device profile.
_TIMED_CONTEXT_TOKENS = 128
# Rounds on their way behind the one that is looked at, so that the device does not wait while the host looks and
# launches. One behind the last of a request is for nothing.
_AHEAD = 1


def follows(settings: SamplingSettings) -> bool:
    """Whether captured rounds draw as these settings say: they know temperatures alone."""
    return plain(settings)


class GraphedDecoder:
    """Decodes one request after another; the law and, greedy, the tokens are those of `inference.decoder.decode` with a
    fixed block, whether rounds propose a chain or a tree.

    Parts of a round are not told apart while it runs. Where its parts were timed (see `timed`), drafting and verifying
    get their seconds of every round and `other` the rest: acceptance, reading, the host. Otherwise all is `verify`'s.

    Args:
        rounds: of one request.
        timed: rounds of this target and draft that were timed; shared with the decoder's other proposals.
        ahead: rounds on their way behind the one that is looked at; None for what suits the device.
    """

    def __init__(self, rounds: Rounds, *, timed: Timed | None = None, ahead: int | None = None) -> None:
        if rounds.batch != 1:
            raise ValueError(f"rounds of {rounds.batch} requests decode no single one")
        self.rounds = rounds
        self._timed = {} if timed is None else timed
        self._other: GraphedDecoder | None = None
        on_gpu = rounds.anchors.device.type == "cuda"
        ahead = (_AHEAD if on_gpu else 0) if ahead is None else ahead
        self._looks = [_Look(rounds, on_gpu=on_gpu) for _ in range(1 + ahead)]

    @property
    def tree(self) -> Tree | None:
        """What rounds propose in place of a chain, greedy ones and, where noise is asked for, sampled ones."""
        return None if self.rounds.plan is None else self.rounds.plan.tree

    # Other proposals

    def of_block(self, block: int, tree: Tree | None = None, *, tree_when_sampled: bool = False) -> "GraphedDecoder":
        """The decoder of the same target and draft that proposes `block` tokens, and in greedy rounds, or in all, a
        tree where one is given; the last one made is kept."""
        asked = (block, tree, tree_when_sampled and tree is not None)
        if asked == self._proposals:
            return self
        if self._other is None or asked != self._other._proposals:
            self._other = None
            rounds = self._rounds_of(block, tree, tree_when_sampled=tree_when_sampled)
            self._other = GraphedDecoder(rounds, timed=self._timed)
        return self._other

    def timed(self, proposed: int | Tree, *, sampled: bool) -> RoundSeconds:
        """What a round takes that proposes so many tokens in a chain, 0 for target-only decoding, or a tree; timed when
        first asked for.

        Rounds of other proposals than the decoder's own are dropped again.
        """
        if (proposed, sampled) not in self._timed:
            own = self.proposed(sampled=sampled) == proposed
            block, tree = (0, proposed) if isinstance(proposed, Tree) else (proposed, None)
            rounds = self.rounds if own else self._rounds_of(block, tree, tree_when_sampled=sampled)
            length = min(_TIMED_CONTEXT_TOKENS, rounds.capacity // 2)
            self._timed[proposed, sampled] = round_seconds(rounds, length=length, sampled=sampled)
        return self._timed[proposed, sampled]

    def proposed(self, *, sampled: bool) -> int | Tree:
        """What the decoder's own rounds propose, as `timed` names it."""
        return self._tree(sampled=sampled) or self.rounds.block

    def _tree(self, *, sampled: bool) -> Tree | None:
        """Likewise; None for the chain."""
        return self.tree if self.rounds.proposes_tree(sampled=sampled) else None

    @property
    def _proposals(self) -> tuple[int, Tree | None, bool]:
        """The chain's length, the tree, and whether sampled rounds propose it."""
        return self.rounds.block, self.tree, self.rounds.tree_when_sampled

    def _rounds_of(self, block: int, tree: Tree | None, *, tree_when_sampled: bool) -> Rounds:
        own = self.rounds
        return Rounds(
            own.target.target,
            own.network if block or tree else None,
            block=block,
            capacity=own.capacity,
            tree=tree,
            tree_when_sampled=tree_when_sampled,
        )

    # Decoding

    def prepare(self, *, longest_prompt: int, sampled: Iterable[bool]) -> None:
        """Capture and time all that a request may come to, so that nothing is captured while one is timed.

        Args:
            longest_prompt: in tokens.
            sampled: whether requests have temperatures; either or both.
        """
        rounds = self.rounds
        for each in sampled:
            self.timed(self.proposed(sampled=each), sampled=each)
            rounds.prepare(sampled=each)
        rounds.prepare_prompts(min(longest_prompt, rounds.capacity - rounds.width), together=1)

    def draft_nbytes(self) -> int:
        """Bytes of the draft, weights and what it has read."""
        network, context = self.rounds.network, self.rounds.context
        return 0 if network is None or context is None else model_nbytes(network) + context.nbytes()

    @torch.inference_mode()
    def decode(
        self,
        prompt: torch.Tensor,
        *,
        request: Request,
        seed: int,
        on_tokens: Callable[[list[int]], None] | None = None,
        recording: RecordingLookahead | None = None,
    ) -> Decoded:
        """Decode one request losslessly.

        Args:
            prompt: int64 `[T]`, at least one token.
            request: temperature alone of its sampling settings, length and stop rules.
            seed: fixes every random decision.
            on_tokens: called with newly emitted tokens after every round.
            recording: told of every round what the ordinary decoder would tell it; rounds then are programs of their
                own, which `prepare` does not capture.

        Raises:
            InputError: the prompt is empty or leaves no room.
            ValueError: settings that these rounds do not follow.
        """
        rounds, settings = self.rounds, request.settings
        if not follows(settings):
            raise ValueError("captured rounds know temperatures alone")
        limit = min(rounds.target.target.context_limit, rounds.capacity - rounds.width)
        check_prompt_length(prompt.shape[0], limit)
        budget = min(request.max_new_tokens, limit - prompt.shape[0])
        result = Decoded()
        clock = Clock(result.seconds, prompt.device)
        tree = None if recording is not None else self._tree(sampled=not settings.greedy)
        with clock.part("prefill"):
            rounds.begin(0, prompt)
        if not settings.greedy:
            rounds.temperatures.fill_(settings.temperature)
        finished = False
        start = clock.now()
        looks = self._looked_at(
            prompt, result, settings, tree, budget=budget, seed=seed, recorded=recording is not None
        )
        while not finished:
            look = next(looks)
            numbers = look.emitted()
            count = numbers[-1]
            if tree is None:
                result.count_chain(rounds.block, count - 1)
            else:
                result.count_tree(tree.size, tree.depth, count - 1)
            if recording is not None:
                room = budget - len(result.tokens) - 1
                _record(recording, look.signals(), num_accepted=count - 1, room=room)
            emitted, finished = up_to_stop(numbers[: min(count, budget - len(result.tokens))], request.stop_tokens)
            result.tokens += emitted
            finished = finished or len(result.tokens) >= budget
            if on_tokens is not None:
                on_tokens(emitted)
        self._split(result, clock.now() - start, sampled=not settings.greedy)
        result.cache_nbytes = rounds.target.nbytes()
        return result

    def _looked_at(
        self,
        prompt: torch.Tensor,
        result: Decoded,
        settings: SamplingSettings,
        tree: Tree | None,
        *,
        budget: int,
        seed: int,
        recorded: bool,
    ) -> Iterator["_Look"]:
        """What the host is shown of the rounds of a request, one after another and without an end; the rounds that
        follow are on their way by then.

        Args:
            prompt: int64 `[T]`, which has been read.
            result: to which the tokens of every round have been added before the next one is asked for.
            settings: of the request.
            tree: what its rounds propose; None for the chain.
            budget: most tokens of the answer.
            seed: fixes every random decision.
            recorded: whether rounds note signals; those wait for each other.
        """
        rounds, sampled = self.rounds, not settings.greedy
        # Noise is drawn where it is used, the few uniform numbers of a chain here.
        generator = torch.Generator("cpu" if tree is None else prompt.device).manual_seed(seed)
        most = 1 + (rounds.block if tree is None else tree.depth)
        waiting: deque[_Look] = deque()
        while True:
            while len(waiting) < len(self._looks):
                reached = prompt.shape[0] - 1 + len(result.tokens) + most * len(waiting)
                if waiting and (recorded or not self._goes_on(result, budget, len(waiting), reached)):
                    break
                if sampled and tree is not None and rounds.noise is not None:
                    rounds.noise.exponential_(generator=generator)
                elif sampled:
                    uniforms = torch.rand(rounds.uniforms.shape, dtype=torch.float64, generator=generator)
                    rounds.uniforms.copy_(uniforms, non_blocking=True)
                rounds.round(shown=rounds.shown(reached, sampled=sampled), sampled=sampled, recorded=recorded)
                look = next(look for look in self._looks if look not in waiting)
                look.send(rounds, recorded=recorded)
                waiting.append(look)
            yield waiting.popleft()

    def _goes_on(self, result: Decoded, budget: int, waiting: int, reached: int) -> bool:
        """Whether a round behind those that are on their way has room, and is probably wanted: a stop token is not
        foreseen, the end of the budget is."""
        rounds, mean = self.rounds, len(result.tokens) / max(1, result.passes)
        has_room = reached + rounds.width < rounds.capacity
        return has_room and len(result.tokens) + waiting * max(1.0, mean) < budget

    def _split(self, result: Decoded, seconds: float, *, sampled: bool) -> None:
        """Book the seconds of all rounds of a request under their parts."""
        known = self._timed.get((self.proposed(sampled=sampled), sampled), RoundSeconds(seconds, 0.0, seconds))
        draft = min(seconds, result.passes * known.draft)
        verify = min(seconds - draft, result.passes * known.verify)
        result.seconds |= {"draft": draft, "verify": verify, "other": seconds - draft - verify}


class _Look:
    """What the host is shown of one round."""

    def __init__(self, rounds: Rounds, *, on_gpu: bool) -> None:
        self._emitted = torch.zeros(rounds.emitted.shape[1], dtype=torch.long, pin_memory=on_gpu)
        self._noted = torch.zeros(rounds.signals.shape[1:], dtype=rounds.signals.dtype, pin_memory=on_gpu)
        self._done = torch.cuda.Event() if on_gpu else None

    def send(self, rounds: Rounds, *, recorded: bool) -> None:
        """Show what the last round left."""
        self._emitted.copy_(rounds.emitted[0], non_blocking=True)
        if recorded:
            self._noted.copy_(rounds.signals[0], non_blocking=True)
        if self._done is not None:
            self._done.record()

    def emitted(self) -> list[int]:
        """As `Rounds.emitted`; waits until it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._emitted.tolist()

    def signals(self) -> list[list[float]]:
        """As `Rounds.signals`; after `emitted`."""
        return self._noted.tolist()


def _record(recording: RecordingLookahead, noted: list[list[float]], *, num_accepted: int, room: int) -> None:
    """Tell of a round, cut to the tokens that the request has room for besides the target's own: the ordinary decoder
    proposes no more."""
    signals = tuple(Signals(**dict(zip(SIGNALS, row, strict=True))) for row in noted)
    num_proposed = min(len(signals), room)
    recording.keeps(Visible(len(signals), signals))
    recording.observe(num_proposed, min(num_accepted, num_proposed))
