"""The command that measures how training scales, on two CPU processes: all ways have the losses of one process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import scaling
from pipelines.scaling import REPLICATED, Place, clear, ways, zero
from tests.pipelines.tiny import REPOSITORY, Workplace, read


def measured(origin: Workplace, folder: Path, *options: str, words: tuple[str, ...] = ()) -> str:
    """What the command says that measures a tiny EAGLE-3 so."""
    own = [
        word
        for word in origin.words("draft=[none,eagle3]", "lookahead.tokens=3", *words)
        if not word.startswith(("paths.artifacts", "paths.registry", "hydra.", "trainer.steps", "trainer.checkpoint"))
    ]
    command = [sys.executable, "-m", "pipelines.scaling", "--folder", str(folder), *options, "--", *own]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_with_offload_the_losses_are_the_same(tiny_place: Workplace, tmp_path: Path) -> None:
    options = ("--sizes", "2", "--stages", "--micros", "2", "--steps", "3", "--offload", "optimizer", "all")
    said = measured(tiny_place, tmp_path / "out", *options)
    runs = read(tmp_path / "out" / "scaling.json")["runs"]
    assert list(runs) == ["plain", "offload_optimizer", "offload_all"]
    for kind in ("optimizer", "all"):
        run = runs[f"offload_{kind}"]
        assert (run["size"], run["stage"], run["offload"]) == (2, 3, kind)
        assert len(run["losses"]) == 3 and run["off"] < 1e-5
        assert run["step_seconds"] > 0 and run["peak_memory_gib"] > 0
    assert "offload_all: 2 processes" in said


@pytest.mark.slow
def test_replicated_drafts_are_measured_beside_the_same_plain_runs(tiny_place: Workplace, tmp_path: Path) -> None:
    options = ("--sizes", "1", "2", "--stages", "--replicated", "--micros", "2", "--steps", "3", "--profile", "0")
    said = measured(tiny_place, tmp_path / "out", *options, words=("trainer.captured=on",))
    runs = read(tmp_path / "out" / "scaling.json")["runs"]
    assert {name: (run["size"], run["micros"]) for name, run in runs.items()} == {
        "plain": (1, 2),
        "plain_2x": (1, 4),
        "replicated_strong_2": (2, 2),
        "replicated_weak_2": (2, 4),
    }
    for kind in ("strong", "weak"):
        run = runs[f"replicated_{kind}_2"]
        assert len(run["losses"]) == 3 and run["off"] < 1e-6 and run["step_seconds"] > 0
    assert "replicated_weak_2: 2 processes, 4 micro-batches" in said


def test_the_first_stage_and_replicated_drafts_are_measured_both_ways_on_every_size() -> None:
    found = ways([1, 2, 4], [2, 3], replicated=True)
    assert [(arm.name, kind, size) for arm, kind, size in found] == [
        ("zero2", "strong", 1),
        ("zero2", "strong", 2),
        ("zero2", "weak", 2),
        ("zero2", "strong", 4),
        ("zero2", "weak", 4),
        ("zero3", "strong", 4),
        *[("replicated", kind, size) for size in (2, 4) for kind in ("strong", "weak")],
    ]
    assert ways([1, 2], [1], replicated=False) == [(zero(1), "strong", 1), (zero(1), "strong", 2), (zero(1), "weak", 2)]
    assert ways([1], [], replicated=True) == [] and REPLICATED.engine == ("trainer=replicated",)


def test_a_corpus_of_the_same_words_stays_and_all_else_goes(tmp_path: Path) -> None:
    place = Place(tmp_path, ("budget.responses=8",), 3)

    def left(own: Place) -> list[str]:
        for name in ("corpus", "plain"):
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "scaling.json").touch()
        clear(own)
        return sorted(child.name for child in tmp_path.iterdir())

    clear(place)
    assert left(place) == ["corpus", "words.json"]
    assert left(Place(tmp_path, ("budget.responses=9",), 3)) == ["words.json"]
    (tmp_path / "words.json").write_text("[", encoding="utf-8")
    assert left(place) == ["words.json"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    assert scaling.main(["--folder", str(tmp_path)]) == 2
    assert "this folder holds something else" in capsys.readouterr().err
    assert [child.name for child in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_measurement_that_is_stopped_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[str] = []

    def run(place: Place, name: str, *given: Any, **named: Any) -> None:
        runs.append(name)
        if len(runs) == 3:
            raise KeyboardInterrupt

    outcome = {"losses": [1.0], "step_seconds": 0.5, "collectives": None, "peak_memory_gib": 1.0}
    monkeypatch.setattr(Place, "run", run)
    monkeypatch.setattr(Place, "outcome", lambda place, name: outcome)
    monkeypatch.setattr(scaling, "finished", lambda process: "")
    assert scaling.main(["--folder", str(tmp_path / "out"), "--", "seed=1"]) == 130
    assert runs == ["corpus", "plain", "plain_2x"]
    assert list(read(tmp_path / "out" / "scaling.json")["runs"]) == ["plain"]
    assert "stopped; what was measured is in" in capsys.readouterr().out
