"""Trackers write what they are given, and whatever happens to one of them training goes on."""

import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from inference.plugins import plugins
from tests.train import tiny
from train.trackers import (
    GuardedTracker,
    NoTracker,
    TrackedArtifact,
    Tracker,
    guarded,
    lent,
    tensorboard,
    wandb,
    within,
)

REPOSITORY = Path(__file__).resolve().parents[2]
CORPUS = TrackedArtifact("corpus", "mine", "c" * 64)


class Recorder:
    """Keeps what it is told."""

    def __init__(self, *, fail_at: int = 0, fail_on_finish: bool = False) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.finished, self.fail_at, self.fail_on_finish = 0, fail_at, fail_on_finish

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        if step == self.fail_at:
            raise ConnectionError("no route to host")
        self.lines.append((step, metrics))

    def artifact(
        self, made: TrackedArtifact, /, *, uses: Sequence[TrackedArtifact], metadata: Mapping[str, Any]
    ) -> None:
        raise ConnectionError("no route to host")

    def finish(self) -> None:
        self.finished += 1
        if self.fail_on_finish:
            raise ConnectionError("no route to host")


def test_the_tracker_gets_every_line_and_is_closed_once(tmp_path: Path) -> None:
    recorder = Recorder()
    tiny.run(tmp_path, tiny.network(), tracker=recorder, peak_tflops=1.0)
    assert [step for step, _ in recorder.lines] == [3, 4, 6, 6]
    learned = {"loss", "accuracy", "lr", "grad_norm", "tokens", "seconds"}
    used = {"memory_gib", "steps_per_s", "tokens_per_s", "mfu"}
    assert set(recorder.lines[1][1]) == set(recorder.lines[2][1]) == learned | used
    assert 0.0 < recorder.lines[2][1]["mfu"] < 1.0
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


def test_what_is_lent_is_closed_by_its_owner_alone(tmp_path: Path) -> None:
    recorder = Recorder()
    tiny.run(tmp_path, tiny.network(), tracker=lent(recorder))
    assert recorder.lines and recorder.finished == 0
    nothing = NoTracker()
    assert lent(nothing) is nothing and guarded(nothing) is nothing, "the loop sees that nobody wants its figures"


def test_lineage_can_fail_too_and_ends_the_tracker(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    tracker = guarded(recorder)
    with caplog.at_level(logging.WARNING):
        tracker.artifact(CORPUS, uses=[], metadata={})
        tracker.log(1, {"loss": 1.0})
    assert caplog.messages == ["tracker failed, training goes on without it: ConnectionError: no route to host"]
    assert recorder.lines == []


def test_trackers_of_one_configuration_warn_once_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file in the way")
    config = tensorboard.Config()
    with caplog.at_level(logging.WARNING):
        for name in ("corpus", "draft", "pair"):
            tracker = config.build(tmp_path, name, {})
            tracker.log(1, {"loss": 1.0})
            tracker.finish()
    assert len(caplog.messages) == 1 and "tracker failed" in caplog.messages[0]


def test_a_long_story_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Tracker:
        raise ConnectionError("first\nsecond\n" + "x" * 1000)

    with caplog.at_level(logging.WARNING):
        GuardedTracker(make).log(1, {})
    [said] = caplog.messages
    assert "first second xxx" in said and len(said) < 400


def test_an_action_that_hangs_is_left_alone() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        within(0.1, lambda: time.sleep(5))
    assert time.monotonic() - started < 2


def test_an_action_in_time_raises_what_it_raises() -> None:
    done: list[int] = []
    within(5, lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ConnectionError, match="refused"):
        within(5, lambda: _raise(ConnectionError("refused")))


def _raise(error: Exception) -> None:
    raise error


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


def test_tensorboard_keeps_lineage_as_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = tensorboard.Config().build(tmp_path, "run", {})
    made = TrackedArtifact("draft", "mine-pruned", "d" * 64, tmp_path)
    tracker.artifact(made, uses=[CORPUS], metadata={"seed": 0})
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run"))
    events.Reload()
    [event] = events.Tensors("lineage/draft-mine-pruned/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text.split("\n") == [
        f"    made draft mine-pruned {'d' * 64} in {tmp_path}",
        f"    from corpus mine {'c' * 64}",
        "    seed: 0",
    ]


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of a .wandb file: a 7-byte header, then LevelDB's log format, 32 KiB blocks of whole or cut records."""
    from wandb.proto import wandb_internal_pb2

    data, position, block, parts = file.read_bytes(), 7, 32768, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        room = block - position % block
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def offline_records(folder: Path) -> list[Any]:
    """Records of the one offline run below a folder; wandb's helper process may still be writing the last ones."""
    [file] = (folder / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        records = list(wandb_records(file))
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    pytest.fail("the run was not closed")


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No settings of the user's; caches in the test's folder."""
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return tmp_path / "work"


def test_wandb_is_offline_unless_told_otherwise(wandb_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = wandb.Config().build(wandb_home, "run", {"lr": 0.1})
    with caplog.at_level(logging.WARNING):
        tracker.log(1, {"loss": 2.0})
        tracker.log(2, {"loss": 1.5})
        tracker.finish()
    assert caplog.messages == []
    records = offline_records(wandb_home)
    history = [{item.nested_key[0]: item.value_json for item in r.history.item} for r in records if r.history.item]
    assert [(line["_step"], line["loss"]) for line in history] == [("1", "2"), ("2", "1.5")]
    [run] = [r.run for r in records if r.HasField("run")]
    assert run.display_name == "run" and {u.key: u.value_json for u in run.config.update}["lr"] == "0.1"


def test_wandb_keeps_lineage_as_artifacts(wandb_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = wandb_home / "draft" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    tracker = wandb.Config().build(wandb_home, "run", {})
    made = TrackedArtifact("draft", "mine-pruned", "d" * 64, weights.parent)
    with caplog.at_level(logging.WARNING):
        tracker.artifact(made, uses=[CORPUS], metadata={"seed": 0})
        tracker.finish()
    assert caplog.messages == []
    [artifact] = [r.artifact for r in offline_records(wandb_home) if r.HasField("artifact")]
    assert (artifact.type, artifact.name) == ("draft", "draft-mine-pruned")
    assert set(artifact.aliases) == {"latest", "d" * 64}
    described = {
        "kind": "draft",
        "name": "mine-pruned",
        "digest": "d" * 64,
        "folder": str(weights.parent),
        "uses": [{"kind": "corpus", "name": "mine", "digest": "c" * 64}],
        "seed": 0,
    }
    assert json.loads(artifact.metadata) == described
    [entry] = artifact.manifest.contents
    assert entry.path == "lineage.json", "weights stay where they are"
    assert json.loads(Path(entry.local_path).read_text()) == described


def test_wandb_uploads_weights_only_when_asked(wandb_home: Path) -> None:
    (wandb_home / "draft").mkdir(parents=True)
    (wandb_home / "draft" / "model.safetensors").write_bytes(b"weights")
    tracker = wandb.Config(upload=True).build(wandb_home, "run", {})
    tracker.artifact(TrackedArtifact("draft", "mine", "d" * 64, wandb_home / "draft"), uses=[], metadata={})
    tracker.finish()
    [artifact] = [r.artifact for r in offline_records(wandb_home) if r.HasField("artifact")]
    assert {e.path for e in artifact.manifest.contents} == {"files/model.safetensors", "lineage.json"}


def test_wandb_writes_no_secret_of_the_process(wandb_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ["sk-on-the-command-line", "k" * 40]
    monkeypatch.setattr(sys, "argv", ["dspark", f"corpus.api_key={secrets[0]}"])
    monkeypatch.setenv("WANDB_API_KEY", secrets[1])
    tracker = wandb.Config().build(wandb_home, "run", {})
    tracker.log(1, {"loss": 1.0})
    tracker.artifact(CORPUS, uses=[], metadata={})
    tracker.finish()
    written = [path.read_bytes() for path in wandb_home.parent.rglob("*") if path.is_file()]
    assert written and not any(secret.encode() in content for secret in secrets for content in written)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    (tmp_path / "taken").write_text("a file in the way")
    tracker = plugins("train.trackers")[kind].Config().build(tmp_path / "taken", "run", {})
    with caplog.at_level(logging.WARNING):
        assert tiny.run(tmp_path / "work", tiny.network(), tracker=tracker).steps == 6
    assert len([m for m in caplog.messages if "tracker failed" in m]) == 1


def test_a_missing_package_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    tracker = wandb.Config().build(tmp_path / "tracker", "run", {})
    with caplog.at_level(logging.WARNING):
        assert tiny.run(tmp_path / "work", tiny.network(), tracker=tracker).steps == 6
    assert len([m for m in caplog.messages if "tracker failed" in m]) == 1


TRAINING = """
import logging, resource, sys, time
from pathlib import Path
from inference.plugins import plugins
from tests.train import tiny
logging.basicConfig(level=logging.WARNING, format="%(message)s")
root, kind, settings, limit = Path(sys.argv[1]), sys.argv[2], eval(sys.argv[3]), int(sys.argv[4])
tracker = plugins("train.trackers")[kind].Config(**settings).build(root / "tracker", "run", {})
if limit:
    import torch.utils.tensorboard
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
result = tiny.run(root / "work", tiny.network(), tracker=tracker, log_every_steps=1, checkpoint_every_steps=0,
                  steps=100, evaluate_every_steps=0)
print("steps", result.steps)
"""


def train_in_a_process(
    root: Path, kind: str, settings: dict[str, Any], *, limit_bytes: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Train the tiny network with a tracker; a limit stands for a full disk."""
    return subprocess.run(
        [sys.executable, "-c", TRAINING, str(root), kind, repr(settings), str(limit_bytes)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def black_hole() -> Iterator[int]:
    """Port of a server that takes connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield server.getsockname()[1]


@pytest.mark.parametrize("answers", [False, True], ids=["nobody listens", "nobody answers"])
def test_a_dead_server_costs_a_warning_and_bounded_time(tmp_path: Path, black_hole: int, answers: bool) -> None:
    started = time.monotonic()
    done = train_in_a_process(
        tmp_path,
        "wandb",
        {"mode": "online", "timeout_s": 3.0},
        WANDB_MODE="online",
        WANDB_BASE_URL=f"http://127.0.0.1:{black_hole if answers else 9}",
        WANDB_API_KEY="k" * 40,
        WANDB_CONFIG_DIR=str(tmp_path / "home"),
    )
    assert done.returncode == 0 and "steps 100" in done.stdout, done.stderr
    assert done.stderr.count("tracker failed") == 1
    assert "k" * 40 not in done.stderr + done.stdout
    # Three seconds for the start; on its way out wandb waits about ten for its own helper process.
    assert time.monotonic() - started < 60


def test_a_full_disk_costs_a_warning(tmp_path: Path) -> None:
    done = train_in_a_process(tmp_path, "tensorboard", {}, limit_bytes=20000)
    assert done.returncode == 0 and "steps 100" in done.stdout, done.stderr
    assert done.stderr.count("tracker failed") == 1 and "File too large" in done.stderr


def test_bad_options_are_named_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="mode is 'cloud': choose one of offline, online, disabled"):
        wandb.Config(mode="cloud")
    with pytest.raises(ValueError, match="timeout_s is 0"):
        wandb.Config(timeout_s=0.0)
    with pytest.raises(ValueError, match="flush_every_s is 0"):
        tensorboard.Config(flush_every_s=0)
