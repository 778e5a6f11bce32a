"""Steps by replayed passes: the same weights as kernel by kernel; batches made ahead are those that are wanted."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train.tiny import batches, loss_of, network, settings
from train.ahead import BatchesAhead
from train.batches import Batch
from train.config import TrainerConfig
from train.engines.captured import CapturedEngine
from train.engines.plain import PlainEngine
from train.loop import FitResult, LossOutput, fit
from train.optimizers import adamw
from train.trackers.none import NoTracker


def _weights(
    folder: Path, *, captured: str, fixed_shapes: bool = True, ahead: bool = False, device: str = "cpu"
) -> tuple[dict[str, Tensor], FitResult]:
    module = network(dropout=0.0).to(device)

    def loss(batch: Batch) -> LossOutput:
        return loss_of(module)({name: tensor.to(device) for name, tensor in batch.items()})

    result = fit(
        module,
        batches=_varied,
        loss=loss,
        optimizer=adamw.Config(lr=0.05),
        cfg=settings(captured=captured, steps=9),
        folder=folder,
        tracker=NoTracker(),
        evaluate=lambda: {"loss": 0.0},
        ahead=ahead,
        fixed_shapes=fixed_shapes,
    )
    return {name: p.detach().cpu().clone() for name, p in module.named_parameters()}, result


def _varied(step: int, micro: int) -> Batch:
    """Batches of two shapes, in turns that are not regular."""
    batch = batches(step, micro)
    return batch if (step * 2 + micro) % 3 else {name: tensor[:3] for name, tensor in batch.items()}


def test_captured_steps_end_with_the_bytes_of_plain_ones(tmp_path: Path) -> None:
    """Also across batches of other shapes in one step, whose gradients add up."""
    plain, first = _weights(tmp_path / "plain", captured="off")
    replayed, second = _weights(tmp_path / "captured", captured="on", ahead=True)
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)
    assert [line["loss"] for line in first.history if "loss" in line] == [
        line["loss"] for line in second.history if "loss" in line
    ]


def test_a_replay_reads_its_own_batch_and_starts_from_no_gradient() -> None:
    modules = [network(dropout=0.0) for _ in range(2)]
    engines = [
        kind(module, loss=loss_of(module), optimizer=adamw.Config(lr=1e-9), arithmetic="fp32", clip_norm=0.0)
        for kind, module in zip((PlainEngine, CapturedEngine), modules, strict=True)
    ]
    for step in range(5):
        found = []
        for engine, module in zip(engines, modules, strict=True):
            outputs = engine.accumulate([batches(step, 0), batches(step, 1)])
            grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
            found.append(([float(output.loss_sum) for output in outputs], grads))
        (losses, grads), (other_losses, other_grads) = found
        assert losses == other_losses
        assert all(torch.equal(one, other) for one, other in zip(grads, other_grads, strict=True))


@pytest.mark.parametrize(
    ("captured", "device", "engine", "wanted"),
    [
        ("auto", "cuda", "plain", True),
        ("auto", "cpu", "plain", False),
        ("on", "cpu", "plain", True),
        ("off", "cuda", "plain", False),
        ("on", "cuda", "deepspeed", False),
        ("auto", "cuda", "replicated", True),
        ("auto", "cpu", "replicated", False),
        ("off", "cuda", "replicated", False),
    ],
)
def test_where_passes_are_captured(captured: str, device: str, engine: str, wanted: bool) -> None:
    assert TrainerConfig(captured=captured, engine=engine).captures(device) is wanted


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer.captured is 'yes': choose one of auto, on, off"):
        TrainerConfig(captured="yes")


def test_a_killed_captured_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """Checkpoints know nothing of how a pass is launched: the other half is made kernel by kernel."""
    whole, _ = _weights(tmp_path / "whole", captured="on")

    class Killed(Exception):
        pass

    module = network(dropout=0.0)

    def until(step: int, micro: int) -> Batch:
        if step == 4:
            raise Killed
        return _varied(step, micro)

    cfg = settings(captured="on", steps=9)
    with pytest.raises(Killed):
        fit(
            module,
            batches=until,
            loss=loss_of(module),
            optimizer=adamw.Config(lr=0.05),
            cfg=cfg,
            folder=tmp_path / "killed",
            tracker=NoTracker(),
            evaluate=lambda: {"loss": 0.0},
            ahead=True,
            fixed_shapes=True,
        )
    resumed, result = _weights(tmp_path / "killed", captured="off")
    assert result.resumed_step == 4
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_batches_ahead_are_made_by_another_thread_and_are_the_same() -> None:
    makers: list[tuple[tuple[int, int], int]] = []

    def made(step: int, micro: int) -> Batch:
        makers.append(((step, micro), threading.get_ident()))
        return batches(step, micro)

    with BatchesAhead(made, steps=3, accumulation=2) as ahead:
        for step in range(3):
            for micro in range(2):
                found = ahead(step, micro)
                assert all(torch.equal(found[name], tensor) for name, tensor in batches(step, micro).items())
        again = ahead(1, 1)  # out of order, as when a digest is wanted
    assert torch.equal(again["features"], batches(1, 1)["features"])
    own = threading.get_ident()
    order = [place for place, maker in makers if maker != own]
    assert order[:5] == [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [place for place, maker in makers if maker == own] == [(0, 0), (1, 1)]


def test_of_several_processes_each_makes_its_own_batches_ahead() -> None:
    makers: dict[tuple[int, int], int] = {}

    def made(step: int, micro: int) -> Batch:
        makers[step, micro] = threading.get_ident()
        return batches(step, micro)

    with BatchesAhead(made, steps=2, accumulation=6) as ahead:
        ahead.deal(1, 3)
        for step in range(2):
            for micro in (1, 4):
                found = ahead(step, micro)
                assert all(torch.equal(found[name], tensor) for name, tensor in batches(step, micro).items())
    assert list(makers) == [(0, 1), (0, 4), (1, 1), (1, 4)], "those of others are not made"
    own = threading.get_ident()
    assert [place for place, maker in makers.items() if maker == own] == [(0, 1)]


def test_what_fails_in_the_thread_is_raised_where_the_batch_is_wanted() -> None:
    def made(step: int, micro: int) -> Batch:
        if step == 1:
            raise OSError("no such shard")
        return batches(step, micro)

    with BatchesAhead(made, steps=3, accumulation=1) as ahead:
        ahead(0, 0)
        with pytest.raises(OSError, match="no such shard"):
            ahead(1, 0)


@pytest.mark.gpu
def test_graphs_train_as_kernels_do(tmp_path: Path) -> None:
    plain, _ = _weights(tmp_path / "plain", captured="off", device="cuda")
    replayed, result = _weights(tmp_path / "captured", captured="on", device="cuda", ahead=True)
    assert result.steps == 9
    for name in plain:
        torch.testing.assert_close(replayed[name], plain[name], rtol=1e-5, atol=1e-6)
