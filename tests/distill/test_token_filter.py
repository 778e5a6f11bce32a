"""Only the tokens where the student lags furthest behind the reference are learned from: exactly those, and no more."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from distill.conversation import Conversation, Sample
from distill.distillation import Distillation, capture_states
from distill.objectives import cross_entropy, forward_kl
from distill.token_filter import kept_count, largest
from inference.errors import InputError
from inference.model import CausalModel
from tests.inference.families import VOCAB, family_model


def _model(*, seed: int, layers: int = 1) -> CausalModel:
    model = family_model("llama", seed=seed, num_hidden_layers=layers, initializer_range=0.15)
    return CausalModel(model.model.float())


@pytest.fixture(scope="module")
def target() -> CausalModel:
    return _model(seed=0, layers=2)


def _samples(target: CausalModel) -> list[Conversation]:
    generator = torch.Generator().manual_seed(0)
    return capture_states(
        target,
        [
            Sample(
                id=f"p{index}",
                domain="chat",
                source="made",
                split="train" if index < 6 else "validation",
                tokens=torch.randint(VOCAB, (12 + index,), generator=generator),
                mask=torch.arange(12 + index) >= 4,
                states=None,
                text="",
            )
            for index in range(8)
        ],
    )


def _distillation(
    target: CausalModel, *, keep_share: float, reference: CausalModel | None, chunk_tokens: int = 7
) -> Distillation:
    return Distillation(
        _model(seed=1),
        target,
        _samples(target),
        objective=forward_kl.Config().build(),
        sequences_per_step=3,
        max_tokens=64,
        chunk_tokens=chunk_tokens,
        seed=0,
        keep_share=keep_share,
        reference=reference,
    )


def _divergences(task: Distillation, model: CausalModel, batch: dict[str, Tensor]) -> Tensor:
    """KL from the target at each supervised token, row by row, by plain formulas."""
    found = []
    for row in range(batch["tokens"].shape[0]):
        tokens = batch["tokens"][row : row + 1, : int(batch["attention"][row].sum())]
        logits = model.model(input_ids=tokens, use_cache=False).logits[0]
        mine = batch["rows"] == row
        p = task.target.head(batch["target_states"][mine].float()).softmax(-1)
        q = logits[batch["columns"][mine]].softmax(-1)
        found.append((p * (p / q).log()).sum(-1))
    return torch.cat(found)


@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
def test_the_loss_is_that_of_the_tokens_with_the_largest_gap(target: CausalModel, share: float) -> None:
    reference = _model(seed=2)
    task = _distillation(target, keep_share=share, reference=reference)
    for step in range(3):
        batch = task.batch(step, 0)
        with torch.no_grad():
            mine, theirs = (_divergences(task, model, batch) for model in (task.student, reference))
        count = math.ceil(share * len(mine))
        best = sorted(range(len(mine)), key=lambda i: -float(mine[i] - theirs[i]))[:count]
        sums = task.loss(batch)
        assert sums.tokens == count
        assert float(sums.loss.detach()) == pytest.approx(sum(float(mine[i]) for i in best), rel=1e-4)


def test_tokens_chosen_in_another_way_give_another_loss(target: CausalModel) -> None:
    """What the test above would not notice, it should not pass: by the student's own divergence, or at random."""
    reference = _model(seed=2)
    task = _distillation(target, keep_share=0.4, reference=reference)
    batch = task.batch(0, 0)
    with torch.no_grad():
        mine, theirs = (_divergences(task, model, batch) for model in (task.student, reference))
    by_gap = largest(mine - theirs, 0.4)
    at_random = torch.randperm(len(mine), generator=torch.Generator().manual_seed(0))[: len(by_gap)]
    expected = float(task.loss(batch).loss.detach())
    assert float(mine[by_gap].sum()) == pytest.approx(expected, rel=1e-4)
    for other in (largest(mine, 0.4), at_random):
        assert float(mine[other].sum()) != pytest.approx(expected, rel=1e-2)


def test_chunks_change_nothing(target: CausalModel) -> None:
    reference = _model(seed=2)
    whole, pieces = (_distillation(target, keep_share=0.3, reference=reference, chunk_tokens=size) for size in (500, 3))
    losses = [float(task.loss(task.batch(0, 0)).loss.detach()) for task in (whole, pieces)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_only_the_student_learns_and_only_from_what_is_kept(target: CausalModel) -> None:
    reference = _model(seed=2)
    task = _distillation(target, keep_share=0.25, reference=reference)
    batch = task.batch(0, 0)
    task.loss(batch).loss.backward()
    assert all(p.grad is None for model in (target, reference) for p in model.model.parameters())
    got = [p.grad.clone() for p in task.student.model.parameters() if p.grad is not None]
    kept = task._kept(batch, task.student.states(batch["tokens"])[batch["rows"], batch["columns"]], 0.25)
    cut = {
        name: batch[name][kept] if name in ("rows", "columns", "labels", "target_states") else batch[name]
        for name in batch
    }
    task.student.model.zero_grad()
    plain = _distillation(target, keep_share=1.0, reference=None)
    plain.student = task.student
    plain.loss(cut).loss.backward()
    for one, p in zip(got, task.student.model.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(one, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.01, 0.1, 1 / 3, 0.5, 0.999, 1.0])
def test_the_weight_is_known_before_any_model_runs(target: CausalModel, share: float) -> None:
    task = _distillation(target, keep_share=share, reference=_model(seed=2))
    for step in range(4):
        batch = task.batch(step, 0)
        assert task.weight(batch) == task.loss(batch).tokens


@pytest.mark.parametrize(
    ("count", "share", "kept"), [(10, 0.25, 3), (100, 0.07, 7), (1, 0.01, 1), (30, 0.1, 3), (9, 1.0, 9), (0, 0.5, 0)]
)
def test_the_share_is_rounded_up(count: int, share: float, kept: int) -> None:
    assert kept_count(count, share) == kept
    assert len(largest(torch.zeros(count), share)) == kept


def test_of_equal_gaps_the_earlier_ones_are_kept_in_order() -> None:
    assert largest(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0, 0.0]), 0.5).tolist() == [0, 1, 3]


def test_validation_is_of_all_tokens(target: CausalModel) -> None:
    filtered, plain = (_distillation(target, keep_share=share, reference=_model(seed=2)) for share in (0.2, 1.0))
    assert filtered.evaluate() == plain.evaluate()


def test_a_share_without_a_reference_is_refused(target: CausalModel) -> None:
    message = r"a share of 0.5 of the tokens .* \[draft.reference\]: name a trained draft"
    with pytest.raises(InputError, match=message):
        _distillation(target, keep_share=0.5, reference=None)


def test_an_objective_of_labels_may_be_filtered(target: CausalModel) -> None:
    task = _distillation(target, keep_share=0.5, reference=_model(seed=2))
    task.objective = cross_entropy.Config().build()
    batch = task.batch(0, 0)
    loss = partial(task._sums, batch)
    assert float(loss(keep_share=0.5).loss.detach()) < float(loss(keep_share=1.0).loss.detach())
