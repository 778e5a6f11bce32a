"""Arms in turns, ratios that keep the pairs together, and exponents."""

import itertools
import math

import numpy as np
import pytest

from inference.statistics import Estimate
from pipelines.bench.growing import SURPRISE, Growth, grown
from pipelines.bench.outcome import Figure, Goal
from pipelines.bench.paired import (
    Sample,
    exponent,
    exponent_beyond_first,
    interleaved,
    median_seconds,
    speed,
    speed_ratio,
)

# Prompts a hundred times as slow as others, under two arms of which one always takes 1.5 times as long.
SLOWNESS = {"a": 1.0, "b": 100.0, "c": 3.0, "d": 40.0, "e": 0.5, "f": 12.0}


def paired_samples() -> list[Sample]:
    return [
        Sample(unit, arm, place, 10.0, slowness * times)
        for unit, slowness in SLOWNESS.items()
        for place, (arm, times) in enumerate((("fast", 1.0), ("slow", 1.5)))
    ]


def test_all_arms_do_a_unit_before_any_does_the_next_in_shuffled_order() -> None:
    calls: list[tuple[str, int]] = []

    def arm(name: str):  # type: ignore[no-untyped-def]
        def run(unit: int) -> float:
            calls.append((name, unit))
            return 1.0

        return run

    units = {f"u{number}": number for number in range(12)}
    samples = interleaved(units, {"x": arm("x"), "y": arm("y")}, title="t", unit="units", seed=0)
    assert calls[:2] == [("x", 0), ("y", 0)]  # the warm-up, not counted
    counted = calls[2:]
    assert [unit for _, unit in counted] == [number for number in range(12) for _ in range(2)]
    first = [counted[2 * number][0] for number in range(12)]
    assert 2 < first.count("x") < 10
    assert [(s.arm, units[s.unit]) for s in samples] == counted
    assert [s.order for s in samples] == [0, 1] * 12


def test_the_clock_is_read_around_the_work_alone() -> None:
    ticks = itertools.count()
    # Each reading is one later than the last, so every sample takes exactly one.
    samples = interleaved(
        {"u": 0, "v": 1}, {"x": lambda _: 3.0}, title="t", unit="units", seed=0, clock=lambda: float(next(ticks))
    )
    assert [(s.seconds, s.amount) for s in samples] == [(1.0, 3.0), (1.0, 3.0)]


def test_pairs_stay_together_so_that_slow_prompts_widen_nothing() -> None:
    found = speed_ratio(paired_samples(), "fast", "slow")
    # Every resample has the same ratio, because numerator and denominator are resampled together.
    assert found.value == pytest.approx(1.5)
    assert found.low == pytest.approx(1.5) and found.high == pytest.approx(1.5)


def test_a_bootstrap_that_lost_the_pairs_would_be_wide() -> None:
    # What the test above would see if arms were resampled apart: the spread of prompts, which is a hundredfold.
    draw = np.random.default_rng(0)
    fast = np.array(list(SLOWNESS.values()))
    apart = [(1.5 * fast[draw.integers(6, size=6)]).sum() / fast[draw.integers(6, size=6)].sum() for _ in range(500)]
    low, high = np.quantile(apart, [0.025, 0.975])
    assert high / low > 5


def test_arms_that_did_not_do_the_same_units_are_refused() -> None:
    with pytest.raises(ValueError, match="fast and slow were not run on the same units"):
        speed_ratio(paired_samples()[:-1], "fast", "slow")


def test_a_ratio_is_of_sums_and_a_single_unit_has_no_interval() -> None:
    samples = [Sample("a", "x", 0, 10, 1.0), Sample("b", "x", 0, 10, 3.0), *[Sample(u, "y", 1, 10, 1.0) for u in "ab"]]
    # 20 tokens in 4 s over 20 in 2 s, not the mean of 10 / 10 and 3.3 / 10.
    assert speed_ratio(samples, "x", "y").value == pytest.approx(0.5)
    assert speed(samples, "x").value == pytest.approx(5.0)
    alone = speed_ratio([s for s in samples if s.unit == "a"], "x", "y")
    assert (alone.value, alone.low, alone.high) == (1.0, None, None)


def test_a_median_is_none_of_the_outliers() -> None:
    samples = [Sample(f"u{n}", "x", 0, 1, s) for n, s in enumerate((0.2, 0.3, 0.25, 9.0, 0.24))]
    found = median_seconds(samples, "x")
    assert found.value == 0.25
    assert found.low is not None and 0.2 <= found.low <= 0.25


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_an_exponent_is_found_whatever_the_rounds_speed(power: float) -> None:
    sizes = [1, 2, 4, 8]
    # The machine is three times as slow in the second round; the slope of each is the same.
    seconds = np.array([[slow * size**power for size in sizes] for slow in (1.0, 3.0, 1.5)])
    found = exponent(sizes, seconds)
    assert found.value == pytest.approx(power)
    assert found.high is not None and found.high == pytest.approx(power)


def test_what_context_adds_is_told_from_what_any_pass_costs() -> None:
    sizes = [64, 128, 256, 512]
    seconds = np.array([[1.0 + 0.001 * (size - 64) for size in sizes]] * 3)
    assert exponent(sizes, seconds).value < 0.2
    assert exponent_beyond_first(sizes, seconds).value == pytest.approx(1.0)
    # Larger sizes cost less on average, though not in every round: nothing is fitted, whatever a resample says.
    noisy = np.array([[1.0, 0.5, 0.5, 0.5], [1.0, 1.1, 1.1, 1.1]])
    found = exponent_beyond_first(sizes, noisy)
    assert math.isnan(found.value) and found.low is None and found.high is None


def test_sizes_are_measured_in_every_round_and_a_surprise_is_seen() -> None:
    calls: list[int] = []

    def work(size: int):  # type: ignore[no-untyped-def]
        def run() -> float:
            calls.append(size)
            return float(size) ** 1.5

        return run

    found = grown("x", {size: work(size) for size in (4, 1, 2)}, rounds=5, seed=0)
    assert found.sizes == [1, 2, 4] and found.seconds.shape == (5, 3)
    assert calls[:3] == [1, 2, 4]  # not counted
    rounds = [calls[3 + 3 * number : 6 + 3 * number] for number in range(5)]
    assert all(sorted(one) == [1, 2, 4] for one in rounds) and len({tuple(one) for one in rounds}) > 1
    figure = found.figure(goal=SURPRISE, seed=0)
    assert figure.estimate.value == pytest.approx(1.5) and figure.met is False
    assert Growth("x", [1, 2], np.array([[1.0, 2.0]])).figure(goal=SURPRISE, seed=0).met is True


@pytest.mark.parametrize(
    ("goal", "value", "low", "high", "verdict"),
    [
        (Goal(1.5), 1.6, 1.55, 1.7, "met"),
        (Goal(1.5), 1.6, 1.4, 1.7, "met, not by the whole interval"),
        (Goal(1.5), 1.6, None, None, "met"),
        (Goal(1.5), 1.4, 1.3, 1.6, "not met"),
        (Goal(0.5, at_least=False), 0.4, 0.3, 0.49, "met"),
        (Goal(0.5, at_least=False), 0.4, 0.3, 0.6, "met, not by the whole interval"),
        (Goal(0.5, at_least=False), 0.6, 0.4, 0.7, "not met"),
        (Goal(1.5), math.nan, None, None, "not met"),
    ],
)
def test_a_verdict(goal: Goal, value: float, low: float | None, high: float | None, verdict: str) -> None:
    assert Figure("f", Estimate(value, low, high), goal=goal).verdict == verdict
