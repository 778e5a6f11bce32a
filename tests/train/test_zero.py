"""DeepSpeed's engine on two processes: the same losses and weights as one process, checkpoints that fit anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train import sharded, tiny
from train import checkpoint
from train.errors import TrainingError
from train.optimizers import adamw, adamw8bit

REPOSITORY = Path(__file__).parents[2]


def start(folder: Path, *, size: int, **told: Any) -> subprocess.Popen[str]:
    """Start a run of so many processes (0 = one, without torchrun)."""
    folder.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, *launcher, "-m", "tests.train.sharded", json.dumps({"folder": str(folder), **told})]
    return subprocess.Popen(words, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in json.loads((folder / "result.json").read_text())["history"] if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of one process under the plain engine."""
    module, result = sharded.train(tmp_path_factory.mktemp("alone"))
    return tiny.weights(module), [line["loss"] for line in result.history if "loss" in line]


def close(folder: Path, alone: tuple[dict[str, torch.Tensor], list[float]], *, atol: float = 1e-5) -> None:
    weights, curve = alone
    assert losses(folder) == pytest.approx(curve, rel=atol)
    found = load_file(folder / "weights.safetensors")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=atol, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_learn_what_one_does(
    tmp_path: Path, alone: tuple[dict[str, torch.Tensor], list[float]], stage: int
) -> None:
    said = finish(start(tmp_path, size=2, zero_stage=stage))
    close(tmp_path, alone)
    assert "Warning" not in said


@pytest.mark.slow
def test_a_tracker_of_the_first_process_alone_holds_nobody_up(
    tmp_path: Path, alone: tuple[dict[str, torch.Tensor], list[float]]
) -> None:
    finish(start(tmp_path, size=2, zero_stage=3, tracked=True, peak_tflops=1.0))
    close(tmp_path, alone)
    lines = [line for line in json.loads((tmp_path / "result.json").read_text())["tracked"] if "loss" in line]
    assert len(lines) == 6
    assert all(line["tokens_per_s"] > 0 and 0 < line["mfu"] < 1 for line in lines)


@pytest.mark.slow
def test_a_mean_of_means_would_be_noticed(tmp_path: Path, alone: tuple[dict[str, torch.Tensor], list[float]]) -> None:
    finish(start(tmp_path, size=2, zero_stage=2, mutant="mean of means"))
    with pytest.raises(AssertionError):
        close(tmp_path, alone)


@pytest.mark.slow
def test_a_part_read_outside_its_own_pass_must_be_named_in_stage_3(tmp_path: Path) -> None:
    process = start(tmp_path, size=2, zero_stage=3, mutant="the head is not gathered")
    said, _ = process.communicate(timeout=240)
    assert process.returncode != 0, said


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "all")])
def test_offload_changes_nothing(
    tmp_path: Path, alone: tuple[dict[str, torch.Tensor], list[float]], stage: int, offload: str
) -> None:
    finish(start(tmp_path, size=2, zero_stage=stage, offload=offload))
    close(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_over_fp32_copies_follows_fp32(
    tmp_path: Path, alone: tuple[dict[str, torch.Tensor], list[float]], stage: int
) -> None:
    finish(start(tmp_path, size=2, zero_stage=stage, precision="bf16"))
    close(tmp_path, alone, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [((2, 2), (2, 2)), ((2, 3), (2, 3)), ((2, 1), (0, 2)), ((0, 2), (2, 3)), ((2, 3), (0, 0)), ((2, 0), (2, 1))],
)
def test_a_run_goes_on_under_another_stage_or_number_of_processes(
    tmp_path: Path,
    alone: tuple[dict[str, torch.Tensor], list[float]],
    first: tuple[int, int],
    then: tuple[int, int],
) -> None:
    # Two processes, then one without torchrun (size 0), and so on. Stopping early by `steps` would change the schedule,
    # so the first run is killed by SIGTERM in its second half.
    size, stage = first
    process = start(tmp_path, size=size, zero_stage=stage, pause=0.15)
    steps = tmp_path / "checkpoints"
    while not list(steps.glob("step-00000003")):
        assert process.poll() is None, process.communicate()
    process.terminate()
    said = process.communicate(timeout=240)[0]
    assert "stopped at" in said
    size, stage = then
    finish(start(tmp_path, size=size, zero_stage=stage))
    assert json.loads((tmp_path / "result.json").read_text())["resumed"] >= 3
    close(tmp_path, alone, atol=1e-5)


@pytest.mark.slow
def test_a_full_disk_ends_all_and_leaves_the_last_checkpoint_whole(
    tmp_path: Path, alone: tuple[dict[str, torch.Tensor], list[float]]
) -> None:
    process = start(tmp_path, size=2, zero_stage=2, full_at=4)
    said, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "No space left on device" in said  # the process that writes
    assert "another process of this training failed: see its own message" in said  # the other one
    snapshot = checkpoint.newest_snapshot(tmp_path / "checkpoints")
    assert snapshot is not None and snapshot.step == 3
    finish(start(tmp_path, size=2, zero_stage=2))
    close(tmp_path, alone)


def test_micro_batches_that_do_not_go_round_are_refused() -> None:
    from train.engines.spreading import check_spread

    with pytest.raises(TrainingError, match="3 micro-batches a step cannot be dealt to 2 processes"):
        check_spread(adamw.Config(), accumulation=3, size=2, stage=2)


def test_blockwise_state_is_not_spread() -> None:
    from train.engines.spreading import check_spread

    with pytest.raises(TrainingError, match="8-bit optimizer state cannot be spread"):
        check_spread(adamw8bit.Config(), accumulation=2, size=2, stage=1)
    check_spread(adamw8bit.Config(), accumulation=2, size=2, stage=0)
