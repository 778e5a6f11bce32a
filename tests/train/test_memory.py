"""The most memory of a piece of work is its own, also of one inside another, and says when it cannot be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from train import memory

MIB = 2**20
# Each stage holds so much for a moment; pages are touched, so that they are resident.
PROGRAM = """
import json
from train.memory import watched

def hold(mib):
    assert bytes(bytearray(b"x") * (mib << 20))[-1]

with watched() as outer:
    with watched() as first:
        hold(200)
        large = first.took()
    with watched() as second:
        hold(20)
        small = second.took()
    whole = outer.took()
with watched() as later:
    after = later.took()
print(json.dumps([[t.resident_bytes >> 20, t.device_bytes, t.since_start] for t in (large, small, whole, after)]))
"""


def can_forget() -> bool:
    """Whether this system forgets the highest resident size of a process."""
    with memory.watched() as watch:
        return not watch.took().since_start


@pytest.mark.skipif(not can_forget(), reason="this system cannot forget what was before")
def test_each_piece_of_work_has_a_peak_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    large, small, whole, after = json.loads(done.stdout)
    assert [took[1:] for took in (large, small, whole, after)] == [[0, False]] * 4
    # Two copies of what is held exist while it is turned into bytes: 400 MiB against 40.
    assert large[0] - small[0] > 250
    assert whole[0] == pytest.approx(large[0], abs=2), "what is inside another is part of it"
    assert after[0] < small[0]


def test_where_nothing_can_be_forgotten_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_FORGET", tmp_path / "nowhere" / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "nowhere" / "status")
    with memory.watched() as watch:
        took = watch.took()
    assert took.since_start
    assert took.resident_bytes > 10 * MIB, "torch alone holds more"


def test_seconds_go_on_until_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("train.memory.time.monotonic", lambda: now[0])
    with memory.watched() as watch:
        now[0] = 12.5
        assert watch.took().seconds == 2.5
        now[0] = 13.0
        assert watch.took().seconds == 3.0


@pytest.mark.gpu
def test_a_gpu_is_watched_too() -> None:
    import torch

    torch.zeros(1, device="cuda")
    before = torch.cuda.memory_allocated()  # by tests that ran here earlier
    with memory.watched() as outer:
        with memory.watched() as watch:
            held = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
            assert watch.took().device_bytes >= before + 64 * MIB
        del held
        with memory.watched() as watch:
            assert watch.took().device_bytes < before + 64 * MIB
        assert outer.took().device_bytes >= before + 64 * MIB
