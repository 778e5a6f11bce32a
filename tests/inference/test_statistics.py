"""Figures of the scorecard recomputed by plain code from hand-made records, and what the intervals are of."""

import math
import random
import statistics as plain
from dataclasses import replace

import pytest

from inference.records import Mismatch, Record
from inference.statistics import Estimate, Scorecard, find_card, mean_speedup, scorecards, speed_ratio

PARTS = ("prefill", "draft", "verify", "accept", "cache", "other")


def _record(arm: str, prompt: str, *, domain: str = "chat", temperature: float = 0.0, scale: float = 1.0) -> Record:
    """A request of twelve tokens; `draft` in four rounds of three, `none` in twelve passes."""
    drafted = arm != "none"
    seconds = {
        "prefill": 0.5,
        "draft": 0.4 * drafted,
        "verify": 1.6 if drafted else 2.4,
        "accept": 0.1,
        "cache": 0.05,
        "other": 0.15,
    }
    return Record(
        prompt_id=prompt,
        domain=domain,
        temperature=temperature,
        arm=arm,
        order=0,
        prompt_tokens=20,
        emitted=12,
        passes=4 if drafted else 12,
        proposed=[4, 3, 3] if drafted else [],
        accepted=[3, 3, 2] if drafted else [],
        blocks={"3": 4} if drafted else {"0": 12},
        seconds={part: scale * value for part, value in seconds.items()},
        draft_bytes=100 if drafted else 0,
        target_bytes=1000,
        digest="0" * 16,
    )


def _random_records(seed: int = 0, *, prompts: int = 9) -> list[Record]:
    rng = random.Random(seed)
    records = []
    for index in range(prompts):
        for temperature in (0.0, 1.0):
            for arm in ("none", "a", "b"):
                base = _record(arm, f"p{index}", domain="chat" if index % 2 else "code", temperature=temperature)
                passes = base.passes + rng.randint(0, 3)
                records.append(
                    replace(
                        base,
                        emitted=12 + rng.randint(0, 9),
                        passes=passes,
                        proposed=[n + rng.randint(0, 2) for n in base.proposed],
                        blocks={"0": 1, "3": passes - 1} if arm != "none" else {"0": passes},
                        seconds={part: value * rng.uniform(0.5, 2.0) for part, value in base.seconds.items()},
                        draft_bytes=base.draft_bytes + rng.randint(0, 9),
                    )
                )
    return records


def _total(records: list[Record], *parts: str) -> float:
    return sum(r.seconds[part] for r in records for part in (parts or PARTS))


def test_figures_by_hand() -> None:
    records = [_record(arm, prompt) for prompt in ("p", "q") for arm in ("none", "draft")]
    card = find_card(scorecards(records, price_per_hour=3.6, resamples=50), "draft", temperature=0.0)
    assert (card.requests, card.tokens) == (2, 24)
    # 12 tokens in 4 passes; 8 of 10 verified tokens stood.
    assert card.tau.value == 3.0
    assert card.tau_draft.value == 2.0
    assert card.alpha is not None and card.alpha.value == pytest.approx(0.8)
    assert [e.value for e in card.conditional] == pytest.approx([3 / 4, 3 / 3, 2 / 3])
    assert [e.value for e in card.survival] == pytest.approx([3 / 4, 3 / 4, 2 / 4])
    assert card.mean_acceptance_length is not None and card.mean_acceptance_length.value == pytest.approx(1 + 8 / 4)
    assert card.mean_block == 3.0
    # The draft takes 2.8 s a request, target-only 3.2.
    assert card.tokens_per_s.value == pytest.approx(12 / 2.8)
    assert card.speedup.value == pytest.approx(3.2 / 2.8)
    # A target pass takes 2.4 / 12 = 0.2 s; a round (2.8 - 0.5) / 4 = 0.575 s.
    assert card.expected_speedup.value == pytest.approx(3.0 * 0.2 / 0.575)
    assert card.efficiency.value == pytest.approx((3.2 / 2.8) / (3.0 * 0.2 / 0.575))
    assert card.speedup_over_tau.value == pytest.approx(3.2 / 2.8 / 3.0)
    assert card.seconds["prefill"] == pytest.approx(0.5) and card.seconds["verify"] == pytest.approx(0.4)
    assert (card.draft_bytes, card.target_bytes) == (100, 1000)
    # 3.6 an hour is 0.001 a second.
    assert card.cost_per_million == pytest.approx(1e6 * 0.001 / (12 / 2.8))


def test_the_baseline_is_its_own_measure() -> None:
    cards = scorecards([_record(arm, p) for p in "pq" for arm in ("draft", "none")], resamples=50)
    card = find_card(cards, "none")
    assert card.tau == card.speedup == Estimate(1.0, 1.0, 1.0)
    assert (card.alpha, card.mean_acceptance_length, card.conditional, card.cost_per_million) == (None, None, [], None)
    # The baseline comes first, whatever the order of the records.
    assert cards[0].arm == "none"


@pytest.mark.parametrize("temperature", [0.0, 1.0, None])
@pytest.mark.parametrize("domain", ["chat", "code", "overall"])
def test_figures_equal_plain_sums_over_the_chosen_records(domain: str, temperature: float | None) -> None:
    records = _random_records()
    card = find_card(scorecards(records, resamples=20), "a", domain=domain, temperature=temperature)
    chosen = [r for r in records if domain in ("overall", r.domain) and temperature in (None, r.temperature)]
    mine, base = [r for r in chosen if r.arm == "a"], [r for r in chosen if r.arm == "none"]
    emitted, passes = sum(r.emitted for r in mine), sum(r.passes for r in mine)
    accepted = sum(sum(r.accepted) for r in mine)
    rounds = sum(r.blocks["3"] for r in mine)
    speed = emitted / _total(mine)
    speedup = speed / (sum(r.emitted for r in base) / _total(base))
    expected = (emitted / passes) * (_total(base, "verify") / sum(r.passes for r in base))
    expected /= _total(mine, *PARTS[1:]) / passes
    assert (card.requests, card.tokens) == (len(mine), emitted)
    assert card.tau.value == pytest.approx(emitted / passes)
    assert card.tau_draft.value == pytest.approx(accepted / passes)
    assert card.alpha is not None
    assert card.alpha.value == pytest.approx(accepted / sum(sum(r.proposed) for r in mine))
    for k in range(3):
        stood = sum(r.accepted[k] for r in mine)
        assert card.conditional[k].value == pytest.approx(stood / sum(r.proposed[k] for r in mine))
        assert card.survival[k].value == pytest.approx(stood / rounds)
    assert card.mean_block == pytest.approx(3 * rounds / passes)
    assert card.tokens_per_s.value == pytest.approx(speed)
    assert card.speedup.value == pytest.approx(speedup)
    assert card.expected_speedup.value == pytest.approx(expected)
    assert card.efficiency.value == pytest.approx(speedup / expected)
    assert card.speedup_over_tau.value == pytest.approx(speedup / (emitted / passes))
    assert card.seconds["draft"] == pytest.approx(_total(mine, "draft") / passes)
    assert card.seconds["prefill"] == pytest.approx(_total(mine, "prefill") / len(mine))
    assert card.draft_bytes == max(r.draft_bytes for r in mine)


def test_cards_exist_for_every_arm_domain_and_temperature() -> None:
    keys = [(c.arm, c.domain, c.temperature) for c in scorecards(_random_records(), resamples=5)]
    assert len(keys) == len(set(keys)) == 3 * 3 * 3


def test_a_missing_card_is_an_error() -> None:
    with pytest.raises(KeyError, match="no scorecard of c on overall at temperature None"):
        find_card(scorecards(_random_records(), resamples=5), "c")


def _estimates(card: Scorecard) -> list[Estimate]:
    found = [value for value in vars(card).values() if isinstance(value, Estimate)]
    return [*found, *card.conditional, *card.survival]


def _ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None and estimate.high is not None
    return estimate.low, estimate.high


def test_one_prompt_gives_no_interval() -> None:
    cards = scorecards([_record(arm, "p") for arm in ("draft", "none")], resamples=50)
    speedup = find_card(cards, "draft").speedup
    assert speedup.value != 1.0 and (speedup.low, speedup.high) == (None, None)
    assert not any(speedup.surely_above(bound) or speedup.surely_below(bound) for bound in (0.0, 100.0))
    assert str(speedup).endswith("[no interval]")


def test_intervals_hold_their_values() -> None:
    for card in scorecards(_random_records(), resamples=400):
        for estimate in _estimates(card):
            low, high = _ends(estimate)
            assert low <= estimate.value <= high
            assert low < high or card.arm == "none"


def test_intervals_shrink_with_more_prompts() -> None:
    def width(prompts: int) -> float:
        card = find_card(scorecards(_random_records(prompts=prompts), resamples=400), "a")
        low, high = _ends(card.speedup)
        return high - low

    assert width(200) < 0.5 * width(10)


def test_intervals_cover_about_as_often_as_they_say() -> None:
    # tau of prompts whose expected tokens and passes are 16.5 and 5.5: the ratio of means is 3.
    covered = 0
    for seed in range(100):
        records = [r for r in _random_records(seed, prompts=30) if r.arm != "b" and r.temperature == 0.0]
        estimate = find_card(scorecards(records, resamples=200), "a").tau
        low, high = _ends(estimate)
        covered += low <= 3.0 <= high
    assert 88 <= covered <= 100


def test_a_prompt_is_one_cluster_whatever_temperatures_it_was_decoded_at() -> None:
    # Decoding every prompt twice with the same outcome adds no information: the interval must not shrink.
    once = [r for r in _random_records() if r.temperature == 0.0]
    twice = [*once, *(replace(r, temperature=1.0) for r in once)]
    single = find_card(scorecards(once, resamples=300), "a", temperature=None)
    double = find_card(scorecards(twice, resamples=300), "a", temperature=None)
    assert _ends(double.speedup) == pytest.approx(_ends(single.speedup))


def test_the_seed_fixes_the_bootstrap() -> None:
    cards = [find_card(scorecards(_random_records(), seed=s, resamples=100), "a").speedup for s in (1, 1, 2)]
    assert cards[0] == cards[1] != cards[2]
    assert cards[0].value == cards[2].value


def test_rounds_without_a_proposal_do_not_count_as_failed_drafts() -> None:
    quiet = replace(_record("draft", "p"), proposed=[1], accepted=[1], blocks={"0": 11, "1": 1}, passes=11)
    card = find_card(scorecards([_record("none", "p"), quiet], resamples=5), "draft")
    assert card.survival[0].value == card.conditional[0].value == 1.0
    assert card.mean_acceptance_length is not None and card.mean_acceptance_length.value == 2.0
    assert card.mean_block == pytest.approx(1 / 11)


def test_an_arm_that_never_proposed_has_no_acceptance() -> None:
    silent = replace(_record("draft", "p"), proposed=[], accepted=[], blocks={"0": 4})
    card = find_card(scorecards([_record("none", "p"), silent], resamples=5), "draft")
    assert (card.alpha, card.mean_acceptance_length) == (None, None)
    assert math.isfinite(card.speedup.value)


def test_mismatches_are_counted_and_those_that_rounding_explains_told_apart() -> None:
    near, far = Mismatch(3, 0.001, True), Mismatch(5, 2.0, False)
    arms = [replace(_record("draft", p), mismatch=m) for p, m in (("p", near), ("q", far), ("r", None))]
    card = find_card(scorecards([*arms, *(_record("none", p) for p in "pqr")], resamples=5), "draft")
    assert (card.mismatches, card.unexplained) == (2, 1)


def test_domains_count_alike_in_the_mean_speedup() -> None:
    unit = mean_speedup([_record("none", "p"), _record("draft", "p")], "draft", temperature=0.0, resamples=5).value
    # One domain has three prompts and a draft that halves the time, the other one prompt and one that gains nothing.
    records = []
    for prompt, domain, speedup in (("a", "chat", 2.0), ("b", "chat", 2.0), ("c", "chat", 2.0), ("d", "maths", 1.0)):
        records += [
            replace(_record("none", prompt, scale=speedup), domain=domain),
            replace(_record("draft", prompt), domain=domain),
            replace(_record("draft", prompt, scale=50.0), domain=domain, temperature=0.7),
        ]
    assert mean_speedup(records, "draft", temperature=0.0, resamples=50).value == pytest.approx(1.5 * unit)
    varied = [
        replace(_record(arm, f"{domain}{n}", scale=1 + n * (arm == "none")), domain=domain)
        for arm in ("none", "draft")
        for domain in ("chat", "maths")
        for n in range(6)
    ]
    mean = mean_speedup(varied, "draft", temperature=0.0, resamples=500)
    assert mean.value == pytest.approx(3.5 * unit) and mean.low is not None and mean.high is not None
    assert unit < mean.low < 3.0 * unit and 4.0 * unit < mean.high < 6.0 * unit


def test_speed_ratio_is_paired() -> None:
    # Prompts differ tenfold in length, but one arm always takes exactly half as long as the other.
    rng = random.Random(0)
    records = []
    for index in range(10):
        scale = rng.uniform(0.1, 10.0)
        records += [_record("fast", f"p{index}", scale=scale), _record("slow", f"p{index}", scale=2 * scale)]
    ratio = speed_ratio(records, "fast", "slow", resamples=200)
    assert ratio == Estimate(*(pytest.approx(2.0),) * 3)
    assert speed_ratio(records, "slow", "fast", resamples=200).value == pytest.approx(0.5)


def test_speed_ratio_takes_only_prompts_that_both_decoded() -> None:
    records = [_record("a", "p"), _record("b", "p", scale=3.0), _record("a", "q", scale=100.0), _record("b", "r")]
    assert speed_ratio(records, "a", "b", resamples=10).value == pytest.approx(3.0)


def test_speed_ratio_at_one_temperature() -> None:
    records = [
        _record(arm, "p", temperature=t, scale=scale)
        for arm, t, scale in (("a", 0.0, 1.0), ("b", 0.0, 2.0), ("a", 1.0, 1.0), ("b", 1.0, 8.0))
    ]
    assert speed_ratio(records, "a", "b", temperature=0.0, resamples=10).value == pytest.approx(2.0)
    # 24 tokens in twice 2.8 s against 24 in ten times 2.8.
    assert speed_ratio(records, "a", "b", resamples=10).value == pytest.approx(plain.mean((2.0, 8.0)))


def test_speed_ratio_needs_a_prompt_in_common() -> None:
    with pytest.raises(ValueError, match="a and b have no prompt in common"):
        speed_ratio([_record("a", "p"), _record("b", "q")], "a", "b")


def test_a_record_survives_its_line() -> None:
    for record in (_record("none", "p"), replace(_record("draft", "p"), mismatch=Mismatch(3, 0.5, False))):
        assert Record.from_json(record.to_json()) == record
        assert "\n" not in record.to_json()


def test_scorecards_turn_into_plain_data() -> None:
    data = find_card(scorecards(_random_records(), resamples=5), "a").to_dict()
    assert isinstance(data["tau"], dict) and set(data["tau"]) == {"value", "low", "high"}
