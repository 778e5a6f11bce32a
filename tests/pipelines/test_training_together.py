"""Training on two processes by the command line: what one process learns, by every engine, every kind of draft."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.pipelines.tiny import REPOSITORY, Workplace, run
from train.checkpoint import newest_snapshot

DRAFTS = "draft=[none,pruned,eagle3,dspark]"
STEPS = ("trainer.steps=5", "trainer.log_every_steps=1", "lookahead.tokens=3")
TOGETHER = ("trainer=deepspeed", "trainer.accumulation=4")
COPIES = ("trainer=replicated", "trainer.accumulation=4")
BARE = ("corpus.keep_features=false", "corpus.keep_states=false")


def launch(words: Sequence[str], *, size: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.cli", "launch", "--processes", str(size), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, err
    return out + err


def curves(place: Workplace) -> dict[str, list[float]]:
    """Losses by kind of draft."""
    found = {}
    for history in place.artifacts.glob("draft/*/history.json"):
        kind = json.loads((history.parent / "manifest.json").read_text())["metrics"]["kind"]
        found[kind] = [line["loss"] for line in json.loads(history.read_text()) if "loss" in line]
    return found


def drafts(place: Workplace) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by kind of draft."""
    found = {}
    for file in place.artifacts.glob("draft/*/draft/model.safetensors"):
        kind = json.loads((file.parents[1] / "manifest.json").read_text())["metrics"]["kind"]
        found[kind] = load_file(file)
    return found


class Alone:
    """Drafts that one process trained, and a place with its corpus for others to train on."""

    def __init__(self, root: Path, origin: Workplace, *words: str) -> None:
        self.place, self.words = origin.again(root / "alone"), (*STEPS, *words)
        for stage in ("corpus", "build"):
            text, code = run(self.place.words(DRAFTS, *self.words, "trainer.accumulation=4", stage=stage))
            assert code == 0, text
        self.curves, self.drafts = curves(self.place), drafts(self.place)
        assert self.curves.keys() == {"pruned", "eagle3", "dspark"}

    def beside(self, root: Path) -> Workplace:
        place = self.place.again(root)
        for kind in ("corpus", "plan"):
            shutil.copytree(self.place.artifacts / kind, place.artifacts / kind)
        return place

    def compare(self, place: Workplace, kinds: set[str]) -> None:
        found, tensors = curves(place), drafts(place)
        assert found.keys() == kinds
        for kind in kinds:
            assert found[kind] == pytest.approx(self.curves[kind], rel=1e-5)
            for name, value in self.drafts[kind].items():
                # Both are rounded to bf16, and Adam's first steps divide small gradients by themselves: the last bits
                # of a sum may move a weight by a part of the learning rate (1e-3).
                torch.testing.assert_close(tensors[kind][name].float(), value.float(), rtol=2**-7, atol=2e-4)


@pytest.fixture(scope="module")
def alone(tiny_place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(tmp_path_factory.mktemp("kept"), tiny_place)


@pytest.fixture(scope="module")
def bare(tiny_place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The same over a corpus that kept neither states nor features."""
    return Alone(tmp_path_factory.mktemp("bare"), tiny_place, *BARE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "together", [(*TOGETHER, "trainer.zero_stage=2"), (*TOGETHER, "trainer.zero_stage=3"), COPIES], ids=" ".join
)
def test_two_processes_train_every_kind_as_one_does(alone: Alone, tmp_path: Path, together: tuple[str, ...]) -> None:
    place = alone.beside(tmp_path / "two")
    said = finish(launch(place.words(DRAFTS, *alone.words, *together, stage="build")))
    alone.compare(place, {"pruned", "eagle3", "dspark"})
    assert said.count("training pruned: 5 steps") == 1  # the first process alone talks
    assert "Warning" not in said


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_the_lower_stages_do_the_same(alone: Alone, tmp_path: Path, stage: int) -> None:
    place = alone.beside(tmp_path / "two")
    words = place.words("draft=[none,dspark]", *alone.words, *TOGETHER, f"trainer.zero_stage={stage}", stage="build")
    finish(launch(words))
    alone.compare(place, {"dspark"})


@pytest.mark.slow
def test_two_processes_with_captured_passes_and_a_resident_corpus_make_the_draft_of_one(
    alone: Alone, tmp_path: Path
) -> None:
    common = ("draft=[none,eagle3]", *alone.words, "trainer.captured=on")
    one, two = (alone.beside(tmp_path / name) for name in ("one", "two"))
    text, code = run(one.words(*common, "trainer.accumulation=4", stage="build"))
    assert code == 0, text
    said = finish(launch(two.words(*common, *COPIES, stage="build")))
    assert said.count("eagle3: 0.0 GiB of the corpus onto the device") == 1, "the first process alone says it"
    assert curves(two)["eagle3"] == pytest.approx(curves(one)["eagle3"], rel=1e-6)
    wanted, found = drafts(one)["eagle3"], drafts(two)["eagle3"]
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # Both are rounded to bf16: a difference in the last bits of a sum may tip that.
        torch.testing.assert_close(found[name].float(), value.float(), rtol=2**-7, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("together", [TOGETHER, COPIES], ids=" ".join)
def test_a_spread_target_is_captured_by_all(bare: Alone, tmp_path: Path, together: tuple[str, ...]) -> None:
    place = bare.beside(tmp_path / "two")
    words = place.words(DRAFTS, *bare.words, *together, "target.spread_teacher=true", stage="build")
    finish(launch(words))
    bare.compare(place, {"pruned", "eagle3", "dspark"})


def begun(alone: Alone, root: Path, together: tuple[str, ...] = TOGETHER) -> tuple[subprocess.Popen[str], Path]:
    """A training of two processes that has saved two of its many steps, and where it saves them."""
    place = alone.beside(root)
    long = ("trainer.steps=400", "trainer.checkpoint_every_steps=1")
    process = launch(place.words("draft=[none,dspark]", *alone.words, *together, *long, stage="build"))
    while not (found := list(place.artifacts.glob("draft/.partial-*/checkpoints/step-00000002"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process, found[0].parent


@pytest.mark.slow
def test_sigterm_saves_the_step_and_says_how_to_go_on(alone: Alone, tmp_path: Path) -> None:
    process, _ = begun(alone, tmp_path / "two")
    process.send_signal(signal.SIGTERM)
    said = finish(process, code=143)
    (line,) = [line for line in said.splitlines() if line.startswith("dspark: ")]
    assert "stopped by SIGTERM, step " in line
    assert "of the training is saved; resume with: dspark build " in line
    assert "'draft=[none,dspark]'" in line


@pytest.mark.slow
@pytest.mark.parametrize("together", [TOGETHER, COPIES], ids=" ".join)
def test_a_lost_process_ends_all_with_one_line_and_a_whole_checkpoint(
    alone: Alone, tmp_path: Path, together: tuple[str, ...]
) -> None:
    process, checkpoints = begun(alone, tmp_path / "two", together)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "--nproc-per-node" not in p.cmdline()]
    ranks[-1].kill()
    said = finish(process, code=1)
    assert said.count("dspark: another process of this run ended or does not answer") == 1
    assert newest_snapshot(checkpoints) is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trainer=deepspeed", "trainer.accumulation=3"), "3 micro-batches a step cannot be dealt to 2 processes"),
        (("trainer=replicated", "trainer.accumulation=3"), "3 micro-batches a step cannot be dealt to 2 processes"),
        ((*TOGETHER, "optimizer=adamw8bit"), "8-bit optimizer state cannot be spread"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_shared_out_is_refused_before_anything_is_made(
    tiny_place: Workplace, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    place = tiny_place.again(tmp_path / "two")
    text = finish(launch(place.words("draft=[none,dspark]", *STEPS, *words)), code=2)
    assert text.count(f"dspark: {said}") == 1
    assert not place.artifacts.exists()
