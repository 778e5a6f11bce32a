"""Tests by betting: fair while the null holds, whatever one looks at, and quick when it does not."""

import math

import numpy as np
import pytest

from inference.betting import BettingTest, confidence_sequence, wealth_paths

BOUNDS = {"low": -1.0, "high": 1.0}


def fed(values: "list[float] | np.ndarray", *, null: float = 0.0, alternative: str = "greater") -> BettingTest:
    test = BettingTest(null_mean=null, alternative=alternative, **BOUNDS)
    for value in values:
        test.update(float(value))
    return test


@pytest.mark.parametrize("null", [-0.9, -0.05, 0.0, 0.4])
@pytest.mark.parametrize("alternative", ["greater", "less"])
def test_wealth_gains_nothing_on_average_under_the_null(null: float, alternative: str) -> None:
    """Every path of three two-point numbers with the null's mean, weighed by its chance: expected wealth is 1."""
    chance = (null + 1) / 2
    total = 0.0
    for path in range(8):
        values = [1.0 if path >> bit & 1 else -1.0 for bit in range(3)]
        weight = math.prod(chance if value > 0 else 1 - chance for value in values)
        total += weight * math.exp(fed(values, null=null, alternative=alternative).log_wealth)
    assert total == pytest.approx(1.0, abs=1e-12)


def test_a_mean_within_the_null_loses_on_average() -> None:
    up = math.exp(fed([1.0]).log_wealth)
    down = math.exp(fed([-1.0]).log_wealth)
    assert 0.4 * up + 0.6 * down < 1


def test_false_refutations_stay_below_alpha_with_a_look_after_every_number() -> None:
    rng = np.random.default_rng(1)
    values = np.clip(rng.standard_t(3, size=(2000, 300)) * 0.2, -1, 1)
    for alternative in ("greater", "less"):
        paths = wealth_paths(values, null_mean=0.0, alternative=alternative, **BOUNDS)
        assert (paths.max(1) >= math.log(20)).mean() <= 0.05


def test_a_bet_that_has_seen_the_number_breaks_the_bound() -> None:
    """The mutant: stakes chosen after the number is known always win."""
    rng = np.random.default_rng(1)
    values = rng.uniform(-1, 1, size=(200, 300))
    peeking = np.log1p(0.1 * np.abs(values)).cumsum(1)
    assert (peeking.max(1) >= math.log(20)).mean() > 0.9


def test_what_is_true_is_found() -> None:
    rng = np.random.default_rng(2)
    values = np.clip(rng.normal(0.1, 0.2, size=400), -1, 1)
    assert fed(values).rejected(0.05) and not fed(values, alternative="less").rejected(0.05)
    assert fed(-values, alternative="less").rejected(0.05)


def test_what_was_refuted_once_stays_refuted() -> None:
    test = fed([0.9] * 30)
    assert test.rejected(0.01)
    for _ in range(200):
        test.update(-0.9)
    assert test.rejected(0.01) and test.log_wealth < 0 and test.p_value < 0.01


def test_many_runs_at_once_are_the_same_runs() -> None:
    values = np.random.default_rng(4).uniform(-1, 1, size=(3, 40))
    paths = wealth_paths(values, null_mean=0.1, alternative="greater", **BOUNDS)
    for run, row in enumerate(values):
        assert fed(row, null=0.1).log_wealth == pytest.approx(paths[run, -1], abs=1e-12)


def test_an_interval_covers_at_every_time_at_once() -> None:
    rng = np.random.default_rng(5)
    missed = 0
    for _ in range(60):
        values = rng.beta(4, 2, size=120)
        ends = [confidence_sequence(values[:n], low=0.0, high=1.0, alpha=0.1) for n in (5, 20, 60, 120)]
        missed += any(not low <= 2 / 3 <= high for low, high in ends)
    assert missed <= 12  # 6 expected at most, and three standard errors
    low, high = confidence_sequence(rng.beta(4, 2, size=2000), low=0.0, high=1.0, alpha=0.05)
    assert high - low < 0.06


def test_without_numbers_the_interval_is_everything() -> None:
    assert confidence_sequence(np.array([]), low=0.0, high=1.0, alpha=0.05) == (0.0, 1.0)


@pytest.mark.parametrize("value", [1.1, -1.1, float("nan")])
def test_what_is_out_of_bounds_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="is not between"):
        fed([value])


def test_bounds_and_alternatives_are_checked() -> None:
    with pytest.raises(ValueError, match="use a number between"):
        BettingTest(null_mean=1.0, alternative="greater", **BOUNDS)
    with pytest.raises(ValueError, match="choose greater or less"):
        BettingTest(null_mean=0.0, alternative="both", **BOUNDS)
