"""Advice says what the figures say: where speculation pays, where it does not, what it costs, and how sure that is."""

import re
from dataclasses import replace

import pytest

from inference.batch.load import Point
from inference.batch.load_figures import LoadFigure
from inference.records import Record
from inference.statistics import Estimate, Scorecard, find_card, scorecards
from pipelines.advice import Advice, advise, break_even_alpha, break_even_tau, prompts_of, prompts_to_settle
from tests.pipelines.test_decisions import Made, made

FAST = {"fast": Made(2.0, 12.0, mib=20)}


def lines(cards: list[Scorecard], topic: str, **options: object) -> list[Advice]:
    """The advice of one topic."""
    return [line for line in advise(cards, winner="fast", **options) if line.topic == topic]  # type: ignore[arg-type]


def slowed(records: list[Record], domain: str, factor: float) -> list[Record]:
    """The draft's requests of one domain, taking so many times as long."""
    return [
        replace(r, seconds={part: s * factor for part, s in r.seconds.items()})
        if (r.arm, r.domain) == ("fast", domain)
        else r
        for r in records
    ]


def test_where_every_interval_lies_above_one_it_says_to_speculate() -> None:
    found = lines(scorecards(made(FAST)), "where")
    assert [line.text for line in found[:1]] == ["Over all domains: speculate at temperature 0 and 1."]
    assert len(found) == 4, "overall, and three domains"
    assert "over 4 prompts" in found[1].evidence and "over 12 prompts" in found[0].evidence


def test_a_domain_that_is_slower_is_not_to_be_speculated_on() -> None:
    found = lines(scorecards(slowed(made(FAST), "code", 2.0)), "where")
    # 1.67 over 2: 0.83 at both temperatures, and the last of the domains, which begin with the fastest.
    assert found[-1].text == (
        "On code: do not speculate at temperature 0: it is slower; do not speculate at temperature 1: it is slower."
    )
    assert "0.83 [" in found[-1].evidence


def test_a_gain_that_is_not_shown_is_no_gain_and_comes_with_the_prompts_that_would_settle_it() -> None:
    cards = scorecards(made({"fast": Made(1.5, 14.0, noise=0.6)}))
    doubtful = [c for c in cards if c.arm == "fast" and c.speedup.value > 1.0 and not c.speedup.surely_above(1.0)]
    assert {"chat", "overall"} <= {card.domain for card in doubtful if card.temperature == 1.0}
    found = {line.text.partition(":")[0]: line.text for line in lines(cards, "where")}
    for place in ("On chat", "Over all domains"):
        assert "do not speculate at temperature 1: no gain is shown (about" in found[place]
        assert not re.search(r": speculate at temperature [^;]*1", found[place])


def test_one_prompt_gives_no_interval_and_so_no_gain() -> None:
    found = lines(scorecards(made(FAST, prompts=1)), "where")
    assert "do not speculate at temperature 0: one prompt gives no interval" in found[0].text


def test_prompts_to_settle_grow_with_the_square_of_the_interval() -> None:
    # Half an interval of 0.5 has to shrink to 0.25: a factor 2, so 4 times the prompts.
    assert prompts_to_settle(Estimate(1.25, 0.75, 1.5), 10) == 40
    assert prompts_to_settle(Estimate(0.75, 0.5, 1.25), 10) == 40  # above it 0.5, to 0.25
    assert prompts_to_settle(Estimate(1.0, 0.8, 1.4), 10) is None
    assert prompts_to_settle(Estimate(1.2, None, None), 1) is None


def test_a_round_that_costs_more_than_a_pass_has_to_bring_more_than_a_token() -> None:
    card = find_card(scorecards(made({"fast": Made(2.0, 12.0, noise=0.0)})), "fast")
    # 12 ms a round against 10 ms a pass of the target
    assert break_even_tau(card) == pytest.approx(1.2, abs=0.01)
    [line] = lines(scorecards(made({"fast": Made(2.0, 12.0, noise=0.0)})), "break-even")
    assert line.text.startswith("A round costs 1.20 target passes") and "acceptance of 0.20" in line.text


def test_the_acceptance_that_breaks_even_solves_the_sum() -> None:
    assert break_even_alpha(1.0 + 0.5 + 0.25, block=2.0) == pytest.approx(0.5)
    # Half of the rounds propose a second token: 1 + a + a^2 / 2 = 1.625 at a = 0.5.
    assert break_even_alpha(1.625, block=1.5) == pytest.approx(0.5)
    assert break_even_alpha(0.9, block=2.0) == 0.0
    assert break_even_alpha(3.5, block=2.0) is None


def test_memory_is_that_of_the_target_and_the_draft() -> None:
    [line] = lines(scorecards(made(FAST)), "memory")
    assert line.text == "Reserve 120 MiB for weights and caches of one request (20% more than the target alone)."


def test_cost_and_saving_follow_from_the_price() -> None:
    records = made({"fast": Made(2.0, 12.0, noise=0.0)})
    [line] = lines(scorecards(records, price_per_hour=0.36), "cost")
    # 0.36 an hour are 1e-4 a second; 6 ms a token: 0.6 for a million, about 1.0 at 10 ms.
    assert line.text == "A million tokens cost 0.60, one request at a time; saves 40% against target-only decoding."
    [unknown] = lines(scorecards(records), "cost")
    assert "no price per hour was given" in unknown.text and "--price-per-hour" in unknown.evidence


def test_large_batches_are_a_caveat_until_they_are_measured() -> None:
    cards = scorecards(made(FAST))
    [caveat] = lines(cards, "batches")
    assert "gains shrink" in caveat.text and "dspark load load.draft=fast" in caveat.evidence
    [measured] = lines(cards, "batches", load=[loaded(1, 1.4), loaded(4, 1.2), loaded(16, 0.9)])
    assert "surely gains up to 4 requests" in measured.text
    [none] = lines(cards, "batches", load=[loaded(16, 0.9)])
    assert "no gain was shown" in none.text


def loaded(concurrency: int, over_none: float) -> LoadFigure:
    """The scheduler in a closed loop."""
    estimate = Estimate(over_none, over_none - 0.05, over_none + 0.05)
    pair = (1.0, 2.0)
    return LoadFigure(
        arm="scheduled",
        point=Point("closed", concurrency),
        precision="fp32",
        blocks=3,
        requests=3,
        tokens_per_s=estimate,
        over_none=estimate,
        over_fixed=None,
        best_fixed=False,
        mean_length=1.0,
        tau=1.5,
        alpha=0.5,
        token_ms=pair,
        request_token_ms=pair,
        first_ms=pair,
        total_ms=pair,
        round_ms=1.0,
        outside_round_ms=0.0,
        outside_request_ms=0.0,
        mismatches=0,
        unexplained=0,
    )


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (1, "One prompt decides nothing"),
        (6, "6 prompts show large differences only"),
        (12, "12 prompts are enough for the overall figure, not for chat, code, maths"),
        (30, "30 prompts are enough for the overall figure and for every domain"),
    ],
)
def test_it_says_how_far_so_many_prompts_can_be_trusted(prompts: int, words: str) -> None:
    cards = scorecards(made(FAST, prompts=prompts))
    assert prompts_of(cards, arm="none") == prompts
    assert lines(cards, "evidence")[0].text.startswith(words)


def test_a_speedup_above_tau_is_called_a_disturbed_machine() -> None:
    # 1.05 tokens in 9 ms against 10 ms a token: a speedup of 1.17
    cards = scorecards(made({"fast": Made(1.05, 9.0)}))
    assert "disturbed" in lines(cards, "evidence")[-1].text
    assert not any("disturbed" in line.text for line in lines(scorecards(made(FAST)), "evidence"))


def test_where_nothing_won_it_says_not_to_speculate_and_names_the_fastest() -> None:
    found = advise(scorecards(made({"slow": Made(1.5, 20.0)})), winner="none")
    assert found[0].text.startswith("Do not speculate") and "slow: 0.75" in found[0].evidence
    assert [line.topic for line in found] == ["where", "memory", "cost", "batches", "evidence"]
    alone = advise(scorecards(made({})), winner="none")
    assert alone[0].evidence == "no draft was scored"
