"""Bytes of a process by ZeRO stage, against the paper's 16 bytes a weight and against a checkpoint that was written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines.planning.disk import checkpoint_bytes
from pipelines.planning.memory import Training, loading_bytes, memory_parts, offloaded_bytes, stages
from pipelines.planning.passes import StepCost
from train.config import TrainerConfig
from train.loop import fit
from train.optimizers.adamw import Config as AdamW
from train.results import LossOutput
from train.trackers.none import NoTracker

NUMBERS = 1_000_000
COST = StepCost(flops=1.0, held=5_000, batch=700, supervised=1)
SPREAD = Training(
    loaded=4 * NUMBERS,
    kept=NUMBERS,
    trained=NUMBERS,
    frozen=0,
    read=NUMBERS,
    cost=COST,
    optimizer="adamw",
    engine="deepspeed",
    halved=True,
    offload="none",
    processes=4,
)


def moved(stage: int, training: Training = SPREAD) -> float:
    parts = memory_parts(training, stage)
    return sum(parts[name] for name in ("weights", "gradients", "optimizer")) / NUMBERS


@pytest.mark.parametrize(("stage", "each"), [(0, 16), (1, 4 + 12 / 4), (2, 2 + 14 / 4), (3, 16 / 4)])
def test_bf16_takes_sixteen_bytes_a_weight_less_what_is_spread(stage: int, each: float) -> None:
    assert moved(stage) == each


def test_fp32_takes_sixteen_bytes_too() -> None:
    # 4 of weights, 4 of gradients, 8 of state.
    assert moved(0, replace(SPREAD, halved=False)) == 16
    assert moved(0, replace(SPREAD, halved=False, optimizer="adamw8bit")) == 8 + 2 + 2 * 4 / 256


def test_everything_else_is_the_same_in_every_stage() -> None:
    for stage in range(4):
        parts = memory_parts(SPREAD, stage)
        assert parts["target"] == 4 * NUMBERS and parts["activations"] == 5_000 and parts["batch"] == 700
        assert parts["exchange"] == 2 * NUMBERS
    assert memory_parts(replace(SPREAD, processes=1), 0)["exchange"] == 0
    assert memory_parts(replace(SPREAD, engine="plain"), 0)["exchange"] == 0
    assert loading_bytes(SPREAD) > 4 * (SPREAD.loaded + SPREAD.read)


def test_a_replicated_draft_is_whole_everywhere_and_sends_all_its_gradients_at_once() -> None:
    copies = replace(SPREAD, engine="replicated", halved=False)
    assert stages("replicated") == (0,)
    assert moved(0, copies) == 16, "4 of weights, 4 of gradients, 8 of state, whatever the number of processes"
    assert memory_parts(copies, 0)["exchange"] == 4 * NUMBERS
    many = 600_000_000  # more than DeepSpeed sends at a time
    assert memory_parts(replace(copies, trained=many), 0)["exchange"] == 4 * many
    assert memory_parts(replace(copies, trained=many, engine="deepspeed"), 0)["exchange"] == 4 * 500_000_000


def test_what_is_offloaded_lies_elsewhere() -> None:
    away = replace(SPREAD, offload="optimizer")
    assert memory_parts(away, 2)["optimizer"] == 0
    assert offloaded_bytes(away, 2) == 12 * NUMBERS / 4
    assert offloaded_bytes(replace(SPREAD, offload="all"), 3) == 14 * NUMBERS / 4
    assert offloaded_bytes(away, 0) == 0, "DeepSpeed offloads from stage 1 on"


def test_a_checkpoint_has_the_bytes_that_were_planned(tmp_path: Path) -> None:
    module = nn.Linear(300, 400)

    def loss(batch: dict[str, torch.Tensor]) -> LossOutput:
        return LossOutput(module(batch["x"]).square().sum(), 1.0, {})

    fit(
        module,
        batches=lambda step, micro: {"x": torch.ones(2, 300)},
        loss=loss,
        optimizer=AdamW(),
        cfg=TrainerConfig(steps=1, precision="fp32"),
        folder=tmp_path,
        tracker=NoTracker(),
    )
    [folder] = (tmp_path / "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in folder.iterdir())
    planned = checkpoint_bytes(300 * 400 + 400, "adamw")
    assert planned <= size < 1.02 * planned, "headers and random states come on top"
