"""Policies position by position, and their settings."""

import pytest

from inference.lookahead import Lookahead, Visible, confidence, fixed
from inference.lookahead.confidence import ConfidenceLookahead
from inference.lookahead.fixed import FixedLookahead


def _kept(policy: Lookahead, chances: list[float]) -> int:
    """Positions kept before the first refusal."""
    count = 0
    while count < len(chances) and policy.keeps(Visible(count + 1, tuple(chances[: count + 1]))):
        count += 1
    return count


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_fixed_keeps_its_number_of_positions(tokens: int) -> None:
    assert _kept(FixedLookahead(tokens), [0.0] * 9) == tokens


def test_fixed_asks_for_no_confidence() -> None:
    assert FixedLookahead(3).keeps(Visible(3, ()))
    assert not FixedLookahead(3).needs_confidence


@pytest.mark.parametrize(
    ("chances", "kept"),
    [
        # Products 0.9, 0.72, 0.504, 0.2520: the threshold 0.5 is met three times.
        ([0.9, 0.8, 0.7, 0.5], 3),
        ([0.4, 1.0], 0),
        # Exactly the threshold is enough.
        ([0.5, 1.0, 0.99], 2),
        ([1.0] * 9, 4),
    ],
)
def test_confidence_keeps_while_the_whole_block_is_likely_to_survive(chances: list[float], kept: int) -> None:
    assert _kept(ConfidenceLookahead(4, threshold=0.5), chances) == kept


def test_confidence_must_be_told_chances() -> None:
    assert ConfidenceLookahead(4, threshold=0.5).needs_confidence


def test_policies_are_built_with_the_length_chosen_for_a_draft() -> None:
    assert fixed.Config(tokens=0).build(6).max_tokens == 6
    built = confidence.Config(threshold=0.3).build(2)
    assert (built.max_tokens, built.threshold) == (2, 0.3)


def test_outcomes_change_nothing() -> None:
    for policy in (FixedLookahead(2), ConfidenceLookahead(2, threshold=0.5)):
        before = dict(vars(policy))
        policy.observe(2, 0)
        assert vars(policy) == before


@pytest.mark.parametrize("module", [fixed, confidence])
def test_kinds_are_their_modules_names(module: object) -> None:
    config = module.Config()  # type: ignore[attr-defined]
    assert module.__name__.endswith("." + config.kind)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": -1}, "lookahead.tokens is -1; use 0 for the automatic choice"),
        ({"longest_auto": 0}, "lookahead.longest_auto is 0; use at least 1"),
        ({"siblings_auto": -1}, "lookahead.siblings and lookahead.siblings_auto count tokens"),
        ({"tokens": 2, "siblings": [1, -1]}, "lookahead.siblings and lookahead.siblings_auto count tokens"),
        ({"tokens": 0, "siblings": [1]}, "set lookahead.tokens as well"),
    ],
)
def test_lengths_out_of_range_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed.Config(**values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        confidence.Config(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_must_be_a_probability(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"lookahead.threshold is .*; use a probability in \[0, 1\]"):
        confidence.Config(threshold=threshold)
