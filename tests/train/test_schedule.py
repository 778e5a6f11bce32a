"""Schedules against values worked out by hand."""

import math

import pytest

from train.schedule import SCHEDULES, factor


def values(schedule: str, **options: float) -> list[float]:
    return [factor(step, schedule=schedule, steps=10, **options) for step in range(10)]


def test_constant_is_one_after_warm_up() -> None:
    # warm-up of ceil(0.25 * 10) = 3 steps: 1/3, 2/3, 1
    assert values("constant", warmup_share=0.25) == pytest.approx([1 / 3, 2 / 3] + [1.0] * 8)


def test_linear_falls_in_equal_steps_towards_its_final_factor() -> None:
    # 10 steps from 1 towards 0.5: 0.05 a step, 0.55 at the last one
    assert values("linear", final_factor=0.5) == pytest.approx([1 - 0.05 * step for step in range(10)])


def test_cosine_is_half_way_down_in_the_middle() -> None:
    got = values("cosine")
    assert got[0] == 1.0
    assert got[5] == pytest.approx(0.5)
    assert got[9] == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))


def test_wsd_warms_up_stays_and_falls() -> None:
    # 2 steps of warm-up, 5 at 1, then ceil(0.3 * 10) = 3 steps: 1, 2/3, 1/3
    expected = [0.5, 1.0, 1, 1, 1, 1, 1, 1.0, 2 / 3, 1 / 3]
    assert values("wsd", warmup_share=0.2, decay_share=0.3) == pytest.approx(expected)


def test_share_of_steps_is_not_rounded_up_by_binary_noise() -> None:
    # 0.07 * 100 is 7.000000000000001 in binary; the warm-up is still 7 steps
    assert factor(6, schedule="constant", steps=100, warmup_share=0.07) == 1.0
    assert factor(5, schedule="constant", steps=100, warmup_share=0.07) == pytest.approx(6 / 7)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("warmup_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("decay_share", [0.0, 0.5, 1.0])
def test_no_step_is_outside_zero_to_one_or_wasted(
    schedule: str, steps: int, warmup_share: float, decay_share: float
) -> None:
    for step in range(steps):
        got = factor(step, schedule=schedule, steps=steps, warmup_share=warmup_share, decay_share=decay_share)
        assert 0.0 < got <= 1.0
