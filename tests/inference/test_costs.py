"""Seconds of a round from its pieces."""

import pytest

from inference.costs import RoundCosts, interpolated

COSTS = RoundCosts({1: 10.0, 4: 16.0, 8: 40.0}, block_seconds=3.0, token_seconds=0.5)


@pytest.mark.parametrize(
    ("width", "seconds"),
    # In a straight line between measured widths, and on beyond the widest; a pass is never narrower than one token.
    [(1, 10.0), (0, 10.0), (2, 12.0), (4, 16.0), (6, 28.0), (10, 52.0)],
)
def test_widths_between_are_linear(width: int, seconds: float) -> None:
    assert interpolated({1: 10.0, 4: 16.0, 8: 40.0}, width) == pytest.approx(seconds)


def test_one_width_stands_for_all() -> None:
    assert interpolated({1: 7.0}, 32) == 7.0


@pytest.mark.parametrize(
    ("tokens", "siblings", "seconds"),
    [
        # Nothing proposed: no drafting.
        (0, (2, 1), 10.0),
        (1, (), 3.5 + 12.0),
        # The siblings of the first two positions: 1 + 2 + 2 + 1 = 6 tokens in the pass.
        (2, (2, 1, 9), 4.0 + 28.0),
    ],
)
def test_a_round_is_drafting_and_a_pass(tokens: int, siblings: tuple[int, ...], seconds: float) -> None:
    assert COSTS.seconds(tokens, siblings) == pytest.approx(seconds)


def test_costs_survive_json() -> None:
    assert RoundCosts.from_json(COSTS.to_json(), where="pair.json") == COSTS
