"""The margin estimator against a direct fit of the same data, and how it forgets."""

import numpy as np
import pytest
from scipy.optimize import minimize

from inference.margin import MarginEstimator

Data = list[tuple[float, bool]]


def _data(seed: int, count: int, *, intercept: float, slope: float) -> Data:
    """Margins and verdicts with chance = sigmoid(intercept + slope * margin)."""
    rng = np.random.default_rng(seed)
    margins = rng.exponential(3.0, count)
    survived = rng.random(count) < 1.0 / (1.0 + np.exp(-(intercept + slope * margins)))
    return list(zip(margins.tolist(), survived.tolist(), strict=True))


def _fed(data: Data, *, position: int = 1, **settings: int) -> MarginEstimator:
    estimator = MarginEstimator(**settings)
    for margin, survived in data:
        estimator.add(position, margin, survived)
    return estimator


def _direct_fit(data: Data) -> np.ndarray:
    """(b, w) of greatest penalised likelihood on the raw margins."""
    margins, survived = (np.array(column) for column in zip(*data, strict=True))
    signs = np.where(survived, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> float:
        logits = parameters[0] + parameters[1] * margins
        return float(np.logaddexp(0.0, -signs * logits).sum() + 0.5e-3 * (parameters @ parameters))

    found: np.ndarray = minimize(loss, np.zeros(2), method="BFGS").x
    return found


@pytest.mark.parametrize("truth", [(-1.0, 0.8), (0.5, 0.2), (-3.0, 1.5)])
def test_newton_on_the_histogram_agrees_with_a_direct_fit(truth: tuple[float, float]) -> None:
    # Refits come at 50, 150, ..., 1550 observations: the last of them has seen all the data.
    data = _data(0, 1550, intercept=truth[0], slope=truth[1])
    assert _fed(data).parameters(1) == pytest.approx(_direct_fit(data), abs=1e-2)


def test_the_first_fit_is_already_the_best_one() -> None:
    data = _data(1, 50, intercept=-1.0, slope=0.8)
    assert _fed(data).parameters(1) == pytest.approx(_direct_fit(data), abs=2e-2)


def test_nothing_is_trusted_before_the_least_number_of_observations() -> None:
    data = _data(2, 50, intercept=0.0, slope=0.5)
    assert MarginEstimator().chance(1, 2.0) is None
    assert _fed(data[:49]).chance(1, 2.0) is None
    assert _fed(data).chance(1, 2.0) is not None


def test_refits_come_at_their_time() -> None:
    data = _data(3, 250, intercept=0.0, slope=0.5)
    fits = [_fed(data[:count]).parameters(1) for count in (50, 149, 150, 249, 250)]
    assert fits[0] == fits[1] != fits[2] == fits[3] != fits[4]


def test_chances_follow_the_curve_and_margins_are_clipped() -> None:
    estimator = _fed(_data(4, 1000, intercept=-1.0, slope=0.6))
    parameters = estimator.parameters(1)
    assert parameters is not None
    intercept, slope = parameters
    assert estimator.chance(1, 2.0) == pytest.approx(1.0 / (1.0 + np.exp(-(intercept + 2.0 * slope))))
    assert estimator.chance(1, 99.0) == estimator.chance(1, 30.0)
    assert estimator.chance(1, -1.0) == estimator.chance(1, 0.0)
    # What is learnt is clipped to the same ends.
    ends = [_fed([(margin, True)] * 60).parameters(1) for margin in (30.0, 1e9)]
    assert ends[0] == ends[1]


def test_positions_have_their_own_curves_and_the_last_serves_those_beyond() -> None:
    estimator = MarginEstimator()
    for position, intercept in ((1, 1.0), (2, -1.0)):
        for margin, survived in _data(position, 500, intercept=intercept, slope=0.3):
            estimator.add(position, margin, survived)
    first, second = estimator.chance(1, 2.0), estimator.chance(2, 2.0)
    assert first is not None and second is not None and first > second + 0.2
    assert estimator.chance(3, 2.0) == estimator.chance(9, 2.0) == second


def test_a_position_with_too_few_observations_asks_for_more() -> None:
    estimator = _fed(_data(5, 500, intercept=0.0, slope=0.3))
    assert estimator.chance(2, 2.0) == estimator.chance(1, 2.0)
    estimator.add(2, 2.0, True)
    assert estimator.chance(2, 2.0) is None
    assert estimator.chance(3, 2.0) == estimator.chance(1, 2.0)


def test_what_left_the_window_is_forgotten() -> None:
    # Whole chunks before, then exactly a window: nothing of the first part is left, and both have the same counts.
    # Refits come half a chunk after a chunk is full, so one more half goes to both.
    before = _data(6, 3000, intercept=3.0, slope=0.0)
    after = _data(7, 2050, intercept=-1.0, slope=0.5)
    assert _fed(before + after).parameters(1) == pytest.approx(_fed(after).parameters(1), abs=1e-6)


def test_a_change_of_acceptance_is_followed() -> None:
    # At a margin of 2: sigmoid(-1 + 0.5 * 2) = 0.5 before, sigmoid(-3 + 0.5 * 2) = 0.119 after.
    before = _data(8, 4000, intercept=-1.0, slope=0.5)
    after = _data(9, 2000, intercept=-3.0, slope=0.5)
    assert _fed(before).chance(1, 2.0) == pytest.approx(0.5, abs=0.04)
    assert _fed(before + after).chance(1, 2.0) == pytest.approx(0.119, abs=0.03)
    # One that never forgets is still far off.
    remembering = _fed(before + after, window=10000).chance(1, 2.0)
    assert remembering is not None and remembering > 0.3


def test_a_saturated_curve_comes_back() -> None:
    # After 2000 acceptances the likelihood is flat: a full Newton step from there overshoots to the other end.
    margin = 5.05  # the centre of its bin of width 0.1
    data = [(margin, True)] * 2000 + [(margin, False)] * 2000
    assert _fed(data[:2000]).chance(1, margin) == pytest.approx(1.0, abs=1e-3)
    # The refit at 2050 sees 50 rejections among 1950 observations, that at 2150 sees 150.
    assert _fed(data[:2050]).chance(1, margin) == pytest.approx(1900 / 1950, abs=1e-4)
    assert _fed(data[:2150]).chance(1, margin) == pytest.approx(1800 / 1950, abs=1e-4)
    assert _fed(data).chance(1, margin) == pytest.approx(0.0, abs=0.03)


def test_memory_is_bounded() -> None:
    estimator = _fed(_data(10, 5000, intercept=0.0, slope=0.1))
    [curve] = estimator._curves.values()
    assert len(curve.chunks) + 1 == 20
    assert curve.counts.sum() == 2000
    assert (curve.counts == sum(curve.chunks) + curve.open).all()


def test_the_same_observations_give_the_same_curve() -> None:
    data = _data(11, 700, intercept=0.0, slope=0.4)
    assert _fed(data).parameters(1) == _fed(data).parameters(1)


@pytest.mark.parametrize(
    "settings",
    [{"window": 50}, {"window": 150}, {"refit_every": 0}, {"least": 0}, {"window": 100, "least": 101}],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="use a window that is a multiple of refit_every"):
        MarginEstimator(**settings)
