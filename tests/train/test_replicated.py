"""Two processes that each hold all of what is trained: the losses and weights of one, whoever makes the passes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train import sharded, tiny
from tests.train.test_zero import close, finish, losses, start
from train import checkpoint

COPIES = {"engine": "replicated"}
CAPTURED = {**COPIES, "captured": "on"}
Curve = tuple[dict[str, torch.Tensor], list[float]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """Weights and losses of one process under the plain engine."""
    module, result = sharded.train(tmp_path_factory.mktemp("alone"))
    return tiny.weights(module), [line["loss"] for line in result.history if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("told", [COPIES, CAPTURED], ids=["kernels", "captured"])
def test_two_processes_learn_what_one_does(tmp_path: Path, alone: Curve, told: dict[str, str]) -> None:
    said = finish(start(tmp_path, size=2, tracked=True, **told))
    close(tmp_path, alone, atol=1e-6)
    assert "Warning" not in said
    lines = json.loads((tmp_path / "result.json").read_text())["tracked"]
    assert sum("loss" in line for line in lines) == 6, "of the first process, which alone has a tracker"


@pytest.mark.slow
def test_gradients_that_are_not_summed_would_be_noticed(tmp_path: Path, alone: Curve) -> None:
    finish(start(tmp_path, size=2, mutant="gradients are not summed", **COPIES))
    with pytest.raises(AssertionError):
        close(tmp_path, alone, atol=1e-6)


@pytest.mark.slow
def test_bf16_over_fp32_weights_is_that_of_one_process(tmp_path: Path) -> None:
    module, result = sharded.train(tmp_path / "one", precision="bf16")
    curve = [line["loss"] for line in result.history if "loss" in line]
    finish(start(tmp_path / "two", size=2, precision="bf16", **COPIES))
    close(tmp_path / "two", (tiny.weights(module), curve), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, CAPTURED), (0, COPIES)),
        ((0, COPIES), (2, CAPTURED)),
        ((2, COPIES), (0, {"engine": "plain"})),
        ((0, {"engine": "plain"}), (2, COPIES)),
        ((2, COPIES), (2, {"engine": "deepspeed", "zero_stage": 2})),
        ((2, {"engine": "deepspeed", "zero_stage": 3}), (2, COPIES)),
    ],
)
def test_a_run_goes_on_under_another_engine_or_number_of_processes(
    tmp_path: Path, alone: Curve, first: tuple[int, dict[str, Any]], then: tuple[int, dict[str, Any]]
) -> None:
    size, told = first
    process = start(tmp_path, size=size, pause=0.15, **told)
    while not list((tmp_path / "checkpoints").glob("step-00000003")):
        assert process.poll() is None, process.communicate()
    process.terminate()
    assert "stopped at" in process.communicate(timeout=240)[0]
    size, told = then
    finish(start(tmp_path, size=size, **told))
    assert json.loads((tmp_path / "result.json").read_text())["resumed"] >= 3
    close(tmp_path, alone, atol=1e-5 if "zero_stage" in first[1] | then[1] else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"accumulation": 3}, "3 micro-batches a step cannot be dealt to 2 processes"),
        ({"mutant": "other parameters"}, "the processes have gradients of different parameters"),
    ],
)
def test_what_processes_cannot_do_together_ends_all_of_them(tmp_path: Path, told: dict[str, Any], said: str) -> None:
    process = start(tmp_path, size=2, **CAPTURED, **told)
    text, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert text.count(f"TrainingError: {said}") == 2, text
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_no_process_moves_where_one_has_a_gradient_that_is_not_finite(tmp_path: Path) -> None:
    process = start(tmp_path, size=2, mutant="nan", **COPIES)
    text, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert text.count("TrainingDiverged: gradient norm is nan [step 4,") == 2, text
    saved = checkpoint.newest_snapshot(tmp_path / "checkpoints")
    assert saved is not None and saved.step == 3
    for rank in range(2):
        left = load_file(tmp_path / f"left-{rank}.safetensors")
        assert all(torch.equal(left[name], weight) for name, weight in saved.weights.items())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_with_captured_passes_learn_what_one_does(tmp_path: Path) -> None:
    finish(start(tmp_path / "one", size=0, device="cuda", engine="plain", captured="on"))
    finish(start(tmp_path / "two", size=2, device="cuda", **CAPTURED))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
