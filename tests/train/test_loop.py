"""The loop's arithmetic and behaviour: true means, clipping, divergence, evaluation, signals, frozen parameters."""

import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train import tiny
from train import checkpoint
from train.batches import Batch, batch_digest
from train.errors import TrainingDiverged, TrainingError
from train.loop import LossOutput, TrainerConfig
from train.optimizers import adamw
from train.progress import Progress


def test_loss_falls_on_one_batch(tmp_path: Path) -> None:
    module = tiny.network(dropout=0.0)
    result = tiny.run(tmp_path, module, batches=lambda s, m: tiny.batches(0, m), steps=60, log_every_steps=20)
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    # Micro-batches of unequal weight: a mean of means would differ from the true mean.
    def joined(step: int, micro: int) -> Batch:
        parts = [tiny.batches(step, m) for m in range(4)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    module, other = tiny.network(dropout=0.0).double(), tiny.network(dropout=0.0).double()

    def doubled(make: Any) -> Any:
        return lambda s, m: {k: v.double() if v.is_floating_point() else v for k, v in make(s, m).items()}

    split = tiny.run(tmp_path / "a", module, batches=doubled(tiny.batches), accumulation=4)
    whole = tiny.run(tmp_path / "b", other, batches=doubled(joined), accumulation=1)
    for name, value in tiny.weights(module).items():
        torch.testing.assert_close(value, tiny.weights(other)[name], rtol=1e-9, atol=1e-12)
    assert split.tokens == whole.tokens
    assert split.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-9)


def test_first_step_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    module, plain = tiny.network(dropout=0.0), tiny.network(dropout=0.0)
    tiny.run(tmp_path, module, steps=1, schedule="constant", warmup_share=0.0, clip_norm=0.0)
    optimizer = adamw.Config(lr=0.05).build([(n, p) for n, p in plain.named_parameters() if p.requires_grad])
    outputs = [tiny.loss_of(plain)(tiny.batches(0, micro)) for micro in range(2)]
    total = sum(float(o.weight_sum) for o in outputs)
    (sum(o.loss_sum for o in outputs) / total).backward()  # type: ignore[union-attr]
    optimizer.step()
    for name, value in tiny.weights(module).items():
        torch.testing.assert_close(value, tiny.weights(plain)[name], rtol=1e-5, atol=1e-6)


class SGD:
    """Plain gradient descent with rate 1, so that the change of the weights is the gradient."""

    def build(self, parameters: Any, /) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in parameters], lr=1.0)


@pytest.mark.parametrize(("clip_norm", "expected"), [(0.0, None), (0.01, 0.01), (1e6, None)])
def test_gradient_is_clipped_to_the_norm_and_the_norm_before_is_reported(
    tmp_path: Path, clip_norm: float, expected: float | None
) -> None:
    module = tiny.network(dropout=0.0)
    before = tiny.weights(module)
    result = tiny.run(
        tmp_path, module, steps=1, optimizer=SGD(), clip_norm=clip_norm, schedule="constant", warmup_share=0.0
    )
    change = torch.cat([(before[n] - value).flatten() for n, value in tiny.weights(module).items()]).norm()
    reported = result.metrics["grad_norm"]
    assert reported > 0.01
    assert float(change) == pytest.approx(expected or reported, rel=1e-4)


def test_frozen_parameters_stay_and_are_in_no_checkpoint(tmp_path: Path) -> None:
    module = tiny.network()
    before = tiny.weights(module)
    result = tiny.run(tmp_path, module)
    assert torch.equal(tiny.weights(module)["0.weight"], before["0.weight"])
    assert not torch.equal(tiny.weights(module)["4.weight"], before["4.weight"])
    assert set(checkpoint.read_snapshot(result.checkpoint).weights) == {"1.weight", "1.bias", "4.weight", "4.bias"}


def test_tokens_and_metrics_are_sums_divided_once(tmp_path: Path) -> None:
    result = tiny.run(tmp_path, tiny.network())
    # weights of step s, micro m: 3 + (s + m) % 2, so 7 a step of two micro-batches
    assert result.tokens == 6 * 7
    assert result.steps == 6
    assert result.seconds > 0
    # lines after steps 4 (of 4 steps) and 6 (the last 2), evaluations after 3 and 6
    assert [(line["step"], "loss" in line) for line in result.history] == [(3, False), (4, True), (6, True), (6, False)]
    # 4 steps x 7 weights: an accuracy is a multiple of 1/28
    accuracy = result.history[1]["accuracy"]
    assert accuracy * 28 == pytest.approx(round(accuracy * 28))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_loss_names_step_batch_and_checkpoint_and_changes_nothing(tmp_path: Path, bad: float) -> None:
    module = tiny.network()
    loss, calls, after_two = tiny.loss_of(module), [0], {}

    def failing(batch: Batch) -> LossOutput:
        output = loss(batch)
        if calls[0] == 5:  # step 3, second micro-batch
            after_two.update(tiny.weights(module))
            output.loss_sum = output.loss_sum * bad
        calls[0] += 1
        return output

    with pytest.raises(TrainingDiverged) as caught:
        tiny.run(tmp_path, module, loss=failing)
    digest, last = batch_digest(tiny.batches(2, 1)), tmp_path / "checkpoints" / "step-00000002"
    assert caught.value.step == 3
    assert caught.value.digests == (digest,)
    assert caught.value.checkpoint == last
    for part in (f"loss is {bad} in micro-batch 1", "step 3", digest, str(last), "lower optimizer.lr"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tiny.equal(tiny.weights(module), after_two)
    snapshot = checkpoint.read_snapshot(last)
    assert all(torch.equal(value, after_two[name]) for name, value in snapshot.weights.items())


def test_bad_gradient_of_a_good_loss_is_found_before_the_step(tmp_path: Path) -> None:
    module = tiny.network()

    def failing(batch: Batch) -> LossOutput:
        zero = (module[4].get_parameter("weight").sum() * 0.0).sqrt()
        output = tiny.loss_of(module)(batch)
        return LossOutput(output.loss_sum + zero, output.weight_sum)  # value fine, derivative of sqrt at 0 infinite

    before = tiny.weights(module)
    with pytest.raises(TrainingDiverged, match=r"gradient norm is nan.*step 1, batch digest .*, .*no checkpoint yet"):
        tiny.run(tmp_path, module, loss=failing)
    assert tiny.equal(tiny.weights(module), before)


def test_batch_without_weight_is_named(tmp_path: Path) -> None:
    module = tiny.network()

    def empty(step: int, micro: int) -> Batch:
        return {**tiny.batches(step, micro), "weights": torch.zeros(4)}

    with pytest.raises(TrainingError, match=r"weights of a step sum to 0.*step 1, batch digest .*at least one token"):
        tiny.run(tmp_path, module, batches=empty)


def test_evaluation_runs_in_eval_mode_without_gradients_and_does_not_disturb_training(tmp_path: Path) -> None:
    quiet, watched, seen = tiny.network(), tiny.network(), []

    def evaluate() -> dict[str, float]:
        seen.append((watched.training, torch.is_grad_enabled()))
        return {"noise": float(torch.rand(100).sum())}

    tiny.run(tmp_path / "a", quiet, evaluate=None)
    result = tiny.run(tmp_path / "b", watched, evaluate=evaluate)
    assert seen == [(False, False)] * 2
    assert watched.training
    assert tiny.equal(tiny.weights(quiet), tiny.weights(watched))
    assert "eval/noise" in result.metrics


def test_best_checkpoint_is_kept_besides_the_newest_and_can_be_loaded(tmp_path: Path) -> None:
    module, scores, at_best = tiny.network(), iter([0.1, 0.9, 0.5, 0.4, 0.3, 0.2]), {}

    def evaluate() -> dict[str, float]:
        score = next(scores)
        if score == 0.9:
            at_best.update(tiny.weights(module))
        return {"score": score}

    result = tiny.run(
        tmp_path, module, evaluate=evaluate, evaluate_every_steps=1, checkpoint_every_steps=0, best_metric="score",
        keep_checkpoints=1,
    )  # fmt: skip
    root = tmp_path / "checkpoints"
    assert (result.best_step, result.best_value) == (2, 0.9)
    assert checkpoint.saved_steps(root) == [2, 6]
    checkpoint.load_weights(module, checkpoint.step_folder(root, 2))
    assert tiny.equal(tiny.weights(module), at_best)


def test_best_may_be_the_smallest(tmp_path: Path) -> None:
    scores = iter([0.5, 0.1, 0.3, 0.2, 0.4, 0.6])
    result = tiny.run(
        tmp_path, tiny.network(), evaluate=lambda: {"score": next(scores)}, evaluate_every_steps=1,
        best_metric="score", best_is="min",
    )  # fmt: skip
    assert result.best_step == 2


def test_missing_best_metric_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"best_metric is 'tau'.*choose one of \['noise'\]"):
        tiny.run(tmp_path, tiny.network(), best_metric="tau")


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signal_finishes_the_step_saves_it_and_leaves(
    tmp_path: Path, number: signal.Signals, error: type[BaseException]
) -> None:
    def interrupted(step: int, micro: int) -> Batch:
        if (step, micro) == (2, 0):
            os.kill(os.getpid(), number)
        return tiny.batches(step, micro)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    module, unbroken = tiny.network(), tiny.network()
    with pytest.raises(error) as caught:
        tiny.run(tmp_path / "a", module, batches=interrupted, checkpoint_every_steps=0)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 143
    assert checkpoint.saved_steps(tmp_path / "a" / "checkpoints") == [3]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = tiny.network()
    result = tiny.run(tmp_path / "a", resumed, checkpoint_every_steps=0)
    tiny.run(tmp_path / "b", unbroken, checkpoint_every_steps=0)
    assert result.resumed_step == 3
    assert tiny.equal(tiny.weights(resumed), tiny.weights(unbroken))


def test_bf16_trains_over_fp32_master_weights(tmp_path: Path) -> None:
    module, formats = tiny.network(dropout=0.0), []
    module[4].to(torch.bfloat16)
    inner = tiny.loss_of(module)

    def loss(batch: Batch) -> LossOutput:
        formats.append(module(batch["features"]).dtype)
        return inner(batch)

    result = tiny.run(tmp_path, module, loss=loss, precision="bf16")
    assert set(formats) == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert all(value.dtype == torch.float32 for value in checkpoint.read_snapshot(result.checkpoint).weights.values())
    assert math.isfinite(result.metrics["loss"])


def test_unresolved_precision_and_nothing_to_train_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="precision is still auto"):
        tiny.run(tmp_path, tiny.network(), precision="auto")
    with pytest.raises(TrainingError, match="steps is 0"):
        tiny.run(tmp_path, tiny.network(), steps=0)
    with pytest.raises(TrainingError, match="no parameter requires a gradient"):
        tiny.run(tmp_path, tiny.network().requires_grad_(False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "trainer.steps is -1: choose 0 or more"),
        ({"clip_norm": -1.0}, "trainer.clip_norm is -1.0: choose 0 or more"),
        ({"clip_norm": math.nan}, "trainer.clip_norm is nan"),
        ({"precision": "fp8"}, "trainer.precision is 'fp8': choose one of fp32, bf16, auto"),
        ({"schedule": "step"}, "trainer.schedule is 'step': choose one of constant"),
        ({"warmup_share": 1.5}, "trainer.warmup_share is 1.5: choose a share"),
        ({"best_is": "big"}, "trainer.best_is is 'big'"),
        ({"keep_checkpoints": 0}, "trainer.keep_checkpoints is 0"),
    ],
)
def test_bad_settings_are_named_with_a_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**changes)


def test_log_lines_come_at_most_once_a_second_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    seconds = iter([0.0, 0.1, 0.4, 0.9, 1.2, 1.3])  # first reading is the start
    with caplog.at_level(logging.INFO), Progress(5, terminal=False, clock=lambda: next(seconds)) as progress:
        for step in range(1, 6):
            progress.advance(step, loss=1.0, lr=0.1)
    # at 0.1 (the first), at 1.2 (more than a second later), and the last step
    assert [message.split()[1] for message in caplog.messages] == ["1/5", "4/5", "5/5"]


def test_a_bar_is_drawn_on_a_terminal(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress(2, terminal=True) as progress:
        progress.advance(1, loss=1.0, lr=0.1)
        progress.advance(2, loss=0.5, lr=0.1)
    assert "2/2" in capsys.readouterr().err
    assert not caplog.messages


def test_batch_digest_sees_content_key_shape_and_type() -> None:
    base = {"x": torch.arange(6), "y": torch.tensor(1.0, dtype=torch.bfloat16)}
    same = {"y": base["y"].clone(), "x": torch.arange(6)}
    others: list[Batch] = [
        {**base, "x": torch.arange(6) + 1},
        {**base, "x": torch.arange(6).reshape(2, 3)},
        {**base, "x": torch.arange(6).to(torch.int32)},
        {"z": base["x"], "y": base["y"]},
    ]
    assert batch_digest(base) == batch_digest(same)
    assert len({batch_digest(batch) for batch in [base, *others]}) == 5


def test_modules_keep_their_own_mode_through_evaluation(tmp_path: Path) -> None:
    module = tiny.network()
    assert isinstance(module, nn.Sequential)
    seen = []

    def loss(batch: Batch) -> LossOutput:
        module[3].eval()  # the caller silences one part
        return tiny.loss_of(module)(batch)

    def batches(step: int, micro: int) -> Batch:
        seen.append(module[3].training)
        return tiny.batches(step, micro)

    tiny.run(tmp_path, module, loss=loss, batches=batches)
    assert seen == [True] + [False] * 11
