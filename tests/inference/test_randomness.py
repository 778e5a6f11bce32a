"""Draws follow the probabilities they are given, repeat with their seed, and never give a token without mass."""

import torch
from scipy import stats

from inference.randomness import TorchSource, draw


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(draw(probs.expand(20_000, 4), generator=generator), minlength=4)
    assert counts[1] == 0
    expected = [2_000, 12_000, 6_000]
    assert stats.chisquare(counts[[0, 2, 3]].tolist(), expected).pvalue > 1e-4


def test_tokens_without_mass_at_either_end_are_never_drawn() -> None:
    probs = torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert set(draw(probs.expand(1_000, 4), generator=torch.Generator().manual_seed(1)).tolist()) == {2}


def test_rows_need_not_be_normalised() -> None:
    # Mass 2 : 6 is the law 0.25 : 0.75.
    counts = torch.bincount(draw(torch.tensor([2.0, 6.0]).expand(8_000, 2), generator=torch.Generator().manual_seed(2)))
    assert stats.chisquare(counts.tolist(), [2_000, 6_000]).pvalue > 1e-4


def test_a_seed_fixes_both_kinds_of_decision() -> None:
    def decisions(seed: int) -> list[int]:
        source = TorchSource.seeded(seed)
        probs, ratios = torch.full((50,), 0.02), torch.full((4,), 0.5)
        return [v for _ in range(20) for v in (int(source.categorical(probs)), source.accepted_prefix(ratios))]

    assert decisions(3) == decisions(3)
    assert decisions(3) != decisions(4)


def test_accepted_prefix_stops_at_the_first_failure() -> None:
    source = TorchSource.seeded(0)
    assert source.accepted_prefix(torch.tensor([1.0, 1.0, 0.0, 1.0])) == 2
    assert source.accepted_prefix(torch.tensor([0.0, 1.0])) == 0
    assert source.accepted_prefix(torch.ones(3)) == 3
