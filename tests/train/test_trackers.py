"""Trackers write what they are given, and whatever happens to one of them training goes on."""

import logging
from pathlib import Path
from typing import Any

import pytest

from inference.plugins import plugins
from tests.train import tiny
from train.trackers import GuardedTracker, Tracker, guarded, tensorboard, wandb


class Recorder:
    """Keeps what it is told."""

    def __init__(self, *, fail_at: int = 0, fail_on_finish: bool = False) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.finished, self.fail_at, self.fail_on_finish = 0, fail_at, fail_on_finish

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        if step == self.fail_at:
            raise ConnectionError("no route to host")
        self.lines.append((step, metrics))

    def finish(self) -> None:
        self.finished += 1
        if self.fail_on_finish:
            raise ConnectionError("no route to host")


def test_the_tracker_gets_every_line_and_is_closed_once(tmp_path: Path) -> None:
    recorder = Recorder()
    tiny.run(tmp_path, tiny.network(), tracker=recorder)
    assert [step for step, _ in recorder.lines] == [3, 4, 6, 6]
    assert {"loss", "accuracy", "lr", "grad_norm", "tokens", "seconds"} == set(recorder.lines[1][1])
    assert recorder.finished == 1


@pytest.mark.parametrize("recorder", [Recorder(fail_at=3), Recorder(fail_on_finish=True)])
def test_a_failing_tracker_is_warned_about_once_and_training_goes_on(
    tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = tiny.run(tmp_path, tiny.network(), tracker=recorder)
    assert result.steps == 6
    assert [m for m in caplog.messages if "tracker failed" in m] == [
        "tracker failed, training goes on without it: ConnectionError: no route to host"
    ]


def test_the_tracker_is_closed_when_training_fails(tmp_path: Path) -> None:
    recorder = Recorder()

    def broken(step: int, micro: int) -> Any:
        raise RuntimeError("broken batch")

    with pytest.raises(RuntimeError, match="broken batch"):
        tiny.run(tmp_path, tiny.network(), tracker=recorder, batches=broken)
    assert recorder.finished == 1


def test_a_tracker_that_cannot_start_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Tracker:
        raise PermissionError("read-only")

    tracker = GuardedTracker(make)
    with caplog.at_level(logging.WARNING):
        tracker.log(1, {"loss": 1.0})
        tracker.log(2, {"loss": 1.0})
        tracker.finish()
    assert caplog.messages == ["tracker failed, training goes on without it: PermissionError: read-only"]


def test_guarding_twice_is_guarding_once() -> None:
    tracker = guarded(Recorder())
    assert guarded(tracker) is tracker


def test_none_writes_nothing(tmp_path: Path) -> None:
    tracker = plugins("train.trackers")["none"].Config().build(tmp_path, "run", {})
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    assert not list(tmp_path.iterdir())


def test_tensorboard_files_hold_the_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = tensorboard.Config().build(tmp_path, "run", {"lr": 0.1})
    tracker.log(1, {"loss": 2.0})
    tracker.log(2, {"loss": 1.5})
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.5)]


def test_wandb_is_offline_unless_told_otherwise(tmp_path: Path) -> None:
    tracker = wandb.Config().build(tmp_path, "run", {"lr": 0.1})
    tracker.log(1, {"loss": 2.0})
    tracker.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))


def test_bad_options_are_named_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="mode is 'cloud': choose one of offline, online, disabled"):
        wandb.Config(mode="cloud")
    with pytest.raises(ValueError, match="flush_every_s is 0"):
        tensorboard.Config(flush_every_s=0)
