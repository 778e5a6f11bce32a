"""What the student writes itself: its own law, the same when asked again, scored by the target as the target would."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.conversation import Conversation, Sample
from distill.distillation import Distillation, capture_states
from distill.objectives import Objective, cross_entropy, forward_kl, mix
from distill.on_policy import OnPolicy
from inference.errors import InputError
from inference.model import CausalModel
from tests.inference.families import VOCAB, family_model

STOP = frozenset({5, 6})


def _model(*, seed: int, layers: int = 1, dropout: float = 0.0) -> CausalModel:
    model = family_model(
        "llama", seed=seed, num_hidden_layers=layers, initializer_range=0.15, attention_dropout=dropout
    )
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
                # Several turns: the prompt is what lies before the first.
                mask=(torch.arange(12 + index) >= 4 + index % 3) & (torch.arange(12 + index) != 9),
                states=None,
                text="",
            )
            for index in range(8)
        ],
    )


def _distillation(
    target: CausalModel,
    *,
    share: float = 1.0,
    student: CausalModel | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 8,
    max_tokens: int = 64,
    seed: int = 0,
    objective: Objective | None = None,
    stop: frozenset[int] = STOP,
) -> Distillation:
    return Distillation(
        student or _model(seed=1),
        target,
        _samples(target),
        objective=objective or forward_kl.Config().build(),
        sequences_per_step=3,
        max_tokens=max_tokens,
        chunk_tokens=7,
        seed=seed,
        on_policy=OnPolicy(share=share, max_new_tokens=max_new_tokens, temperature=temperature, stop_tokens=stop),
    )


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _written(batch: dict[str, Tensor]) -> list[list[int]]:
    """The student's tokens, row by row."""
    return [batch["labels"][batch["rows"] == row].tolist() for row in range(batch["tokens"].shape[0])]


def test_a_batch_is_the_same_when_asked_again_and_moves_with_the_weights(target: CausalModel) -> None:
    task, other = (_distillation(target) for _ in range(2))
    batch = task.batch(3, 1, accumulation=2)
    torch.manual_seed(99)
    task.batch(0, 0)
    assert _equal(batch, task.batch(3, 1, accumulation=2))
    assert _equal(batch, other.batch(7, 0))
    with torch.no_grad():
        for parameter in task.student.model.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert _written(task.batch(7, 0)) != _written(batch)
    assert _written(_distillation(target, seed=1).batch(7, 0)) != _written(batch)


def test_writing_draws_no_random_number_of_the_training(target: CausalModel) -> None:
    before = torch.get_rng_state()
    _distillation(target).batch(0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_are_those_of_the_same_samples(target: CausalModel) -> None:
    own, plain = _distillation(target), _distillation(target, share=0.0)
    batch, stored = own.batch(1, 0), plain.batch(1, 0)
    for row in range(3):
        prompt = int(stored["columns"][stored["rows"] == row][0]) + 1
        assert torch.equal(batch["tokens"][row, :prompt], stored["tokens"][row, :prompt])
        columns = batch["columns"][batch["rows"] == row].tolist()
        # Every token behind the prompt is the student's, up to its stop token or eight of them.
        assert columns == list(range(prompt - 1, int(batch["attention"][row].sum()) - 1))
        written = _written(batch)[row]
        assert 1 <= len(written) <= 8 and not STOP & set(written[:-1])
        assert len(written) == 8 or written[-1] in STOP
    assert torch.equal(batch["labels"], batch["tokens"][batch["rows"], batch["columns"] + 1])


def test_a_greedy_student_writes_its_own_argmax(target: CausalModel) -> None:
    task = _distillation(target, temperature=0.0, stop=frozenset())
    batch = task.batch(0, 0)
    for row in range(3):
        tokens = batch["tokens"][row : row + 1, : int(batch["attention"][row].sum())]
        with torch.no_grad():
            best = task.student.model(input_ids=tokens, use_cache=False).logits[0].argmax(-1)
        mine = batch["rows"] == row
        assert torch.equal(best[batch["columns"][mine]], batch["labels"][mine])


def test_what_is_written_follows_the_students_law(target: CausalModel) -> None:
    """Two thousand first tokens after six prompts against the student's own probabilities."""
    task = _distillation(target, max_new_tokens=1, stop=frozenset())
    counts, expected = torch.zeros(VOCAB), torch.zeros(VOCAB)
    for step in range(700):
        batch = task.batch(step, 0)
        with torch.no_grad():
            logits = task.student.model(input_ids=batch["tokens"], use_cache=False).logits
        expected += logits[batch["rows"], batch["columns"]].softmax(-1).sum(0)
        counts += torch.bincount(batch["labels"], minlength=VOCAB)
    # Chi-squared with 47 degrees of freedom exceeds 90 with chance 0.0002; draws are fixed, so once is for ever.
    assert float(((counts - expected) ** 2 / expected).sum()) < 90.0


def test_the_targets_states_are_those_of_a_plain_pass(target: CausalModel) -> None:
    batch = _distillation(target).batch(2, 0)
    assert not batch["target_states"].requires_grad and not batch["target_states"].is_inference()
    for row in range(3):
        tokens = batch["tokens"][row : row + 1, : int(batch["attention"][row].sum())]
        with torch.no_grad():
            logits = target.model(input_ids=tokens, use_cache=False).logits[0]
        mine = batch["rows"] == row
        torch.testing.assert_close(
            target.head(batch["target_states"][mine]), logits[batch["columns"][mine]], rtol=0.0, atol=1e-4
        )


def test_the_share_is_drawn_for_every_micro_batch_by_itself(target: CausalModel) -> None:
    half = OnPolicy(share=0.3, max_new_tokens=1, temperature=1.0, stop_tokens=STOP)
    chosen = [half.chosen(index, seed=4) for index in range(2000)]
    # Mean 600, standard deviation 20.5.
    assert abs(sum(chosen) - 600) < 80
    assert chosen == [half.chosen(index, seed=4) for index in range(2000)]
    assert chosen != [half.chosen(index, seed=5) for index in range(2000)]
    own, plain, mixed = (_distillation(target, share=share) for share in (1.0, 0.0, 0.5))
    for index in range(12):
        assert mixed.on_policy is not None
        wanted = own if mixed.on_policy.chosen(index, seed=0) else plain
        assert _equal(mixed.batch(index, 0), wanted.batch(index, 0))


def test_chosen_batches_do_not_begin_with_small_draws() -> None:
    """Choice and writing have seeds of their own: with one for both, a first draw would lie below the share."""
    rare = OnPolicy(share=0.1, max_new_tokens=1, temperature=1.0, stop_tokens=STOP)
    student = _model(seed=1)
    with torch.no_grad():
        # All tokens alike, so that a draw is told by its token: below 0.1 would be tokens 0 to 4.
        student.model.get_output_embeddings().weight.zero_()
    sample = Sample("p", "chat", "made", "train", torch.arange(8), torch.arange(8) >= 4, None, "")
    firsts = []
    for index in (index for index in range(400) if rare.chosen(index, seed=0)):
        rows, masks = rare.written(student, [sample], index, seed=0, max_tokens=32)
        firsts.append(int(rows[0][masks[0]][0]))
    assert len(firsts) > 20 and sum(first >= 5 for first in firsts) > 0.7 * len(firsts)


def test_answers_are_cut_with_their_conversations(target: CausalModel) -> None:
    task = _distillation(target, max_new_tokens=50, max_tokens=11, stop=frozenset())
    batch = task.batch(0, 0)
    assert batch["attention"].sum(1).tolist() == [11, 11, 11]
    assert batch["target_states"].shape[0] == batch["labels"].shape[0] == task.weight(batch)


def test_weight_and_loss_are_of_the_students_tokens(target: CausalModel) -> None:
    task = _distillation(target)
    batch = task.batch(0, 0)
    sums = task.loss(batch)
    assert sums.tokens == task.weight(batch) == sum(len(row) for row in _written(batch))
    loss = 0.0
    for row in range(3):
        tokens = batch["tokens"][row : row + 1, : int(batch["attention"][row].sum())]
        columns = batch["columns"][batch["rows"] == row]
        with torch.no_grad():
            p, q = (m.model(input_ids=tokens).logits[0, columns].softmax(-1) for m in (target, task.student))
        loss += float((p * (p / q).log()).sum())
    assert float(sums.loss.detach()) == pytest.approx(loss, rel=1e-3)
    sums.loss.backward()
    assert all(p.grad is not None for p in task.student.model.parameters())
    assert all(p.grad is None for p in target.model.parameters())


def test_the_student_writes_without_dropout_and_goes_on_training(target: CausalModel) -> None:
    student = _model(seed=1, dropout=0.5)
    task = _distillation(target, student=student)
    student.model.train()
    student.model.get_input_embeddings().eval()
    batch = task.batch(0, 0)
    assert student.model.training and not student.model.get_input_embeddings().training
    assert _equal(batch, _distillation(target).batch(0, 0))


def test_a_student_that_writes_learns(target: CausalModel) -> None:
    task = _distillation(target, stop=frozenset())
    optimizer = torch.optim.Adam(task.student.model.parameters(), lr=0.01)
    means = []
    for step in range(60):
        sums = task.loss(task.batch(step, 0))
        means.append(float(sums.loss.detach()) / sums.tokens)
        optimizer.zero_grad()
        (sums.loss / sums.tokens).backward()
        optimizer.step()
    assert sum(means[-6:]) < 0.5 * sum(means[:6])


@pytest.mark.parametrize(
    "objective",
    [cross_entropy.Config().build, mix.Config(weights={"cross_entropy": 0.1, "total_variation": 0.9}).build],
)
def test_an_objective_that_reads_labels_is_refused(target: CausalModel, objective: Callable[[], Objective]) -> None:
    with pytest.raises(InputError, match=r"learns from labels.* \[draft.on_policy_share\]: choose an objective"):
        _distillation(target, objective=objective())


@pytest.mark.parametrize("said", [0, 2])
def test_a_target_without_layers_is_refused(said: int) -> None:
    head = _model(seed=0, layers=2)
    samples = _samples(head)
    del head.model.model.layers[:]
    head.model.config.num_hidden_layers = said
    with pytest.raises(InputError, match=r"the target is its head alone .* \[draft.on_policy_share\]: load the whole"):
        Distillation(
            _model(seed=1),
            head,
            samples,
            objective=forward_kl.Config().build(),
            sequences_per_step=2,
            max_tokens=64,
            chunk_tokens=7,
            seed=0,
            on_policy=OnPolicy(share=0.1, max_new_tokens=4, temperature=1.0, stop_tokens=STOP),
        )
