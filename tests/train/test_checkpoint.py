"""Killed and resumed runs against unbroken ones, damaged files, full disks, and optimizer states of every kind."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train import tiny
from train import checkpoint
from train.batches import Batch
from train.errors import TrainingError
from train.optimizers import OptimizerConfig, adamw, adamw8bit

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def kill_at(step: int, micro: int) -> Any:
    def batches(now: int, part: int) -> Batch:
        if (now, part) == (step, micro):
            raise Killed
        return tiny.batches(now, part)

    return batches


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    module = tiny.network()
    result = tiny.run(tmp_path_factory.mktemp("unbroken"), module)
    return tiny.weights(module), result.history


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("micro", [0, 1])
@pytest.mark.parametrize("step", range(6))
def test_killed_anywhere_and_rerun_ends_with_the_same_bits(
    tmp_path: Path, unbroken: tuple[Any, Any], step: int, micro: int, every: int
) -> None:
    with pytest.raises(Killed):
        tiny.run(tmp_path, tiny.network(), batches=kill_at(step, micro), checkpoint_every_steps=every)
    torch.manual_seed(99)  # a new process would have other random numbers
    module = tiny.network()
    result = tiny.run(tmp_path, module, checkpoint_every_steps=every)
    assert result.resumed_step == step // every * every
    assert tiny.equal(tiny.weights(module), unbroken[0])
    assert result.history == unbroken[1]
    assert result.tokens == 42


@pytest.mark.parametrize("moment", ["save_file", "os.rename", "_sync"])
def test_killed_while_writing_a_checkpoint(
    tmp_path: Path, unbroken: tuple[Any, Any], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]
    owner: Any = os if moment == "os.rename" else checkpoint
    name = moment.removeprefix("os.")
    original = getattr(owner, name)

    def killing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killing)
        with pytest.raises(Killed):
            tiny.run(tmp_path, tiny.network())
    for step in checkpoint.saved_steps(tmp_path / "checkpoints"):
        checkpoint.read_snapshot(checkpoint.step_folder(tmp_path / "checkpoints", step))
    module = tiny.network()
    tiny.run(tmp_path, module)
    assert tiny.equal(tiny.weights(module), unbroken[0])
    assert not list((tmp_path / "checkpoints").glob(".partial-*"))


def test_a_real_process_killed_in_mid_training_and_rerun(tmp_path: Path) -> None:
    def start(pause: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.train.tiny", str(tmp_path / "killed"), "12", pause]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})

    root = tmp_path / "killed" / "checkpoints"
    process = start("0.03")
    try:
        deadline = time.monotonic() + 60
        while not (root.exists() and checkpoint.saved_steps(root) and checkpoint.saved_steps(root)[-1] >= 3):
            assert process.poll() is None, "the process ended before it could be killed"
            assert time.monotonic() < deadline, "no third checkpoint within a minute"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert checkpoint.saved_steps(root)[-1] < 12
    assert start("0").wait(timeout=60) == 0

    module = tiny.network()
    tiny.run(tmp_path / "unbroken", module, steps=12)
    killed, whole = (
        checkpoint.read_snapshot(checkpoint.step_folder(tmp_path / name / "checkpoints", 12))
        for name in ("killed", "unbroken")
    )
    assert tiny.equal(killed.weights, whole.weights)
    assert killed.record["history"] == whole.record["history"]
    files = [tmp_path / n / "checkpoints/step-00000012/optimizer.safetensors" for n in ("killed", "unbroken")]
    assert files[0].read_bytes() == files[1].read_bytes()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_damaged_newest_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, unbroken: tuple[Any, Any], name: str, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        tiny.run(tmp_path, tiny.network(), batches=kill_at(4, 0))
    root = tmp_path / "checkpoints"
    assert checkpoint.saved_steps(root) == [3, 4]
    damage(checkpoint.step_folder(root, 4) / name)
    module = tiny.network()
    with caplog.at_level(logging.WARNING):
        result = tiny.run(tmp_path, module, keep_checkpoints=1)
    assert result.resumed_step == 3
    assert [r for r in caplog.messages if "checkpoint is damaged" in r and "step-00000004" in r and "passed over" in r]
    assert tiny.equal(tiny.weights(module), unbroken[0])
    assert checkpoint.saved_steps(root) == [6]


def test_damaged_later_checkpoint_never_costs_the_good_one(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        tiny.run(tmp_path, tiny.network(), batches=kill_at(4, 0), checkpoint_every_steps=2)
    root = tmp_path / "checkpoints"
    truncate(checkpoint.step_folder(root, 4) / "state.json")
    with pytest.raises(Killed):  # one step on from 2, saving 3: the damaged 4 must not count as the newest
        tiny.run(tmp_path, tiny.network(), batches=kill_at(3, 0), checkpoint_every_steps=1, keep_checkpoints=1)
    assert checkpoint.saved_steps(root) == [3]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    module, again = tiny.network(), tiny.network()
    first = tiny.run(tmp_path, module)
    second = tiny.run(tmp_path, again, batches=kill_at(0, 0), loss=None, evaluate=None)
    assert tiny.equal(tiny.weights(module), tiny.weights(again))
    assert (second.steps, second.tokens, second.metrics, second.history) == (
        first.steps, first.tokens, first.metrics, first.history,
    )  # fmt: skip
    assert second.resumed_step == 6


def test_other_settings_are_refused_on_resuming(tmp_path: Path) -> None:
    tiny.run(tmp_path, tiny.network())
    with pytest.raises(TrainingError, match=r"trainer.seed was 0 and is now 3.*step-00000006.*remove the checkpoints"):
        tiny.run(tmp_path, tiny.network(), seed=3)
    with pytest.raises(TrainingError, match=r"optimizer.lr was 0.05 and is now 0.1"):
        tiny.run(tmp_path, tiny.network(), optimizer=adamw.Config(lr=0.1))
    tiny.run(tmp_path, tiny.network(), keep_checkpoints=5, checkpoint_every_steps=3)  # these change no weight


def test_another_module_is_refused_on_resuming(tmp_path: Path) -> None:
    tiny.run(tmp_path, tiny.network())
    module = nn.Sequential(*tiny.network().children(), nn.Linear(tiny.CLASSES, tiny.CLASSES))
    with pytest.raises(TrainingError, match=r"differ in 2 parameters, first 5.bias"):
        tiny.run(tmp_path, module)


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    tiny.run(tmp_path, tiny.network(), keep_checkpoints=3)
    assert checkpoint.saved_steps(tmp_path / "checkpoints") == [4, 5, 6]


class Wide(nn.Module):
    """Large enough for bitsandbytes to keep 8-bit state: 64 x 128 numbers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(5)
            self.first, self.second = nn.Linear(tiny.FEATURES, 128), nn.Linear(128, 64)
            self.head = nn.Linear(64, tiny.CLASSES)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.second(self.first(features).tanh()).tanh())
        return result


@pytest.mark.parametrize(
    "optimizer", [adamw.Config(lr=0.01), adamw.Config(lr=0.01, fused=False), adamw8bit.Config(lr=0.01)]
)
def test_optimizer_state_of_every_kind_survives(tmp_path: Path, optimizer: OptimizerConfig) -> None:
    unbroken, resumed = Wide(), Wide()
    tiny.run(tmp_path / "a", unbroken, optimizer=optimizer)
    with pytest.raises(Killed):
        tiny.run(tmp_path / "b", Wide(), optimizer=optimizer, batches=kill_at(3, 1))
    assert tiny.run(tmp_path / "b", resumed, optimizer=optimizer).resumed_step == 3
    assert tiny.equal(tiny.weights(unbroken), tiny.weights(resumed))


def test_eight_bit_state_round_trip(tmp_path: Path) -> None:
    module = Wide()
    config = adamw8bit.Config(lr=0.01)
    optimizer = config.build(module.named_parameters())
    module(torch.randn(3, tiny.FEATURES)).sum().backward()
    optimizer.step()
    state = checkpoint.optimizer_state(module, optimizer)
    folder = checkpoint.write_snapshot(
        tmp_path, checkpoint.Snapshot(1, tiny.weights(module), state, checkpoint.rng_states(), {})
    )
    other = config.build(module.named_parameters())
    checkpoint.load_optimizer_state(module, other, checkpoint.read_snapshot(folder).optimizer)
    weight = module.second.weight
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    assert optimizer.state[module.head.bias]["state1"].dtype == torch.float32  # too small for 8 bits
    for parameter in module.parameters():
        before, after = optimizer.state[parameter], other.state[parameter]
        assert before.keys() == after.keys()
        for name, value in before.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == after[name].dtype
                assert torch.equal(value, after[name])
            else:
                assert value == after[name]


def test_any_tree_of_tensors_and_plain_values_survives() -> None:
    tree = {"a": [torch.ones(2), (1, 2.5, None, True)], "b": {"c": torch.tensor(3), "d": "text", "e": float("inf")}}
    tensors: dict[str, torch.Tensor] = {}
    back = checkpoint.unflatten(checkpoint.flatten(tree, name="state", tensors=tensors), tensors=tensors)
    assert sorted(tensors) == ["state.a.0", "state.b.c"]
    assert torch.equal(back["a"][0], torch.ones(2))
    assert back["a"][1] == (1, 2.5, None, True)
    assert back["b"]["d"] == "text"
    assert back["b"]["e"] == float("inf")


def test_state_that_only_pickle_could_hold_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"optimizer state state.x.1 is a object, which a checkpoint cannot hold"):
        checkpoint.flatten({"x": [1, object()]}, name="state", tensors={})


def test_tensors_sharing_memory_and_views_are_written_apart(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {"w": {"map1": shared, "map2": shared, "part": shared[2:4], "turned": shared.reshape(2, 3).t()}}
    snapshot = checkpoint.Snapshot(1, {"w": torch.ones(1)}, state, checkpoint.rng_states(), {})
    back = checkpoint.read_snapshot(checkpoint.write_snapshot(tmp_path, snapshot)).optimizer["w"]
    for name, value in state["w"].items():
        assert torch.equal(back[name], value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk_is_said_so_and_leaves_earlier_checkpoints_whole(small_disk: Path) -> None:
    record: dict[str, Any] = {}
    small = checkpoint.Snapshot(1, {"w": torch.zeros(1000)}, {}, checkpoint.rng_states(), record)
    large = checkpoint.Snapshot(2, {"w": torch.zeros(100_000)}, {}, checkpoint.rng_states(), record)
    checkpoint.write_snapshot(small_disk, small)
    with pytest.raises(OSError, match="No space left on device") as caught:
        checkpoint.write_snapshot(small_disk, large)
    assert caught.value.errno == 28
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    newest = checkpoint.newest_snapshot(small_disk)
    assert newest is not None
    assert newest.step == 1
