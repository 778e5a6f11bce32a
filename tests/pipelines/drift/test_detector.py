"""The detector of falling acceptance: fair while nothing has fallen, quick when something has."""

import json

import numpy as np
import pytest

from pipelines.drift.config import DriftConfig
from pipelines.drift.detector import EDetector
from pipelines.drift.simulate import MEAN, cusum, measure, of_tokens, ours, rates, river, table

LAMBDAS = DriftConfig().lambdas


def fresh(reference: float = 0.7, tolerance: float = 0.01) -> EDetector:
    return EDetector(reference=reference, tolerance=tolerance, lambdas=LAMBDAS)


@pytest.mark.parametrize("reference", [0.05, 0.5, 0.9, 0.999])
def test_one_step_gains_nothing_on_average_while_acceptance_stands(reference: float) -> None:
    """Two-point laws with the mean at the bound: the expected factor of every bet is exactly 1."""
    detector = fresh(reference)
    bound = detector.bound
    for low, high in ((0.0, 1.0), (bound / 2, 1.0), (0.0, (1 + bound) / 2)):
        chance = (bound - low) / (high - low)
        for bet in detector.lambdas:
            factors = {x: 1 + bet * (bound - x) for x in (low, high)}
            assert min(factors.values()) >= -1e-12
            assert chance * factors[high] + (1 - chance) * factors[low] == pytest.approx(1.0)


def test_a_mean_above_the_bound_loses() -> None:
    detector = fresh(0.7)
    assert all(1 + bet * (detector.bound - 0.75) < 1 for bet in detector.lambdas)


def test_going_on_from_json_is_going_on() -> None:
    stream = rates(np.random.default_rng(1), 400, mean=0.65)
    whole, first = fresh(), fresh()
    for rate in stream[:250]:
        first.update(float(rate))
    second = EDetector.from_json(json.loads(json.dumps(first.to_json())))
    for rate in stream[250:]:
        second.update(float(rate))
    for rate in stream:
        whole.update(float(rate))
    assert second.evidence == whole.evidence and second.count == whole.count == 400


def test_a_long_fall_stays_a_number() -> None:
    detector = fresh(0.7)
    for _ in range(6000):
        detector.update(0.1)
    detector.update(1.0)
    assert detector.statistic == detector.statistic and detector.statistic < float("inf")


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_what_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="no rate"):
        fresh().update(rate)


def test_it_runs_long_without_drift_and_not_long_with_it() -> None:
    rng = np.random.default_rng(3)
    alarm = ours(0.01)
    assert [alarm(rates(rng, 4000)) for _ in range(20)] == [None] * 20
    delays = [alarm(rates(rng, 4000, mean=MEAN - 0.10)) for _ in range(20)]
    assert all(delay is not None and delay < 200 for delay in delays)


def test_fed_single_tokens_it_would_cry_wolf() -> None:
    """The mutant: tokens of a request are no independent requests."""
    rng = np.random.default_rng(3)
    alarm = of_tokens(0.01)
    assert sum(alarm(rates(rng, 4000)) is not None for _ in range(20)) >= 5


def test_the_textbook_cusum_cries_wolf() -> None:
    rng = np.random.default_rng(3)
    alarm = cusum()
    assert sum(alarm(rates(rng, 4000)) is not None for _ in range(20)) >= 15


def test_equal_seeds_give_equal_streams_and_a_table() -> None:
    rows = [measure("ours", ours(0.01), runs=2, seed=5) for _ in range(2)]
    assert rows[0] == rows[1]
    assert "| ours |" in table(rows[:1])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from inference.errors import InputError

    monkeypatch.setitem(sys.modules, "river", None)
    with pytest.raises(InputError, match="river is not installed"):
        river("ADWIN")
