"""What a draft costs, led along a response as decoding would lead it, and what follows for its block and its rank."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inference import decoder
from inference.costs import RoundCosts
from inference.drafters import Drafter, Proposal, ReadsFeatures
from inference.drafters.model import ModelDrafter
from inference.prescore import costs as costs_module
from inference.prescore.costs import drafting_costs
from inference.prescore.ranking import Prescore, expected_speedup, prescore
from inference.prescore.rehearsal import Expected, FixedResponse
from inference.sampling_settings import SamplingSettings
from tests.inference.law import tiny_model
from tests.inference.test_prescore import BLOCK, KINDS, PROMPT, SEED, VOCAB, decoded, drafter_of, respond, target_model

CPU = torch.device("cpu")
FLAT = {1: 1.0, 8: 1.0}


class Watched:
    """Any drafter, with what it was asked and what it said; a block takes a time of its own on a made-up clock.

    Attributes:
        said: length of each context, and the tokens proposed after it.
    """

    kind = "watched"

    def __init__(self, inner: Drafter, clock: list[float] | None = None) -> None:
        self.inner, self.clock = inner, clock
        self.said: list[tuple[int, list[int]]] = []

    def begin(self, prompt: torch.Tensor) -> None:
        self.said = []
        self.inner.begin(prompt)

    def propose(self, context: torch.Tensor, **asked: Any) -> Proposal:
        proposal = self.inner.propose(context, **asked)
        self.said.append((context.shape[0], proposal.tokens.tolist()))
        if self.clock is not None:
            # The first block also reads the prompt.
            self.clock[0] += (0.003 + 0.002 * len(proposal)) if len(self.said) > 1 else 9.0
        return proposal

    def rollback(self, num_accepted: int) -> None:
        self.inner.rollback(num_accepted)

    def nbytes(self) -> int:
        return 0


class WatchedReader(Watched):
    """The same of one that reads features."""

    def __init__(self, inner: Drafter) -> None:
        super().__init__(inner)
        assert isinstance(inner, ReadsFeatures)
        self.taps, self.read = inner.taps, inner.read


def watched(kind: str) -> Watched:
    """A drafter of a kind, watched."""
    drafter = drafter_of(kind)
    return WatchedReader(drafter) if isinstance(drafter, ReadsFeatures) else Watched(drafter)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_drafter_is_led_along_a_response_as_by_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs_module, "_ROUNDS", 100)
    by_decoding, by_hand = watched(kind), watched(kind)
    decoded(by_decoding, block=3)
    costs_module._drafted(by_hand, respond(), tokens=3, device=CPU)
    # The decoder also asks for a last block of no tokens.
    assert by_hand.said == [said for said in by_decoding.said if said[0] < PROMPT.shape[0] + 39]


def test_costs_are_of_a_round_and_a_token_and_leave_the_prompt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(decoder, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    drafter = Watched(drafter_of("student"), now)
    assert drafting_costs(drafter, [respond()], longest=4, device=CPU) == pytest.approx((0.003, 0.002))
    # One length alone tells nothing of a round's own part.
    assert drafting_costs(drafter, [respond()], longest=1, device=CPU) == pytest.approx((0.0, 0.005))


def test_who_proposes_nothing_costs_nothing() -> None:
    assert drafting_costs(drafter_of("none"), [respond()], longest=3, device=CPU) == (0.0, 0.0)


def test_expected_speedup_by_hand() -> None:
    # 10 tokens at 1 s each. Four rounds of two tokens: 0.1 + 2 x 0.05 + 1.4; two of none: 1.
    costs = RoundCosts({1: 1.0, 2: 1.2, 3: 1.4}, 0.1, 0.05)
    expected = [Expected(6, 4.0, {2: 3.0, 0: 1.0}), Expected(4, 2.0, {2: 1.0, 0: 1.0})]
    assert expected_speedup(expected, costs, 1.0) == pytest.approx(10 / (4 * 1.6 + 2 * 1.0))
    assert expected_speedup(expected, costs, 0.5) == pytest.approx(5 / (4 * 1.6 + 2 * 1.0))


def _prescore(drafter: Drafter, *responses: FixedResponse, passes: dict[int, float] | None = None) -> Prescore:
    found = prescore(
        drafter,
        responses or (respond(),),
        lengths=range(1, 7),
        passes=passes or FLAT,
        baseline_seconds=1.0,
        device=CPU,
    )
    assert found is not None
    return found


def test_a_draft_that_is_its_target_takes_the_longest_block_and_a_poor_one_the_shortest() -> None:
    twin = _prescore(ModelDrafter(tiny_model(SEED, vocab=VOCAB)))
    # Forty tokens, six accepted of six and one more each: 5 x 7 and 5 more.
    assert (twin.tokens, twin.taus) == (6, {"0": pytest.approx(40 / 6)})
    # Beside passes of a second, drafting is nearly free.
    assert twin.speedup == pytest.approx(40 / 6, rel=0.05)
    dear = {1: 1.0, 8: 8.0}
    assert _prescore(drafter_of("pretrained"), passes=dear).tokens == 1


def test_a_block_is_no_longer_than_the_draft_can_fill() -> None:
    assert _prescore(drafter_of("dspark")).tokens <= BLOCK


def test_temperatures_are_told_apart_in_tau_and_pooled_in_the_speedup() -> None:
    drafter, cold, warm = drafter_of("student"), respond(), respond(SamplingSettings(temperature=1.0))
    both = _prescore(drafter, cold, warm)
    assert set(both.taus) == {"0", "1"}
    passes = sum(response.num_tokens / both.taus[t] for t, response in (("0", cold), ("1", warm)))
    assert both.speedup == pytest.approx(80 / passes, rel=0.05)


def test_a_draft_that_cannot_be_rehearsed_has_no_pre_score() -> None:
    silent = Watched(drafter_of("lookup"))
    assert (
        prescore(silent, [respond()], lengths=[2], passes=FLAT, baseline_seconds=1.0, device=target_model().device)
        is None
    )
