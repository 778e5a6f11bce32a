"""The gate promotes what is faster and nothing else, however often it looks."""

import math

import numpy as np
import pytest

from inference.records import Record
from pipelines.realign.config import GateConfig
from pipelines.realign.gate import GIVE_UP, KEEP, OTHER, PROMOTE, Gate, Pairing, decide, pairings
from pipelines.realign.simulate import outcome, student


def pairs(values: list[float], domain: str = "chat") -> list[Pairing]:
    return [Pairing(f"{domain}{i}", domain, value) for i, value in enumerate(values)]


def record(prompt: str, arm: str, *, emitted: int, seconds: float, passes: int, temperature: float = 0.0) -> Record:
    return Record(
        prompt_id=prompt,
        domain="chat",
        temperature=temperature,
        arm=arm,
        order=0,
        prompt_tokens=4,
        emitted=emitted,
        passes=passes,
        proposed=[passes],
        accepted=[emitted - passes],
        blocks={"1": passes},
        seconds={"verify": seconds},
        draft_bytes=1,
        target_bytes=1,
        digest="",
    )


def test_a_clearly_faster_challenger_is_promoted_before_the_prompts_run_out() -> None:
    gate, verdict = decide(GateConfig(), pairs([0.2, 0.15, 0.25, 0.18] * 20), {"chat": 80})
    assert verdict is not None and verdict.outcome == PROMOTE
    assert len(gate.looks) < 40


def test_an_equal_challenger_is_not_promoted() -> None:
    _, verdict = decide(GateConfig(), pairs([0.1, -0.1] * 40), {"chat": 80})
    assert verdict is not None and verdict.outcome in (KEEP, GIVE_UP)


def test_a_slower_challenger_is_kept_out_early() -> None:
    gate, verdict = decide(GateConfig(), pairs([-0.2, -0.1, -0.15] * 30), {"chat": 90})
    assert verdict is not None and verdict.outcome == KEEP
    assert len(gate.looks) < 60


def test_a_domain_that_loses_stops_a_challenger_that_is_faster_overall() -> None:
    mixed = [p for two in zip(pairs([0.3] * 60), pairs([-0.2] * 60, "code"), strict=True) for p in two]
    _, verdict = decide(GateConfig(), mixed, {"chat": 60, "code": 60})
    assert verdict is not None and verdict.outcome == KEEP and "code" in verdict.reason


def test_a_domain_without_enough_evidence_stops_promotion() -> None:
    short = [*pairs([0.3] * 60), *pairs([0.0] * 8, "code")]
    _, verdict = decide(GateConfig(), short, {"chat": 60, "code": 8})
    assert verdict is not None and verdict.outcome == GIVE_UP and "code" in verdict.reason


def test_small_domains_are_judged_together() -> None:
    gate = Gate(GateConfig(min_domain_prompts=8), {"chat": 40, "law": 3, "poems": 5})
    gate.update(Pairing("1", "law", 0.1))
    assert set(gate.looks[0].domains) == {"chat", OTHER}


def test_one_disturbed_request_cannot_decide() -> None:
    gate = Gate(GateConfig(), {"chat": 10})
    assert gate.update(Pairing("1", "chat", math.log(1000))) is None


def test_a_ratio_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="have no ratio"):
        Gate(GateConfig(), {"chat": 1}).update(Pairing("1", "chat", math.nan))


def test_pairings_average_the_temperatures_of_a_prompt() -> None:
    records = [
        record("a", "challenger", emitted=100, seconds=1.0, passes=50),
        record("a", "champion", emitted=100, seconds=2.0, passes=100),
        record("a", "challenger", emitted=100, seconds=1.0, passes=50, temperature=1.0),
        record("a", "champion", emitted=100, seconds=1.0, passes=50, temperature=1.0),
        record("b", "champion", emitted=100, seconds=1.0, passes=50),
    ]
    (pair,) = pairings(records, challenger="challenger", champion="champion")
    assert pair.log_speed == pytest.approx(math.log(2) / 2)


def promoted(cfg: GateConfig, *, gain: float, cycles: int) -> float:
    rng = np.random.default_rng(7)
    ends = [outcome(cfg, gain=gain, noise=student(0.1), prompts=30, rng=rng)[0] for _ in range(cycles)]
    return ends.count(PROMOTE) / cycles


def test_false_promotions_stay_below_alpha_with_a_look_after_every_prompt() -> None:
    # 300 cycles at 0.05: 0.05 + 3 standard errors is 0.088.
    assert promoted(GateConfig(), gain=0.0, cycles=300) <= 0.088


def test_a_gain_of_a_tenth_is_found() -> None:
    assert promoted(GateConfig(), gain=0.10, cycles=60) >= 0.8


def test_without_the_sequential_bound_repeated_looks_promote_equals() -> None:
    """The mutant: a gate that takes a fixed-sample test (z above 1.64) after every prompt."""
    rng = np.random.default_rng(7)
    values = student(0.1)(rng, 300 * 90).reshape(300, 90)
    counts = np.arange(1, 91)
    means = values.cumsum(1) / counts
    z = means / (values.std() / np.sqrt(counts))
    assert (z[:, 4:] > 1.64).any(1).mean() > 0.088
