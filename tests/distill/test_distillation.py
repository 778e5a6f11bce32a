"""Batches are a pure function of the step, line up with the target's own rows, and teach."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.conversation import Conversation
from distill.corpus import Sample, read_shards, write_shard
from distill.distillation import Distillation, capture_states
from distill.objectives import cross_entropy, forward_kl
from inference.errors import InputError
from inference.model import CausalModel
from tests.inference.families import VOCAB, family_model

DOMAINS = ("chat", "code", "maths")


def _model(*, seed: int, layers: int = 2, spread: float = 0.15) -> CausalModel:
    return CausalModel(
        family_model("llama", seed=seed, num_hidden_layers=layers, initializer_range=spread).model.float()
    )


@pytest.fixture(scope="module")
def target() -> CausalModel:
    return _model(seed=0)


def _samples(target: CausalModel, count: int = 7, *, validation: int = 3) -> list[Conversation]:
    """Random sequences of several lengths with two supervised stretches."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(count + validation):
        length = 10 + 3 * index
        mask = torch.zeros(length, dtype=torch.bool)
        mask[3:5] = mask[length - 4 :] = True
        samples.append(
            Sample(
                id=f"p{index}",
                domain=DOMAINS[index % 3],
                source="made",
                split="train" if index < count else "validation",
                tokens=torch.randint(VOCAB, (length,), generator=generator),
                mask=mask,
                states=None,
                text="",
            )
        )
    return capture_states(target, samples)


def _distillation(
    target: CausalModel,
    *,
    student: CausalModel | None = None,
    max_tokens: int = 512,
    seed: int = 0,
    bucket_batches: int = 0,
) -> Distillation:
    return Distillation(
        student or _model(seed=1, layers=1),
        target,
        _samples(target),
        objective=forward_kl.Config().build(),
        sequences_per_step=2,
        max_tokens=max_tokens,
        chunk_tokens=5,
        seed=seed,
        bucket_batches=bucket_batches,
    )


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_is_a_pure_function_of_the_step(target: CausalModel) -> None:
    one, other = _distillation(target), _distillation(target)
    for step in (5, 0, 3):
        one.batch(step + 1, 0)
        assert _equal(one.batch(step, 1, accumulation=2), other.batch(step, 1, accumulation=2))
    assert not _equal(one.batch(0, 0), _distillation(target, seed=1).batch(0, 0))


def test_micro_batches_follow_each_other_like_steps(target: CausalModel) -> None:
    distillation = _distillation(target)
    for position in range(6):
        step, micro = divmod(position, 3)
        assert _equal(distillation.batch(position, 0), distillation.batch(step, micro, accumulation=3))


def test_every_epoch_holds_every_training_sample_once_in_another_order(target: CausalModel) -> None:
    distillation = _distillation(target)
    # Seven samples, two a step: 14 steps are four epochs.
    lengths = [int(n) for step in range(14) for n in distillation.batch(step, 0)["attention"].sum(1)]
    epochs = [lengths[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == sorted(10 + 3 * i for i in range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_rows_line_up_with_the_targets_own_predictions(target: CausalModel) -> None:
    batch = _distillation(target).batch(0, 0)
    with torch.inference_mode():
        for row, length in enumerate(batch["attention"].sum(1).tolist()):
            logits = target.model(input_ids=batch["tokens"][row : row + 1, :length], use_cache=False).logits[0]
            mine = batch["rows"] == row
            taught = target.head(batch["target_states"][mine].float())
            # States are kept in bf16: 8 bits.
            torch.testing.assert_close(taught, logits[batch["columns"][mine]], rtol=0.0, atol=0.05)
    assert torch.equal(batch["labels"], batch["tokens"][batch["rows"], batch["columns"] + 1])
    assert batch["labels"].shape[0] == 2 * 6 == batch["target_states"].shape[0]


def test_padding_is_on_the_right_and_not_attended(target: CausalModel) -> None:
    batch = _distillation(target).batch(1, 0)
    for tokens, attention in zip(batch["tokens"], batch["attention"], strict=True):
        length = int(attention.sum())
        assert attention.tolist() == [1] * length + [0] * (len(attention) - length)
        assert not tokens[length:].any()


def test_longer_conversations_are_cut_with_their_supervision(target: CausalModel) -> None:
    distillation = _distillation(target, max_tokens=12)
    batch = distillation.batch(0, 0)
    assert batch["tokens"].shape[1] <= 12 and int(batch["columns"].max()) < 11
    assert batch["labels"].shape[0] == batch["target_states"].shape[0]
    # Nothing supervised is left of any conversation after one token.
    with pytest.raises(InputError, match=r"no training sample has a response \[corpus\]: build a larger corpus"):
        _distillation(target, max_tokens=3)


def test_the_loss_is_the_mean_over_supervised_tokens_by_plain_sums(target: CausalModel) -> None:
    distillation = _distillation(target)
    batch = distillation.batch(0, 0)
    sums = distillation.loss(batch)
    loss = acceptance = 0.0
    with torch.inference_mode():
        for row in range(2):
            tokens = batch["tokens"][row : row + 1, : int(batch["attention"][row].sum())]
            draft = distillation.student.model(input_ids=tokens, use_cache=False).logits[0].softmax(-1)
            for i in (batch["rows"] == row).nonzero()[:, 0].tolist():
                p = target.head(batch["target_states"][i : i + 1].float())[0].softmax(-1)
                q = draft[batch["columns"][i]]
                loss += float((p * (p / q).log()).sum())
                acceptance += float(torch.minimum(p, q).sum())
    assert sums.tokens == 12
    assert float(sums.loss.detach()) == pytest.approx(loss, rel=1e-4)
    assert sums.acceptance == pytest.approx(acceptance, rel=1e-4)


def test_the_loss_moves_the_student_and_leaves_the_target_alone(target: CausalModel) -> None:
    distillation = _distillation(target)
    distillation.loss(distillation.batch(0, 0)).loss.backward()
    gradients = [p.grad for p in distillation.student.model.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) and bool(g.any()) for g in gradients)
    assert all(p.grad is None for p in target.model.parameters())


def test_a_student_that_is_the_target_is_accepted_always(target: CausalModel) -> None:
    metrics = _distillation(target, student=target).evaluate()
    assert metrics["acceptance"] > 0.99
    assert metrics["loss"] < 1e-3


def test_overfitting_raises_acceptance(target: CausalModel) -> None:
    distillation = _distillation(target)
    optimizer = torch.optim.Adam(distillation.student.model.parameters(), lr=0.01)

    def acceptance() -> float:
        with torch.no_grad():
            sums = [distillation.loss(distillation.collate([s])) for s in distillation.train]
        return sum(s.acceptance for s in sums) / sum(s.tokens for s in sums)

    before = acceptance()
    for step in range(80):
        sums = distillation.loss(distillation.batch(step, 0))
        optimizer.zero_grad()
        (sums.loss / sums.tokens).backward()
        optimizer.step()
    assert acceptance() > before + 0.1
    assert acceptance() > 0.9


def test_evaluation_is_of_validation_samples_per_domain(target: CausalModel) -> None:
    distillation = _distillation(target)
    metrics = distillation.evaluate()
    assert set(metrics) == {"acceptance", "loss", *(f"acceptance_{domain}" for domain in DOMAINS)}
    with torch.no_grad():
        for sample in distillation.validation:
            alone = distillation.loss(distillation.collate([sample]))
            # One validation sample a domain.
            assert metrics[f"acceptance_{sample.domain}"] == pytest.approx(alone.acceptance / alone.tokens)
    # All have six supervised tokens, so the overall figure is the mean.
    by_domain = [metrics[f"acceptance_{domain}"] for domain in DOMAINS]
    assert metrics["acceptance"] == pytest.approx(sum(by_domain) / 3)


def test_without_validation_samples_there_is_nothing_to_report(target: CausalModel) -> None:
    distillation = Distillation(
        _model(seed=1),
        target,
        _samples(target, validation=0),
        objective=cross_entropy.Config().build(),
        sequences_per_step=2,
        max_tokens=64,
        chunk_tokens=8,
        seed=0,
    )
    assert distillation.evaluate() == {}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_target_in_half_precision_teaches_too(target: CausalModel, precision: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    half = CausalModel(_model(seed=0).model.to(dtype), precision=precision)
    whole, rounded = _distillation(target), _distillation(half)
    with torch.no_grad():
        losses = [float(d.loss(whole.batch(0, 0)).loss) for d in (whole, rounded)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_states_already_kept_are_kept(target: CausalModel) -> None:
    samples = _samples(target)
    again = capture_states(target, samples)
    assert all(one is other for one, other in zip(samples, again, strict=True))
    for sample in samples:
        assert sample.states is not None and sample.states.shape == (sample.tokens.shape[0] - 1, 32)
        assert sample.states.dtype == torch.bfloat16


# Lengths, counts, weights


def test_sorted_windows_pad_less_and_hold_the_same_conversations(target: CausalModel) -> None:
    def shapes(bucket_batches: int) -> tuple[list[int], int]:
        task = _distillation(target, bucket_batches=bucket_batches)
        masks = [task.batch(step, 0)["attention"] for step in range(7)]
        lengths = [int(n) for mask in masks for n in mask.sum(1)]
        return lengths, sum(mask.numel() for mask in masks) - sum(lengths)

    (plain, padding), (by_length, less) = shapes(0), shapes(4)
    # Seven conversations by two: two epochs, each whole.
    assert all(sorted(by_length[at : at + 7]) == sorted(plain[at : at + 7]) for at in (0, 7))
    assert less < padding


def test_sorted_batches_are_a_pure_function_of_the_step_too(target: CausalModel) -> None:
    one, other = (_distillation(target, bucket_batches=3) for _ in range(2))
    for step in (9, 0, 4):
        one.batch(step + 1, 0)
        assert _equal(one.batch(step, 1, accumulation=2), other.batch(2 * step + 1, 0))


def test_what_is_left_out_and_cut_is_counted_and_logged(target: CausalModel, caplog: pytest.LogCaptureFixture) -> None:
    samples = _samples(target)
    silent = replace(samples[0], mask=torch.zeros(10, dtype=torch.bool), states=torch.zeros(9, 32))
    with caplog.at_level(logging.INFO, logger="distill.selection"):
        task = Distillation(
            _model(seed=1),
            target,
            [silent, *samples],
            objective=forward_kl.Config().build(),
            sequences_per_step=2,
            max_tokens=20,
            chunk_tokens=5,
            seed=0,
        )
    # Lengths 10, 13, ... 28 for training, 31, 34, 37 for validation.
    assert task.counts == {
        "samples": 7,
        "validation_samples": 3,
        "samples_without_response": 1,
        "samples_cut": 3 + 3,
        "tokens_cut": (2 + 5 + 8) + (11 + 14 + 17),
    }
    assert len(caplog.records) == 1 and "6 cut at 20 tokens lose 57" in caplog.text


@pytest.mark.parametrize("max_tokens", [512, 14])
def test_the_weight_of_a_batch_is_known_before_the_loss(target: CausalModel, max_tokens: int) -> None:
    task = _distillation(target, max_tokens=max_tokens)
    for step in range(4):
        batch = task.batch(step, 0)
        assert task.weight(batch) == task.loss(batch).tokens


# From disk


def test_a_corpus_on_disk_gives_the_batches_of_one_in_memory(target: CausalModel, tmp_path: Path) -> None:
    samples = _samples(target)
    for index in range(2):
        write_shard(tmp_path, index, samples[5 * index : 5 * index + 5])
    stored = [sample for shard in read_shards(tmp_path) for sample in shard]
    tasks = [
        Distillation(
            _model(seed=1),
            target,
            some,
            objective=forward_kl.Config().build(),
            sequences_per_step=3,
            max_tokens=20,
            chunk_tokens=5,
            seed=0,
            bucket_batches=2,
        )
        for some in (samples, stored)
    ]
    assert tasks[0].counts == tasks[1].counts
    assert all(_equal(tasks[0].batch(step, 0), tasks[1].batch(step, 0)) for step in range(6))
    assert tasks[0].evaluate() == tasks[1].evaluate()


def test_captured_states_of_a_stored_corpus_are_those_of_one_in_memory(target: CausalModel, tmp_path: Path) -> None:
    samples = _samples(target)
    write_shard(tmp_path, 0, [replace(sample, states=None) for sample in samples])
    [bare] = read_shards(tmp_path)
    write_shard(tmp_path, 0, capture_states(target, bare))
    [stated] = read_shards(tmp_path)
    for one, other in zip(stated, samples, strict=True):
        assert one.states is not None and other.states is not None
        assert torch.equal(one.states, other.states) and torch.equal(one.tokens, other.tokens)
        assert not any(tensor.is_inference() for tensor in (one.tokens, one.mask, one.states_of(one.stated)))
        assert (one.id, one.split) == (other.id, other.split)
