"""Verdicts by hand: what is accepted, what replaces a rejected token, and from which row the bonus comes."""

import pytest
import torch

from inference.verification import Verdict, acceptance_ratios, residual_probs, verify_greedy, verify_sampled


class Scripted:
    """A `Source` that accepts a set number of tokens and draws the most probable one, noting what it was asked."""

    def __init__(self, accept: int) -> None:
        self.accept = accept
        self.ratios: list[float] = []
        self.row: list[float] = []

    def categorical(self, probs: torch.Tensor) -> torch.Tensor:
        self.row = probs.tolist()
        return probs.argmax()

    def accepted_prefix(self, ratios: torch.Tensor) -> int:
        self.ratios = ratios.tolist()
        return self.accept


TOKENS = torch.tensor([0, 1])
DRAFT = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.8, 0.0]], dtype=torch.float64)
TARGET = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.2, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)


def _greedy(tokens: list[int], choices: list[int]) -> tuple[int, int]:
    verdict = verify_greedy(torch.tensor(tokens, dtype=torch.long), torch.tensor(choices))
    return verdict.num_accepted, int(verdict.next_token)


def test_greedy_accepts_while_the_target_agrees() -> None:
    # The target would write 2, 3, 1, 0: the third proposal differs, so two stand and the target's 1 follows.
    assert _greedy([2, 3, 0], [2, 3, 1, 0]) == (2, 1)


def test_greedy_agreement_after_a_disagreement_counts_for_nothing() -> None:
    assert _greedy([0, 3, 1], [2, 3, 1, 0]) == (0, 2)


def test_greedy_adds_the_bonus_of_the_last_row_when_all_stand() -> None:
    assert _greedy([2, 3, 1], [2, 3, 1, 0]) == (3, 0)


def test_greedy_with_nothing_proposed_is_the_targets_choice() -> None:
    assert _greedy([], [3]) == (0, 3)


def test_chances_are_target_over_draft_at_most_one() -> None:
    # 0.7 / 0.5 is cut to 1; 0.2 / 0.8 is a quarter. The bonus row has no part in it.
    assert acceptance_ratios(TOKENS, DRAFT, TARGET).tolist() == pytest.approx([1.0, 0.25])


def test_chances_of_certain_tokens_are_the_targets_own() -> None:
    assert acceptance_ratios(TOKENS, None, TARGET).tolist() == pytest.approx([0.7, 0.2])


def test_a_token_the_target_cannot_write_has_no_chance() -> None:
    target = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert acceptance_ratios(torch.tensor([0]), torch.tensor([[0.3, 0.7]]), target).tolist() == [0.0]


def test_residual_is_the_normalised_positive_difference() -> None:
    # max(p - q, 0) = (0.3, 0, 0.3) becomes (0.5, 0, 0.5).
    assert residual_probs(TARGET[1], DRAFT[1], torch.tensor(1)).tolist() == pytest.approx([0.5, 0.0, 0.5])


def test_residual_of_a_certain_draft_is_the_target_without_the_token() -> None:
    assert residual_probs(TARGET[0], None, torch.tensor(0)).tolist() == pytest.approx([0.0, 2 / 3, 1 / 3])


def test_residual_of_equal_laws_is_the_target_row() -> None:
    assert torch.equal(residual_probs(TARGET[2], TARGET[2].clone(), torch.tensor(0)), TARGET[2])


def test_residual_of_a_certain_target_and_a_certain_draft_is_the_target_row() -> None:
    row = torch.tensor([0.0, 1.0, 0.0])
    assert torch.equal(residual_probs(row, None, torch.tensor(1)), row)


def test_residual_changes_neither_row() -> None:
    target, draft = TARGET[1].clone(), DRAFT[1].clone()
    residual_probs(target, draft, torch.tensor(1))
    residual_probs(target, None, torch.tensor(1))
    assert torch.equal(target, TARGET[1]) and torch.equal(draft, DRAFT[1])


@pytest.mark.parametrize(
    ("accept", "row"),
    [
        # Row 0: max(p - q, 0) = (0.2, 0, 0), normalised. Row 1 as above. All accepted: the bonus row as it is.
        (0, [1.0, 0.0, 0.0]),
        (1, [0.5, 0.0, 0.5]),
        (2, [0.1, 0.1, 0.8]),
    ],
)
def test_the_added_token_comes_from_its_own_row(accept: int, row: list[float]) -> None:
    source = Scripted(accept)
    verdict = verify_sampled(TOKENS, DRAFT, TARGET, generator=source)
    assert source.ratios == pytest.approx([1.0, 0.25])
    assert source.row == pytest.approx(row)
    assert verdict == Verdict(accept, verdict.next_token)


@pytest.mark.parametrize(("accept", "row"), [(0, [0.0, 2 / 3, 1 / 3]), (1, [0.625, 0.0, 0.375]), (2, [0.1, 0.1, 0.8])])
def test_point_mass_drafts_need_no_rows(accept: int, row: list[float]) -> None:
    source = Scripted(accept)
    verify_sampled(TOKENS, None, TARGET, generator=source)
    assert source.row == pytest.approx(row)


def test_nothing_proposed_draws_from_the_target_without_a_trial() -> None:
    source = Scripted(accept=99)
    verdict = verify_sampled(TOKENS[:0], None, TARGET[2:], generator=source)
    assert (verdict.num_accepted, int(verdict.next_token), source.ratios) == (0, 2, [])
