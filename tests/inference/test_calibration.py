"""Calibration against data whose miscalibration is known, plain recounts, and what censoring must not do."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from inference import reliability as module
from inference.calibration import (
    GRID,
    Calibration,
    CalibrationRound,
    expected_calibration_error,
    fit_calibration,
)
from inference.errors import InputError
from inference.margin import MarginEstimator
from inference.reliability import (
    BetterSource,
    CalibrationReport,
    auc,
    better_source,
    fit_margin,
    reliability,
    report,
)
from inference.statistics import Array

NAN = math.nan


def _sigmoid(x: Array) -> Array:
    chances: Array = 1.0 / (1.0 + np.exp(-x))
    return chances


def _rounds(
    seed: int,
    *,
    temperatures: tuple[float, ...] = (2.0, 2.0, 2.0),
    prompts: int = 120,
    each: int = 100,
    bias: float = 3.0,
    confidence_knows: bool = True,
) -> list[CalibrationRound]:
    """Rounds with true logit of survival = logit(c_k) / T_k = 2 * margin_k - 4, independent over positions.

    Confidences that do not know are drawn from the same law, but apart from what happened.
    """
    rng = np.random.default_rng(seed)
    shape = (prompts * each, len(temperatures))
    stated, apart = rng.normal(bias, 2.0, shape), rng.normal(bias, 2.0, shape)
    survived = rng.random(shape) < _sigmoid(stated / np.array(temperatures))
    confidences = _sigmoid(stated if confidence_knows else apart)
    margins = np.clip((stated / np.array(temperatures) + 4.0) / 2.0, 0.0, 30.0)
    return [
        CalibrationRound(f"{seed}/{i // each}", tuple(c.tolist()), tuple(m.tolist()), int(s.cumprod().sum()))
        for i, (c, m, s) in enumerate(zip(confidences, margins, survived, strict=True))
    ]


@pytest.fixture(scope="module")
def measured() -> CalibrationReport:
    return report(_rounds(1), _rounds(2), resamples=200)


# Calibration


def test_a_temperature_divides_the_logit() -> None:
    calibration = Calibration((2.0, 1.0))
    # logit(0.9) = log 9; half of it is log 3, and sigmoid(log 3) = 3 / 4.
    assert calibration.apply(1, 0.9) == pytest.approx(0.75)
    assert calibration.apply(2, 0.9) == pytest.approx(0.9)
    assert calibration.apply(7, 0.9) == pytest.approx(0.9), "positions beyond the last use the last"


def test_certainty_is_clipped() -> None:
    # sigmoid(log(1e6 - 1) / 2) = 1 / (1 + 1 / sqrt(999999)).
    assert Calibration((2.0,)).apply(1, 1.0) == pytest.approx(1.0 / (1.0 + 999999**-0.5))
    assert Calibration((2.0,)).apply(1, 0.0) == pytest.approx(1.0 / (1.0 + 999999**0.5))
    assert Calibration((1e-9,)).apply(1, 0.0) == 0.0, "no overflow at an extreme temperature"


def test_a_calibration_survives_json() -> None:
    calibration = Calibration((1.5, 0.3, 1.0))
    assert Calibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1.0], r'no list of numbers under "temperatures" \[c.json\]: fit the calibration again'),
        ({}, 'no list of numbers under "temperatures"'),
        ({"temperatures": "1"}, 'no list of numbers under "temperatures"'),
        ({"temperatures": [1.0, "2"]}, 'no list of numbers under "temperatures"'),
        ({"temperatures": [True]}, 'no list of numbers under "temperatures"'),
        ({"temperatures": []}, "use at least one"),
        ({"temperatures": [1.0, 0.0]}, r"temperatures are \[1.0, 0.0\]; .* finite and positive \[c.json\]: fit"),
        ({"temperatures": [-1]}, "finite and positive"),
        ({"temperatures": [NAN]}, "finite and positive"),
        ({"temperatures": [math.inf]}, "finite and positive"),
        ({"temperatures": [10**400]}, "not a calibration: int too large"),
    ],
)
def test_what_is_no_calibration_is_refused(data: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Calibration.from_json(data, where="c.json")


@pytest.mark.parametrize(
    ("margins", "accepted"), [((NAN,), 1), ((NAN, NAN), 3), ((NAN, NAN), -1)], ids=["margins", "above", "below"]
)
def test_a_round_that_cannot_be_is_refused(margins: tuple[float, ...], accepted: int) -> None:
    with pytest.raises(ValueError, match="give one margin per confidence"):
        CalibrationRound("p", (0.5, 0.5), margins, accepted)


# Fit


def test_the_fit_finds_the_temperature_of_every_position() -> None:
    # The grid is 5.5 % fine.
    truth = (2.0, 1.0, 0.5)
    fitted = fit_calibration(_rounds(3, temperatures=truth)).temperatures
    assert fitted == pytest.approx(truth, rel=0.15)


def test_the_fit_is_the_search_it_says() -> None:
    rounds, grid = _rounds(4, prompts=20, each=30), (0.5, 1.0, 2.0, 4.0)
    chosen: list[float] = []
    for k in range(3):
        errors = {}
        for temperature in grid:
            tried = Calibration((*chosen, temperature))
            products = [math.prod(tried.apply(i + 1, c) for i, c in enumerate(r.confidences[: k + 1])) for r in rounds]
            stood = np.array([r.num_accepted > k for r in rounds])
            errors[temperature] = expected_calibration_error(np.array(products), stood)
        chosen.append(min(errors, key=lambda t: errors[t]))
    assert fit_calibration(rounds, grid=grid).temperatures == tuple(chosen)


@pytest.mark.parametrize(
    ("least", "temperatures"),
    [
        # log 9 / 2 = log 3: at temperature 2 a stated 0.9 means 0.75, and at 5, the end of the grid, 0.61.
        (270, (2.0, 1.0, 5.0)),
        (271, (2.0, 1.0, 1.0)),
        (301, (2.0, 2.0, 2.0)),
        (401, (1.0, 1.0, 1.0)),
    ],
)
def test_a_position_seldom_reached_keeps_the_temperature_before_it(least: int, temperatures: tuple[float, ...]) -> None:
    # All 400 rounds propose three tokens. 300 of 400 first tokens stand, 270 of 300 second ones, 135 of 270 third ones.
    accepted = [0] * 100 + [1] * 30 + [2] * 135 + [3] * 135
    rounds = [CalibrationRound(str(i), (0.9,) * 3, (NAN,) * 3, a) for i, a in enumerate(accepted)]
    assert fit_calibration(rounds, least=least).temperatures == pytest.approx(temperatures, rel=0.03)


def test_where_every_temperature_is_as_good_it_stays_1() -> None:
    # The logit of 0.5 is 0 at every temperature.
    rounds = [CalibrationRound(str(i), (0.5,), (NAN,), i % 3 == 0) for i in range(90)]
    assert fit_calibration(rounds).temperatures == pytest.approx((1.0,))
    assert min(GRID, key=lambda t: abs(t - 1.0)) == pytest.approx(1.0)


def test_without_rounds_nothing_is_changed() -> None:
    assert fit_calibration([]) == Calibration((1.0,))


# Figures


def test_the_calibration_error_by_hand() -> None:
    # Halves: mean 0.15 against 0.5, mean 0.85 against 1; 0.5 * 0.35 + 0.5 * 0.15 = 0.25.
    predicted, observed = np.array([0.9, 0.1, 0.8, 0.2]), np.array([1, 0, 1, 1])
    assert expected_calibration_error(predicted, observed, bins=2) == pytest.approx(0.25)
    low, high = reliability(predicted, observed, bins=2)
    assert low == pytest.approx((0.15, 0.5, 2)) and high == pytest.approx((0.85, 1.0, 2))


def test_equal_predictions_share_a_bin() -> None:
    # Cut by order, zeros first, ten bins of one value would show an error of 0.5.
    predicted, observed = np.full(40, 0.5), np.repeat([0, 1], 20)
    assert expected_calibration_error(predicted, observed) == 0.0
    assert reliability(predicted, observed) == [(0.5, 0.5, 40)]


def test_no_data_have_no_calibration_error() -> None:
    assert math.isnan(expected_calibration_error(np.zeros(0), np.zeros(0)))
    assert reliability(np.zeros(0), np.zeros(0)) == []


def test_a_perfect_predictor_has_almost_no_calibration_error() -> None:
    # Noise: 0.8 * sqrt(10 bins * mean of p(1 - p) = 1/6 / 40000) = 0.005.
    rng = np.random.default_rng(5)
    predicted = rng.random(40000)
    observed = rng.random(40000) < predicted
    assert expected_calibration_error(predicted, observed) == pytest.approx(0.005, abs=0.003)
    # Half as sure as it should be, everywhere: mean |p - p/2| = 1/4.
    assert expected_calibration_error(predicted / 2.0, observed) == pytest.approx(0.25, abs=0.01)


def _auc_by_pairs(scores: list[float], labels: list[bool]) -> float:
    pairs = list(
        itertools.product(
            [s for s, label in zip(scores, labels, strict=True) if label],
            [s for s, label in zip(scores, labels, strict=True) if not label],
        )
    )
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_auc_equals_the_count_of_pairs(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(levels)
    scores = rng.integers(levels, size=300) / levels
    labels = rng.random(300) < 0.2 + 0.6 * scores
    expected = _auc_by_pairs(scores.tolist(), labels.tolist())
    assert auc(scores, labels) == pytest.approx(expected, abs=1e-12)
    # The way of the bootstrap, pairs by prompts, in slices of levels, agrees.
    monkeypatch.setattr(module, "_LEVELS", 7)
    wins = module._wins(scores, labels, rng.integers(9, size=300), 9)
    assert wins.sum() / (labels.sum() * (~labels).sum()) == pytest.approx(expected, abs=1e-12)


def test_auc_needs_both_classes() -> None:
    assert math.isnan(auc(np.array([0.1, 0.2]), np.array([1, 1])))
    assert math.isnan(auc(np.array([0.1, 0.2]), np.array([0, 0])))
    assert auc(np.array([0.1, 0.2]), np.array([0, 1])) == 1.0


# Report


def test_known_miscalibration_is_found_and_mended(measured: CalibrationReport) -> None:
    assert measured.calibration.temperatures == pytest.approx((2.0, 2.0, 2.0), rel=0.15)
    for position in measured.positions:
        assert position.error_before.surely_above(0.05), position
        assert position.error_after.value < 0.02, position
        assert position.error_after.surely_below(0.03), position


def test_the_report_counts_what_was_seen(measured: CalibrationReport) -> None:
    test = _rounds(2)
    assert [p.position for p in measured.positions] == [1, 2, 3]
    for k, position in enumerate(measured.positions):
        assert position.proposed == len(test) == sum(b.num_outcomes for b in position.before)
        assert position.observations == sum(r.num_accepted >= k for r in test)
        assert [b.num_outcomes for b in position.after] == [1200] * 10


def test_figures_of_a_position_equal_the_plain_ones(measured: CalibrationReport) -> None:
    test, k = _rounds(2), 1
    reached = [r for r in test if r.num_accepted >= k]
    labels = np.array([r.num_accepted > k for r in reached])
    stood = np.array([r.num_accepted > k for r in test])
    products = np.array([math.prod(r.confidences[: k + 1]) for r in test])
    assert measured.positions[k].auc.value == pytest.approx(auc(np.array([r.confidences[k] for r in reached]), labels))
    assert measured.positions[k].error_before.value == pytest.approx(expected_calibration_error(products, stood))
    # Margins are a rising function of the truth here: the estimator's order is theirs, and the confidence's.
    assert measured.positions[k].margin_auc.value == pytest.approx(measured.positions[k].auc.value, abs=1e-6)


def test_the_fit_never_sees_the_test() -> None:
    fit = _rounds(6, prompts=20)
    worse = _rounds(7, prompts=20, temperatures=(4.0, 4.0, 4.0))
    assert report(fit, worse, resamples=2).calibration == fit_calibration(fit)
    with pytest.raises(ValueError, match="20 prompts are in the fit and in the test; split the rounds by prompt"):
        report(fit, fit)


def _separated(seed: int) -> list[CalibrationRound]:
    """One position; logits are normal around 1 for survivors, around 0 for the others."""
    rng = np.random.default_rng(seed)
    stood = rng.random(400) < 0.5
    chances = _sigmoid(rng.normal(stood.astype(float), 1.0))
    return [
        CalibrationRound(str(i % 40), (float(c),), (NAN,), int(s))
        for i, (c, s) in enumerate(zip(chances, stood, strict=True))
    ]


def test_the_interval_of_auc_contains_the_truth() -> None:
    # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2) = 0.7602. Of 30 intervals 28.5 should contain it; fewer than 25 would
    # happen once in 65 times by chance, and the seeds are fixed.
    truth = 0.5 * (1.0 + math.erf(0.5))
    found = [report([], _separated(seed), resamples=300).positions[0].auc for seed in range(30)]
    assert sum(not e.surely_above(truth) and not e.surely_below(truth) for e in found) >= 25
    # Not by being wide: the standard error of AUC is at most sqrt(AUC (1 - AUC) / 200) = 0.030, two on either side.
    assert all(e.high is not None and e.low is not None and e.high - e.low < 4 * 0.030 for e in found)


def test_rounds_of_one_prompt_are_one_cluster() -> None:
    # Ten copies of every round say nothing new. Intervals over rounds would shrink by the root of ten.
    rounds = _separated(0)
    [once], [often] = (report([], many, resamples=100).positions for many in (rounds, rounds * 10))
    for figure in ("auc", "error_before", "error_after"):
        few, many = getattr(once, figure), getattr(often, figure)
        assert (many.value, many.low, many.high) == pytest.approx((few.value, few.low, few.high)), figure


def test_one_prompt_has_no_interval() -> None:
    [position] = report([], [replace(r, prompt="p") for r in _separated(0)]).positions
    assert position.auc.low is None and position.error_after.high is None


# Censoring


class _AllObserved(module.Table):
    """The mistake: positions behind the first rejection count as failures."""

    def __init__(self, rounds: list[CalibrationRound]) -> None:
        super().__init__(rounds)
        self.observed = self.proposed


def _half_censored(seed: int) -> list[CalibrationRound]:
    """Token 1 stands half the time, whatever c_1; token 2 stands with the chance c_2 = 0.2 or 0.8; margins likewise."""
    rng = np.random.default_rng(seed)
    rounds = []
    for i in range(6000):
        high, first, luck = rng.random() < 0.5, rng.random() < 0.5, rng.random()
        chance = 0.8 if high else 0.2
        rounds.append(
            CalibrationRound(
                f"{seed}/{i % 50}", (0.5, chance), (NAN, 4.0 if high else 1.0), first + (first and luck < chance)
            )
        )
    return rounds


def _second(fit: list[CalibrationRound], test: list[CalibrationRound]) -> tuple[float, float]:
    """AUC at position 2, and the log loss of its calibrated confidences there."""
    found = report(fit, test, resamples=50)
    return found.positions[1].auc.value, found.source.confidence_loss


def test_what_was_not_observed_is_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, test = _half_censored(0), _half_censored(1)
    # Survivors have c_2 = 0.8 with odds 4 : 1, the others with odds 1 : 4: AUC = 0.64 + (0.16 + 0.16) / 2 = 0.8.
    # Log loss of a true 0.8: -0.8 log 0.8 - 0.2 log 0.2 = 0.5004.
    right = pytest.approx((0.8, 0.5004), abs=0.02)
    assert _second(fit, test) == right
    # The mutant adds as many failures as there are verdicts, censored ones that have either c_2 in equal numbers:
    # of ten verdicts five are failures, one with the higher c_2; of fifteen failures now 1 + 5 have it, a share of 0.4.
    # AUC = 0.8 * 0.6 + (0.8 * 0.4 + 0.2 * 0.6) / 2 = 0.7; the loss is paid for tokens that nobody judged.
    monkeypatch.setattr(module, "Table", _AllObserved)
    wrong_auc, wrong_loss = _second(fit, test)
    assert (wrong_auc, wrong_loss) != right
    assert wrong_auc == pytest.approx(0.7, abs=0.02)
    assert wrong_loss > 0.6


def test_the_margin_learns_from_verdicts_only() -> None:
    estimator, mutant = fit_margin(_half_censored(0)), MarginEstimator()
    for r in _half_censored(0):
        mutant.add(2, r.margins[1], survived=r.num_accepted >= 2)
    for margin, truth in ((1.0, 0.2), (4.0, 0.8)):
        assert estimator.chance(2, margin) == pytest.approx(truth, abs=0.05)
        # Half of the tokens 2 stand behind a rejected token 1: the mutant learns half the chance.
        assert mutant.chance(2, margin) == pytest.approx(truth / 2.0, abs=0.05)
    assert estimator.chance(1, 4.0) is None, "position 1 has no margins at all"


def test_prefix_survival_is_known_for_every_proposed_position() -> None:
    # The product 0.5 * c_2 is exact. Judged on the observed rounds alone it would be 0.25 too low on average.
    second = report([], _half_censored(1), resamples=50).positions[1]
    assert second.proposed == 6000 and second.observations == pytest.approx(3000, rel=0.05)
    assert second.error_before.value < 0.01


# Source


def test_confidence_stays_where_the_margin_knows_no_better() -> None:
    # Nothing beats the truth, which is the stated confidence at temperature 2; the margin knows it as well, but has
    # learnt its two parameters from 2000 observations. Either loss is therefore about the same.
    fit, test = _rounds(1), _rounds(2)
    found = better_source(Calibration((2.0,)), fit_margin(fit), test, resamples=200)
    assert found.source == "confidence"
    assert found.difference.value == pytest.approx(0.0, abs=0.002)
    assert found.difference.value == pytest.approx(found.confidence_loss - found.margin_loss)
    # Three positions, each with the verdicts of the rounds whose earlier tokens stood.
    assert found.observations == sum(min(r.num_accepted + 1, 3) for r in test)


def test_margin_wins_where_it_surely_predicts_better() -> None:
    fit, test = _rounds(8, confidence_knows=False, prompts=40), _rounds(9, confidence_knows=False, prompts=40)
    found = report(fit, test, resamples=200).source
    assert found.source == "margin"
    assert found.difference.surely_above(0.05)


def test_margin_loses_where_it_says_nothing() -> None:
    fit, test = _rounds(8, prompts=40), _rounds(9, prompts=40)
    shuffled = np.random.default_rng(0).permutation(len(test))
    strange = [replace(r, margins=test[i].margins) for r, i in zip(test, shuffled, strict=True)]
    found = better_source(fit_calibration(fit), fit_margin(fit), strange, resamples=200)
    assert found.source == "confidence"
    assert found.difference.surely_below(0.0)


def test_in_doubt_confidence_stays() -> None:
    # One prompt has no interval, however far the margin is ahead.
    fit, test = _rounds(8, confidence_knows=False, prompts=40), _rounds(9, confidence_knows=False, prompts=1)
    found = better_source(fit_calibration(fit), fit_margin(fit), test)
    assert found.difference.value > 0.05
    assert found.source == "confidence"


@pytest.mark.parametrize("rounds", [[], [CalibrationRound("p", (0.5,), (NAN,), 1)]], ids=["none", "no margins"])
def test_without_a_comparison_confidence_stays(rounds: list[CalibrationRound]) -> None:
    found = better_source(Calibration(), MarginEstimator(), rounds)
    assert found.source == "confidence" and found.observations == 0
    assert math.isnan(found.margin_loss)
    assert isinstance(found, BetterSource)
