"""Runs that are stopped twenty times at random moments, by SIGKILL and by SIGTERM, in one process and in two.

Each time the same command goes on; in the end the weights are those of a run that nobody touched: bit for bit in one
process, within 1e-6 under ZeRO. Where two processes train, SIGKILL strikes all of them or one rank alone.
"""

import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_zero import finish, start
from train import checkpoint

STOPS = 20
STEPS = 240
SEED = 7


def strike(process: subprocess.Popen[str], number: int, *, rank: int | None) -> None:
    """Send a signal to a run: to what was started and, for SIGKILL, to all or one of the processes it has started."""
    children = psutil.Process(process.pid).children(recursive=True)
    if rank is not None and children:
        children[rank % len(children)].send_signal(number)
        return
    process.send_signal(number)
    if number == signal.SIGKILL:
        for child in children:
            with_killed(child)


def with_killed(child: psutil.Process) -> None:
    try:
        child.kill()
    except psutil.NoSuchProcess:
        pass


def newest(folder: Path) -> int:
    return max(checkpoint.saved_steps(folder / "checkpoints"), default=0)


def stopped_often(folder: Path, stops: int, *, size: int, number: int, **told: object) -> int:
    """Stop a run so often, each a random while after it has got one step further; returns the steps it lost."""
    draw = random.Random(SEED * size + number)
    lost = 0
    for stop in range(stops):
        before = newest(folder)
        process = start(folder, size=size, **told)
        while newest(folder) <= before and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, f"ended by itself, before stop {stop + 1}: {process.communicate()[0]}"
        time.sleep(draw.uniform(0.0, 0.25))
        alone = size > 1 and number == signal.SIGKILL and stop % 2 == 1
        strike(process, number, rank=draw.randrange(size) if alone else None)
        said, _ = process.communicate(timeout=120)
        assert process.returncode != 0, said
        if number == signal.SIGTERM:
            assert "stopped at" in said, said
        # Whatever it was doing, the newest checkpoint reads back whole.
        assert checkpoint.newest_snapshot(folder / "checkpoints") is not None
        lost += newest(folder) <= before
    return lost


def unbroken(folder: Path, *, size: int, **told: object) -> dict[str, torch.Tensor]:
    finish(start(folder, size=size, **told))
    return load_file(folder / "weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_one_process_ends_with_the_same_bits(tmp_path: Path, number: int) -> None:
    told = {"steps": STEPS, "dropout": 0.1, "engine": "plain", "pause": 0.002}
    wanted = unbroken(tmp_path / "peace", size=0, **told)
    assert stopped_often(tmp_path / "often", STOPS, size=0, number=number, **told) == 0
    found = unbroken(tmp_path / "often", size=0, **told)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_two_processes_end_with_the_same_weights(tmp_path: Path, number: int) -> None:
    told = {"steps": STEPS, "dropout": 0.1, "zero_stage": 2, "pause": 0.002}
    wanted = unbroken(tmp_path / "peace", size=2, **told)
    assert stopped_often(tmp_path / "often", STOPS, size=2, number=number, **told) == 0
    found = unbroken(tmp_path / "often", size=2, **told)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
