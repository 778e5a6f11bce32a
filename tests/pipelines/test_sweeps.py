"""Sweeps: a trial that fails is noted and passed over, by every launcher and sweeper; the table says what happened."""

import contextlib
import csv
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from inference.errors import InputError
from pipelines import cli, config, sweeps
from tests.pipelines.tiny import REPOSITORY, Workplace, read

Act = Callable[[config.RunConfig], float]


class Stages:
    """Stands in for the stages: the command line, Hydra and the configuration are the real ones."""

    def __init__(self) -> None:
        self.act: Act = lambda cfg: 1.0

    def run(self, cfg: config.RunConfig, stage: str) -> float:
        return self.act(cfg)


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stages]:
    """Stand-in stages, in an empty folder."""
    stand_in = Stages()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pipelines.run", SimpleNamespace(run=stand_in.run))  # type: ignore[arg-type]
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield stand_in
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def fails_on(name: str, error: Exception) -> Act:
    """Every trial has a value but those with one draft."""

    def act(cfg: config.RunConfig) -> float:
        if name in cfg.draft:
            raise error
        return {"none": 1.0, "quantized": 1.5}[next(iter(cfg.draft))]

    return act


WORDS = ["-m", "build", "draft=none,lookup,quantized", "seed=3", "hydra.sweep.dir=swept"]


def test_a_trial_that_fails_is_noted_and_passed_over(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    stages.act = fails_on("lookup", InputError("no such corpus", where="corpus", mend="write one"))
    assert cli.main(WORDS) == 0
    said = read(Path("swept/sweep.json"))
    assert [(t["trial"], t["overrides"], t["value"], t["reason"]) for t in said["table"]] == [
        (0, ["draft=none"], 1.0, ""),
        (1, ["draft=lookup"], None, "no such corpus [corpus]: write one"),
        (2, ["draft=quantized"], 1.5, ""),
    ]
    assert (said["trials"], said["failed"], said["stage"]) == (3, 1, "build")
    assert said["best"] == {"trial": 2, "value": 1.5, "overrides": ["stage=build", "draft=quantized", "seed=3"]}
    assert said["common"] == ["stage=build", "seed=3"]
    rows = list(csv.DictReader(Path("swept/sweep.csv").read_text().splitlines()))
    assert [(row["trial"], row["draft"], row["value"]) for row in rows] == [
        ("0", "none", "1.0"),
        ("1", "lookup", ""),
        ("2", "quantized", "1.5"),
    ]
    shown = capsys.readouterr()
    assert "best      trial 2: 1.5 (draft=quantized)" in shown.out
    assert "no such corpus" in shown.err


def test_a_sweep_without_one_success_fails_in_one_line(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    def act(cfg: config.RunConfig) -> float:
        raise InputError("no such corpus")

    stages.act = act
    assert cli.main(WORDS) == 1
    assert capsys.readouterr().err.endswith("dspark: no trial of 3 succeeded; trial 0: no such corpus\n")
    assert read(Path("swept/sweep.json"))["best"] is None


def test_batches_after_one_with_a_failure_are_run(stages: Stages) -> None:
    stages.act = fails_on("none", InputError("not this one"))
    assert cli.main([*WORDS, "hydra.sweeper.max_batch_size=1", "draft=none,quantized"]) == 0
    assert [t["value"] for t in read(Path("swept/sweep.json"))["table"]] == [None, 1.5]


def test_words_that_do_not_compose_start_no_trial(stages: Stages) -> None:
    assert cli.main(["-m", "build", "draft=none,bogus", "hydra.sweep.dir=swept"]) == 2
    assert not Path("swept/sweep.json").exists()


def test_a_wrong_word_beside_a_sweep_is_named(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra `sweep`")
    assert cli.main(["build", "sweep=joblib", "seed=1,2", "drat=none"]) == 2
    assert capsys.readouterr().err == "dspark: unknown key 'drat': did you mean 'draft'?\n"


def test_trials_of_an_earlier_sweep_in_the_same_folder_do_not_count(stages: Stages) -> None:
    assert cli.main(["-m", "build", "seed=1,2,3", "hydra.sweep.dir=swept"]) == 0
    assert cli.main(["-m", "build", "seed=4,5", "hydra.sweep.dir=swept"]) == 0
    assert [t["overrides"] for t in read(Path("swept/sweep.json"))["table"]] == [["seed=4"], ["seed=5"]]


def test_what_nobody_foresaw_is_a_reason_and_a_traceback_in_the_log(stages: Stages) -> None:
    stages.act = fails_on("lookup", RuntimeError("a bug\nof ours"))
    assert cli.main(WORDS) == 0
    assert read(Path("swept/sweep.json"))["table"][1]["reason"] == "RuntimeError: a bug of ours"
    assert "Traceback" in Path("swept/1/dspark.log").read_text()


def test_a_sweep_that_is_stopped_shows_how_far_it_came(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    def act(cfg: config.RunConfig) -> float:
        if "lookup" in cfg.draft:
            raise KeyboardInterrupt
        return 1.0

    stages.act = act
    assert cli.main(WORDS) == cli.STOPPED
    table = read(Path("swept/sweep.json"))["table"]
    assert [(t["value"], t["reason"]) for t in table] == [(1.0, ""), (None, "stopped, or killed, before it ended")]


def test_a_launcher_that_breaks_ends_the_sweep_after_its_table(tmp_path: Path) -> None:
    def entry() -> None:
        sweeps._begun.append(sweeps.Sweep("s", tmp_path, "build"))
        sweeps.Trial("s", 0, ["seed=1"], str(tmp_path / "0"), 0.0, value=1.0).write()
        raise RuntimeError("a worker was killed\nand more")

    with pytest.raises(sweeps.SweepFailed, match=r"0 of 1 trials begun had ended: RuntimeError: a worker was killed$"):
        sweeps.conclude(entry)
    assert read(tmp_path / "sweep.json")["table"][0]["value"] == 1.0


def test_a_single_run_leaves_no_note(stages: Stages) -> None:
    assert cli.main(["build", "hydra.run.dir=once"]) == 0
    assert not list(Path("once").glob("*.json"))


def test_of_equal_trials_the_first_is_best(tmp_path: Path) -> None:
    trials = [sweeps.Trial("s", n, [f"seed={n}"], "", 0.0, value=value) for n, value in enumerate([None, 0.5, 0.5])]
    best = sweeps._best(trials)
    assert best is not None and best.trial == 1


def test_secrets_do_not_reach_the_notes(tmp_path: Path) -> None:
    trials = sweeps.Trials()
    node = {
        "mode": "MULTIRUN",
        "overrides": {"task": ["seed=1", "corpus.api_key=sk-123"]},
        "runtime": {"output_dir": str(tmp_path)},
        "job": {"num": 0},
    }
    settings = OmegaConf.create({"hydra": node})
    OmegaConf.update(settings, "hydra.mode", sweeps.RunMode.MULTIRUN)
    trials.argv = list(sys.argv)
    trials.on_job_start(settings)
    returned = JobReturn(status=JobStatus.COMPLETED, _return_value=2.0)
    trials.on_job_end(settings, returned)
    assert "sk-123" not in (tmp_path / "trial.json").read_text()
    assert read(tmp_path / "trial.json")["value"] == 2.0


def forget(group: str) -> None:
    """Take one of Hydra's plug-in groups away, as where it is not installed; each test has a store of its own."""
    node: dict[str, Any] = ConfigStore.instance().repo
    *parents, last = group.split("/")
    for name in parents:
        node = node.get(name, {})
    node.pop(last, None)


@pytest.mark.parametrize(
    ("word", "gone"),
    [
        ("sweep=optuna", "hydra/sweeper/optuna.yaml"),
        ("sweep=joblib", "hydra/launcher/joblib.yaml"),
        ("sweep=submitit_local", "hydra/launcher/submitit_local.yaml"),
        ("sweep=slurm", "hydra/launcher/submitit_slurm.yaml"),
        ("hydra/sweeper=optuna", "hydra/sweeper/optuna.yaml"),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(
    stages: Stages, capsys: pytest.CaptureFixture[str], word: str, gone: str
) -> None:
    forget(gone)
    assert cli.main(["build", word]) == 2
    err = capsys.readouterr().err
    missing = gone.removesuffix(".yaml")
    assert err == f"dspark: {missing} is not installed: pip install 'dspark[sweep]', or `-e .[sweep]`\n"


def test_speed_measured_side_by_side_is_warned_about(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra `sweep`")
    node = {"sweep": {"dir": "swept"}, "launcher": {"_target_": "x.JoblibLauncher"}}
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(sweeps.logger, "warning", lambda text: said.append(text))
        sweeps.Trials().on_multirun_start(OmegaConf.create({"stage": "score", "hydra": node}))
        sweeps.Trials().on_multirun_start(OmegaConf.create({"stage": "build", "hydra": node}))
    assert len(said) == 1 and "disturb each other's speed" in said[0]


# Real sweeps over the tiny target, in processes of their own


def dspark(place: Workplace, *words: str, stage: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does; a trial's registry is its own."""
    own = [w for w in place.words(*words, stage=stage) if not w.startswith("paths.registry=")]
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *own],
        cwd=place.root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def table(place: Workplace) -> list[dict[str, Any]]:
    """Rows of the place's last sweep."""
    rows: list[dict[str, Any]] = read(place.root / "multirun" / "sweep.json")["table"]
    return rows


@pytest.mark.slow
def test_whole_loops_side_by_side_share_what_they_have_in_common(tiny_place: Workplace, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra `sweep`")
    here = tiny_place.again(tmp_path / "here")
    done = dspark(here, "sweep=joblib", "draft=[none,pruned]", "draft.pruned.layers=1,2,999")
    assert done.returncode == 0, done.stderr
    first, second, third = table(here)
    assert min(first["value"], second["value"]) >= 1.0, "drafting nothing is a candidate too"
    assert third["value"] is None and "cannot keep 999 of 3 layers" in third["reason"]
    assert len(here.complete("corpus")) == 1 and len(here.complete("draft")) == 3, "none, and pruned twice"
    for trial in (first, second):
        assert (Path(trial["folder"]) / "registry" / "tiny" / "champion" / "pair.json").is_file()
    assert not here.registry.exists(), "the user's registry is left alone"
    made = read(here.complete("draft")[0] / "manifest.json")
    assert "sweep=joblib" in made["argv"], "provenance names the user's words, not the worker's"


@pytest.mark.slow
def test_optuna_learns_from_what_succeeds_and_goes_on_with_its_study(tiny_place: Workplace, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra `sweep`")
    here = tiny_place.again(tmp_path / "here")
    assert dspark(here, "draft=pruned", "draft.pruned.layers=1", stage="corpus").returncode == 0
    words = [
        "sweep=optuna",
        "draft=pruned",
        "draft.pruned.layers=choice(1,999)",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.storage=sqlite:///study.db",
    ]
    done = dspark(here, *words, stage="build")
    assert done.returncode == 0, done.stderr
    rows = table(here)
    failed = [row for row in rows if row["value"] is None]
    # The sampler's seed is fixed: of three draws some are 999, which the target has no layers for.
    assert len(rows) == 3 and 0 < len(failed) < 3
    assert all("cannot keep 999" in row["reason"] for row in failed)
    assert dspark(here, *words, stage="build").returncode == 0
    # Of `choice(1,999)` the study keeps the position.
    query = "select state, param_value, value from trials join trial_params using (trial_id) "
    with contextlib.closing(sqlite3.connect(here.root / "study.db")) as database:
        trials = database.execute(query + "left join trial_values using (trial_id)").fetchall()
    [draft] = here.complete("draft")
    acceptance = read(draft / "manifest.json")["metrics"]["eval/acceptance"]
    assert len(trials) == 6
    assert set(trials) == {("COMPLETE", 0.0, acceptance), ("FAIL", 1.0, None)}


@pytest.mark.slow
def test_submitit_runs_the_trials_as_jobs(tiny_place: Workplace, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra `sweep`")
    here = tiny_place.again(tmp_path / "here")
    assert dspark(here, "draft=pruned", "draft.pruned.layers=1", stage="corpus").returncode == 0
    done = dspark(here, "sweep=submitit_local", "draft=pruned", "draft.pruned.layers=1,999", stage="build")
    assert done.returncode == 0, done.stderr
    first, second = table(here)
    assert 0.0 < first["value"] < 1.0
    assert second["value"] is None and second["reason"].startswith("cannot keep 999")
