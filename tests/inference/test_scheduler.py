"""The prefix scheduler: what it admits, and that its output law is the target's where a search over all lengths is not.

The counterexample: two words, target (0.7, 0.3), draft (0.5, 0.5); passes a second 1, 0.5, 0.45 for 1, 2, 3 tokens;
a_1 = 0.8, and c_2 = 0.9 if the first token was A, else 0.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch

from inference.costs import RoundCosts
from inference.decoder import decode
from inference.drafters import Proposal
from inference.lookahead import Lookahead, Measured, Signals, Visible
from inference.lookahead._worth import best_length
from inference.lookahead.fixed import FixedLookahead
from inference.lookahead.scheduled import DelayedLookahead, ScheduledLookahead
from inference.randomness import Source
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scheduler import schedule
from inference.verification import verify_sampled
from tests.inference.law import Law, Path, TokenCache, distance

A, B = 0, 1
TARGET = torch.tensor([0.7, 0.3], dtype=torch.float64)
DRAFT = torch.tensor([0.5, 0.5], dtype=torch.float64)
SECONDS = {1: 1.0, 2: 1 / 0.5, 3: 1 / 0.45}
MEASURED = Measured(RoundCosts(SECONDS), (0.8, 0.45))
SETTINGS = SamplingSettings(temperature=1.0)


class _Prefix:
    """A request whose chances are given."""

    def __init__(self, *conditional: float) -> None:
        self.conditional, self.at, self.stood = conditional, 0, 1.0

    def survival(self) -> float | None:
        return self.stood * self.conditional[self.at] if self.at < len(self.conditional) else None

    def admit(self) -> None:
        self.stood *= self.conditional[self.at]
        self.at += 1


def test_the_likeliest_positions_of_all_requests_are_admitted_first() -> None:
    # A token more costs a tenth; 0.9, 0.81, 0.5, 0.45 go in, and then 2 + 2.66 over 2.4 against 0.2025 more over 0.1.
    prefixes = [_Prefix(0.9, 0.9, 0.25), _Prefix(0.5, 0.9, 0.01)]
    assert schedule(prefixes, lambda width: 1.8 + 0.1 * width) == [3, 2]
    assert schedule([_Prefix(0.9, 0.9, 0.25), _Prefix(0.5, 0.9, 0.01)], lambda width: 0.3 * width) == [0, 0]


def test_what_lies_behind_the_first_position_that_does_not_pay_is_not_looked_at() -> None:
    assert schedule([_Prefix(0.05, 1.0, 1.0), _Prefix(0.8)], lambda width: 1.8 + 0.2 * width) == [0, 1]


@pytest.mark.parametrize("count", range(4))
def test_requests_that_propose_nothing_are_fine(count: int) -> None:
    assert schedule([_Prefix() for _ in range(count)], float) == [0] * count


def test_one_request_alone_gets_what_the_policy_gives_it() -> None:
    costs = RoundCosts({1: 1.0, 2: 1.3, 3: 1.35, 4: 1.6})
    for chances in itertools.product((0.05, 0.3, 0.9), repeat=3):
        policy, kept = ScheduledLookahead(3, Measured(costs, ()), patience_rounds=0), 0
        while kept < 3 and policy.keeps(Visible(kept + 1, tuple(Signals(confidence=c) for c in chances[: kept + 1]))):
            kept += 1
        assert schedule([_Prefix(*chances)], lambda width: costs.seconds(width - 1)) == [kept]


# The counterexample, through the decoder


class _TwoWords:
    """A target of one row."""

    takes_siblings = False
    context_limit = 64

    def new_cache(self) -> TokenCache:
        return TokenCache()

    def logits(self, tokens: torch.Tensor, cache: TokenCache, *, num_rows: int, slots: object = ()) -> torch.Tensor:
        cache.tokens += tokens.tolist()
        return TARGET.log().expand(num_rows, -1)

    def tapped(self, taps: object) -> object:
        return nullcontext()


def _confidence(tokens: list[int]) -> float:
    return 0.8 if not tokens else 0.9 * (tokens[0] == A)


class _Drafter:
    """Asks before it samples, position by position."""

    kind = "two words"

    def begin(self, prompt: torch.Tensor) -> None: ...

    def rollback(self, num_accepted: int) -> None: ...

    def nbytes(self) -> int:
        return 0

    def propose(
        self, context: torch.Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        tokens: list[int] = []
        signals: list[Signals] = []
        while len(tokens) < min(2, limit):
            signals.append(Signals(confidence=_confidence(tokens)))
            if not lookahead.keeps(Visible(len(tokens) + 1, tuple(signals))):
                break
            tokens.append(int(generator.categorical(DRAFT)))
        return _proposal(tokens)


class _Retrospective(_Drafter):
    """The mutant: samples the whole block, then takes the best of all lengths by this round's own confidences."""

    def propose(
        self, context: torch.Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        tokens = [int(generator.categorical(DRAFT)) for _ in range(min(2, limit))]
        chances = [_confidence(tokens[:k]) for k in range(len(tokens))]
        return _proposal(tokens[: best_length(chances, MEASURED.costs, ())])


def _proposal(tokens: list[int]) -> Proposal:
    return Proposal(torch.tensor(tokens, dtype=torch.long), DRAFT.expand(len(tokens), -1) if tokens else None)


def _paths(run: Callable[[Path], tuple[int, ...]]) -> Law:
    law: Law = {}
    waiting: list[tuple[int, ...]] = [()]
    while waiting:
        path = Path(waiting.pop())
        output = run(path)
        law[output] = law.get(output, 0.0) + path.probability
        waiting += path.others
    return law


def _law(drafter: _Drafter, policy: Callable[[], Lookahead], *, length: int = 4) -> Law:
    request = Request(settings=SETTINGS, max_new_tokens=length)

    def run(path: Path) -> tuple[int, ...]:
        result = decode(
            _TwoWords(),  # type: ignore[arg-type]
            drafter,
            torch.tensor([A, B]),
            request=request,
            lookahead=policy(),
            generator=path,
        )
        return tuple(result.tokens)

    return _paths(run)


def _independent(length: int) -> Law:
    words = itertools.product((A, B), repeat=length)
    return {output: float(torch.stack([TARGET[word] for word in output]).prod()) for output in words}


def _chance_of_a(law: Law) -> float:
    return sum(chance for output, chance in law.items() if output[0] == A)


CORRECT: dict[str, Callable[[], Lookahead]] = {
    "early stop": lambda: ScheduledLookahead(2, MEASURED, patience_rounds=0),
    # Cheap enough that the second position is sometimes admitted.
    "early stop, cheap": lambda: ScheduledLookahead(
        2, Measured(RoundCosts({1: 1.0, 2: 1.1, 3: 1.6}), ()), patience_rounds=1
    ),
    "asynchronous": lambda: DelayedLookahead(2, Measured(RoundCosts({1: 1.0, 2: 1.1, 3: 1.6}), (0.8,)), delay_rounds=2),
}


@pytest.mark.parametrize("name", CORRECT)
def test_the_scheduler_leaves_the_counterexample_its_law(name: str) -> None:
    law = _law(_Drafter(), CORRECT[name])
    assert _chance_of_a(law) == pytest.approx(0.70, abs=1e-12)
    assert distance(law, _independent(4)) < 1e-12


def test_the_retrospective_search_does_not() -> None:
    law = _law(_Retrospective(), lambda: FixedLookahead(2))
    assert _chance_of_a(law) == pytest.approx(0.85, abs=1e-12)


# Two requests, coupled by the scheduler


class _Block:
    """One request's block in a shared round: tokens are drawn when they are admitted, so nothing can be looked at."""

    def __init__(self, path: Path, quality: float) -> None:
        self.path, self.quality = path, quality
        self.tokens: list[int] = []
        self.stood = 1.0

    def _chance(self) -> float:
        return self.quality * _confidence(self.tokens)

    def survival(self) -> float | None:
        return self.stood * self._chance() if len(self.tokens) < 2 else None

    def admit(self) -> None:
        self.stood *= self._chance()
        self.tokens.append(int(self.path.categorical(DRAFT)))


def _round(path: Path, blocks: list[list[int]]) -> Iterator[tuple[int, ...]]:
    for tokens in blocks:
        proposal = _proposal(tokens)
        verdict = verify_sampled(proposal.tokens, proposal.probs, TARGET.expand(len(tokens) + 1, -1), generator=path)
        yield (*tokens[: verdict.num_accepted], int(verdict.next_token))


def _joint_law(choose: Callable[[Path], list[list[int]]]) -> Law:
    """Law of the first tokens of both requests after one shared round."""
    return _paths(lambda path: tuple(emitted[0] for emitted in _round(path, choose(path))))


# After 2.8 / 1.3 = 2.154 a third token pays if the first was A (3.52 / 1.6), and then a fourth, of the other request
# (4.12 / 1.8); if the first was B, 3.4 / 1.6 does not.
STEADY = {2: 1.0, 3: 1.3, 4: 1.6, 5: 1.8, 6: 1.9}
# A third token alone does not pay (2.8 / 1.45 after 2), two together do: 3.52 / 1.5.
STEEP = {2: 1.0, 3: 1.45, 4: 1.5, 5: 1.9, 6: 1.95}


def _scheduled(path: Path, seconds: dict[int, float] = STEADY) -> list[list[int]]:
    blocks = [_Block(path, 1.0), _Block(path, 0.75)]
    schedule(blocks, lambda width: seconds[width])
    return [block.tokens for block in blocks]


def _searched(path: Path) -> list[list[int]]:
    """The mutant: both blocks are drawn whole; of all pairs of lengths the best is taken."""
    drawn = [[int(path.categorical(DRAFT)) for _ in range(2)] for _ in range(2)]

    def expected(lengths: tuple[int, int]) -> float:
        tokens = 2.0
        for block, quality, length in zip(drawn, (1.0, 0.1), lengths, strict=True):
            survival = 1.0
            for k in range(length):
                survival *= quality * _confidence(block[:k])
                tokens += survival
        return tokens / STEEP[2 + sum(lengths)]

    best = max(itertools.product(range(3), repeat=2), key=expected)
    return [block[:length] for block, length in zip(drawn, best, strict=True)]


def test_two_requests_that_share_a_pass_keep_the_targets_law_jointly() -> None:
    law = _joint_law(_scheduled)
    assert distance(law, _independent(2)) < 1e-12
    # The coupling is real: what the second request is given depends on what the first one drew.
    assert [len(tokens) for tokens in _scheduled(Path((A, A, A, A)))] == [2, 2]
    assert [len(tokens) for tokens in _scheduled(Path((B, A, A, A)))] == [1, 0]


def test_a_search_over_both_blocks_does_not() -> None:
    assert distance(_joint_law(_searched), _independent(2)) > 1e-3
