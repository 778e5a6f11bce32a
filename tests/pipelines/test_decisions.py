"""Which draft wins, and which measurements are refused: on made-up records, so that speeds are what the test says."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from inference.block_length import BlockChoice
from inference.errors import InputError
from inference.records import Mismatch, Record
from inference.request import PARTS
from inference.statistics import scorecards
from pipelines.score import ScoreError, check_scorecards, slow_arms, whole_records
from pipelines.score_plan import ScorePlan
from pipelines.select import Decision, check_temperature, decide
from pipelines.stage_config import SelectConfig

MIB = 2**20
TOKENS = 60


class Made(NamedTuple):
    """An arm to make records of: tokens and milliseconds a pass, MiB of the draft, noise of its time."""

    tau: float
    pass_ms: float
    mib: float = 0.0
    noise: float = 0.01


def made(arms: Mapping[str, Made], *, prompts: int = 12, temperatures: tuple[float, ...] = (0.0, 1.0)) -> list[Record]:
    """Records of arms over prompts of three domains; the baseline takes 10 ms a token."""
    draw = random.Random(0)
    found = []
    for index in range(prompts):
        for temperature in temperatures:
            for order, (name, arm) in enumerate({"none": Made(1.0, 10.0), **arms}.items()):
                passes = round(TOKENS / arm.tau)
                seconds = passes * arm.pass_ms / 1e3 * draw.uniform(1 - arm.noise, 1 + arm.noise)
                accepted = TOKENS - passes
                found.append(
                    Record(
                        prompt_id=f"p{index}",
                        domain=("chat", "code", "maths")[index % 3],
                        temperature=temperature,
                        arm=name,
                        order=order,
                        prompt_tokens=20,
                        emitted=TOKENS,
                        passes=passes,
                        proposed=[] if name == "none" else [passes],
                        accepted=[] if name == "none" else [min(accepted, passes)],
                        blocks={"0": passes} if name == "none" else {"1": passes},
                        seconds={**dict.fromkeys(PARTS, 0.0), "verify": seconds},
                        draft_bytes=int(arm.mib * MIB),
                        target_bytes=100 * MIB,
                        digest="",
                    )
                )
    return found


def decided(arms: Mapping[str, Made], **limits: Any) -> Decision:
    """The decision on made-up arms."""
    records = made(arms)
    return decide(scorecards(records), records, cfg=SelectConfig(**limits), seed=0)


def refused(decision: Decision) -> dict[str, str]:
    """Why each arm may not win."""
    return {c.arm: c.refused for c in decision.candidates}


# Selection


def test_the_fastest_draft_wins_and_the_reason_gives_its_speedup() -> None:
    # tau 2 at 12 ms a pass: 6 ms a token against 10, a speedup of 1.67; tau 1.5 at 12 ms: 8 ms, 1.25.
    decision = decided({"slow": Made(1.5, 12.0), "fast": Made(2.0, 12.0)})
    assert decision.winner == "fast" and decision.tied == []
    assert decision.reason.startswith("speedup 1.67 [1.6")
    assert [c.arm for c in decision.candidates] == ["fast", "slow", "none"]


def test_none_wins_when_nothing_is_faster_and_says_why() -> None:
    # 1.5 tokens in 20 ms: 13.3 ms a token, a speedup of 0.75
    decision = decided({"pruned": Made(1.5, 20.0)})
    assert decision.winner == "none"
    assert decision.reason == (
        f"no draft may win: the fastest, pruned, has a lower bound of {decision.candidates[1].speedup.low:.2f}, "
        "which does not beat 1"
    )


def test_faster_on_average_is_not_enough() -> None:
    decision = decided({"lucky": Made(1.5, 14.0, noise=0.9)})
    [lucky] = [c for c in decision.candidates if c.arm == "lucky"]
    assert not lucky.speedup.surely_above(1.0) and not lucky.speedup.surely_below(1.0)
    assert decision.winner == "none" and "does not beat 1" in lucky.refused


def test_one_prompt_decides_nothing() -> None:
    records = made({"lucky": Made(2.0, 12.0)}, prompts=1)
    decision = decide(scorecards(records), records, cfg=SelectConfig(), seed=0)
    assert decision.winner == "none"
    assert refused(decision)["lucky"] == "was scored on one prompt, which gives no interval"


def test_none_alone_wins_by_default() -> None:
    assert decided({}).reason == "no draft may win: nothing else was scored"


def test_a_draft_over_the_memory_limit_may_not_win() -> None:
    arms = {"big": Made(2.0, 12.0, mib=300), "small": Made(1.5, 12.0, mib=50)}
    decision = decided(arms, max_draft_mib=100)
    assert decision.winner == "small"
    assert refused(decision)["big"] == "needs 300 MiB, more than 100"


def test_a_draft_below_the_least_acceptance_may_not_win() -> None:
    # tau 1.5: 40 passes, 20 of 40 proposed tokens accepted.
    decision = decided({"guesser": Made(1.5, 12.0)}, min_alpha=0.6)
    assert decision.winner == "none"
    assert refused(decision)["guesser"] == "has acceptance 0.50, below 0.6"


def test_among_drafts_that_cannot_be_told_apart_the_smaller_wins() -> None:
    arms = {"big": Made(2.0, 12.0, mib=300, noise=0.1), "small": Made(2.0, 12.1, mib=50, noise=0.1)}
    decision = decided(arms)
    assert decision.winner == "small"
    assert decision.candidates[0].arm == "small" or decision.reason.endswith(
        "big is not measurably faster and costs more memory"
    )


def test_a_clear_difference_is_no_tie_however_small_the_other_is() -> None:
    decision = decided({"big": Made(2.0, 12.0, mib=300), "small": Made(2.0, 13.0, mib=1)})
    assert decision.winner == "big" and decision.tied == []


def test_a_draft_without_tau_does_not_win_by_noise() -> None:
    """Tau 1 means that no proposal ever stood: such a draft can only have been lucky with the machine."""
    decision = decided({"idle": Made(1.0, 9.8)})
    assert decision.winner == "none"
    assert "faster than its tau of 1.00 allows" in refused(decision)["idle"]


def test_selection_at_one_temperature_uses_its_records_alone() -> None:
    # At 0 tau 3 at 12 ms: 2.5; at 1 tau 1.2 at 12 ms: 1.0 of speed, and slower with the noise on top.
    cold = made({"pruned": Made(3.0, 12.0)}, temperatures=(0.0,))
    warm = made({"pruned": Made(1.2, 15.0)}, temperatures=(1.0,))
    records = [*cold, *warm]
    winners = [decide(scorecards(records), records, cfg=SelectConfig(temperature=t), seed=0).winner for t in (0.0, 1.0)]
    assert winners == ["pruned", "none"]


def test_a_temperature_that_was_not_scored_is_bad_input() -> None:
    with pytest.raises(InputError, match=r"nothing is scored at temperature 0.5 \[select.temperature\]: .* 0, 1"):
        check_temperature(SelectConfig(temperature=0.5), scored=[0.0, 1.0])


# Measurements that cannot be right


def test_good_measurements_pass() -> None:
    check_scorecards(scorecards(made({"pruned": Made(2.0, 12.0), "lookup": Made(1.0, 10.0)})))


def test_a_speedup_above_tau_is_an_error() -> None:
    # Tau 2 at 8 ms a pass: 4 ms a token, 2.5 times as fast as 10: no draft makes a pass of the target shorter.
    cards = scorecards(made({"pruned": Made(2.0, 8.0)}))
    expected = r"speedup 2\.\d+ is above tau 2\.000 \[pruned, overall, temperature all\]: the baseline is handicapped"
    with pytest.raises(ScoreError, match=expected):
        check_scorecards(cards)


def test_a_few_per_cent_above_tau_are_noise_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_scorecards(scorecards(made({"lookup": Made(1.0, 9.75, noise=0.001)})))
    assert "is above tau 1.000 [lookup, overall, temperature all], by no more than noise" in caplog.text


def test_one_lucky_domain_is_no_error() -> None:
    """Two requests of one domain that ran while the machine was busy with the baseline prove nothing."""
    records = [
        replace(r, seconds={**r.seconds, "verify": r.seconds["verify"] * 1.3})
        if r.arm == "none" and r.domain == "chat" and r.temperature == 1.0
        else r
        for r in made({"lookup": Made(1.0, 10.1)})
    ]
    check_scorecards(scorecards(records))


def test_a_greedy_mismatch_that_rounding_does_not_explain_is_an_error() -> None:
    records = made({"pruned": Made(2.0, 12.0)})
    index = next(i for i, r in enumerate(records) if r.arm == "pruned" and r.temperature == 0.0)
    near = replace(records[index], mismatch=Mismatch(position=3, margin=0.001, near_tie=True))
    check_scorecards(scorecards([*records[:index], near, *records[index + 1 :]]))
    far = replace(records[index], mismatch=Mismatch(position=3, margin=2.0, near_tie=False))
    with pytest.raises(ScoreError, match=r"1 greedy outputs differ where the target has no near-tie \[pruned, chat"):
        check_scorecards(scorecards([*records[:index], far, *records[index + 1 :]]))


# What a killed score left


PLAN = ScorePlan({"pruned": BlockChoice(1, [0.5], 0.0, [1.0])}, [f"p{i}" for i in range(4)], screen_at=2, chances={})


def test_whole_requests_stay_and_a_cut_one_goes() -> None:
    records = made({"lookup": Made(1.0, 10.0), "pruned": Made(2.0, 12.0)}, prompts=2)
    arms = ["none", "lookup", "pruned"]
    for cut in range(len(records) + 1):
        kept = whole_records(records[:cut], PLAN.prompts, PLAN, arms=arms, below=0.0)
        assert kept == records[: cut // 3 * 3], cut


def test_after_the_screening_a_request_is_whole_without_the_slow_arms() -> None:
    slow = {"lookup": Made(1.0, 10.0), "pruned": Made(1.0, 40.0)}
    before, after = made(slow, prompts=4)[: 2 * 2 * 3], made({"lookup": Made(1.0, 10.0)}, prompts=4)[2 * 2 * 2 :]
    records = [*before, *after]
    assert set(slow_arms(before, {"p0", "p1"}, 0.8)) == {"pruned"}
    arms = ["none", "lookup", "pruned"]
    assert whole_records(records, PLAN.prompts, PLAN, arms=arms, below=0.8) == records
    assert whole_records(records[:-1], PLAN.prompts, PLAN, arms=arms, below=0.8) == records[:-2]
