"""Words in, exit code and one line out. The stages and plug-ins are stand-ins: only the command line is tested."""

import errno
import functools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inference.errors import InputError
from pipelines import cli, composition, config
from pipelines.locks import RegistryBusy
from train.errors import TrainingError

REPOSITORY = Path(__file__).resolve().parents[2]

PLUGIN = '''"""A stand-in."""
from dataclasses import dataclass
@dataclass
class Config:
    kind: str = "{kind}"
    layers: int = 8
    lr: float = 0.1
    def __post_init__(self):
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {{self.layers}}: keep one layer or more")
'''

KINDS = {
    "prompts": ("stdlib", "magpie"),
    "corpus": ("local", "server"),
    "draft": ("none", "lookup", "pruned"),
    "objective": ("lk",),
    "optimizer": ("adamw",),
    "tracker": ("none",),
    "lookahead": ("fixed",),
}

PRIMARY = """
defaults:
  - base_run
{defaults}
  - _self_
  - experiment: null
  - hydra/callbacks: [trials]
  - override hydra/job_logging: plain
  - override hydra/hydra_logging: plain
hydra:
  job:
    name: dspark
    chdir: false
  run:
    dir: outputs/${{process_id:}}
  sweep:
    dir: multirun/${{process_id:}}
"""


def write_stand_ins(folder: Path) -> None:
    """A package of plug-ins, one of schemas, and a conf package with a file for each."""
    conf, plugins = folder / "standin_conf", folder / "standin_plugins"
    defaults = []
    for group, kinds in KINDS.items():
        (plugins / group).mkdir(parents=True)
        (conf / group).mkdir(parents=True)
        (plugins / group / "__init__.py").write_text('"""Stand-ins."""\n')
        many = group in config.NAMED
        for kind in kinds:
            (plugins / group / f"{kind}.py").write_text(PLUGIN.format(kind=kind))
            header, at = (f"# @package {group}.{kind}\n", "@_here_") if many else ("", "")
            (conf / group / f"{kind}.yaml").write_text(f"{header}defaults: [base_{kind}{at}, _self_]\n")
        defaults.append(f"  - {group}: {'[' + ', '.join(kinds) + ']' if many else kinds[0]}")
    for group in config.SCHEMAS:
        (conf / group).mkdir()
        (conf / group / "default.yaml").write_text(f"defaults: [base_{group}, _self_]\n")
        defaults.append(f"  - {group}: default")
    (plugins / "__init__.py").write_text('"""Stand-ins."""\n')
    (plugins / "schema.py").write_text(PLUGIN.format(kind="only"))
    (conf / "__init__.py").write_text('"""Stand-ins."""\n')
    (conf / "experiment").mkdir()
    (conf / "experiment" / "smoke.yaml").write_text(
        "# @package _global_\ndefaults: [override /draft: [none, lookup], _self_]\nseed: 7\n"
    )
    (conf / "config.yaml").write_text(PRIMARY.format(defaults="\n".join(defaults)))
    hydra_files = REPOSITORY / "conf" / "hydra"
    for path in hydra_files.rglob("*.yaml"):
        copy = conf / "hydra" / path.relative_to(hydra_files)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())


class Runs(list[config.RunConfig]):
    """Configurations the stages were called with, and what the next call does."""

    act: Callable[[config.RunConfig], float] = staticmethod(lambda cfg: 1.25)

    def run(self, cfg: config.RunConfig, stage: str) -> float:
        assert stage == cfg.stage
        self.append(cfg)
        return self.act(cfg)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standins")
    write_stand_ins(folder)
    return folder


@pytest.fixture
def runs(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """The command line on the stand-ins, in an empty folder."""
    monkeypatch.syspath_prepend(str(stand_ins))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(composition, "CONF", "standin_conf")
    groups = {group: (f"standin_plugins.{group}",) for group in KINDS}
    schemas = dict.fromkeys(config.SCHEMAS, "standin_plugins.schema:Config")
    monkeypatch.setattr(config, "register", functools.partial(config.register, groups=groups, schemas=schemas))
    recorded = Runs()
    monkeypatch.setitem(sys.modules, "pipelines.run", SimpleNamespace(run=recorded.run))  # type: ignore[arg-type]
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield recorded
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    err = capsys.readouterr().err
    assert err.startswith("dspark: ") and err.count("\n") == 1, f"one line, got {err!r}"
    return err


def test_no_words_run_every_stage(runs: Runs) -> None:
    assert cli.main([]) == 0
    [run] = runs
    assert run.stage == "all"
    assert list(run.draft) == ["none", "lookup", "pruned"]
    assert type(run.draft["pruned"]).__module__ == "standin_plugins.draft.pruned"
    assert run.target.layers == 8  # type: ignore[attr-defined]


@pytest.mark.parametrize("stage", ["corpus", "build", "score", "select", "publish", "all"])
def test_the_first_word_is_the_stage(runs: Runs, stage: str) -> None:
    assert cli.main([stage, "draft=[lookup,pruned]", "draft.pruned.layers=4", "seed=3"]) == 0
    [run] = runs
    assert (run.stage, run.seed, run.draft["pruned"].layers) == (stage, 3, 4)
    assert list(run.draft) == ["lookup", "pruned"]


def test_one_draft_may_be_written_as_a_word(runs: Runs) -> None:
    assert cli.main(["build", "draft=pruned"]) == 0
    assert list(runs[0].draft) == ["pruned"]


def test_an_experiment_changes_choices_and_values(runs: Runs) -> None:
    assert cli.main(["experiment=smoke"]) == 0
    assert (runs[0].seed, list(runs[0].draft)) == (7, ["none", "lookup"])


@pytest.mark.parametrize("words", [["-m", "build"], ["build", "-m"], ["build", "--multirun"]])
def test_a_multirun_runs_each(runs: Runs, words: list[str]) -> None:
    assert cli.main([*words, "draft=none,lookup,[none,pruned]"]) == 0
    assert [list(run.draft) for run in runs] == [["none"], ["lookup"], ["none", "pruned"]]
    assert {run.stage for run in runs} == {"build"}


def test_the_objective_goes_back_to_a_sweeper(runs: Runs) -> None:
    from hydra import compose, initialize_config_module

    config.register()
    with initialize_config_module("standin_conf", version_base="1.3"):
        assert cli.job(compose("config")) == 1.25


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["bild"], "unknown stage 'bild': did you mean 'build'? stages are all, corpus"),
        (["x"], "unknown stage 'x': stages are"),
        (["seed=1", "build"], "'build' is not an override: the stage comes first"),
        (["build", "score"], "'score' is not an override"),
        (["--mutlirun"], "unknown option '--mutlirun': did you mean '--multirun'"),
        (["--cfg", "jb"], "--cfg takes one of job, hydra, all, got 'jb'"),
        (["--config-name"], "--config-name needs a value"),
        (["--multirun=2"], "--multirun takes no value [--multirun=2]"),
        (["draft=bogus"], "draft has no choice 'bogus': there are lookup, none, pruned"),
        (["draft=[none,prunned]"], "draft has no choice 'prunned': did you mean 'pruned'?"),
        (["corpus=servr"], "corpus has no choice 'servr': did you mean 'server'?"),
        (["experiment=smok"], "experiment has no choice 'smok': did you mean 'smoke'?"),
        (["drat=none"], "unknown key 'drat': did you mean 'draft'?"),
        (["sed=1"], "unknown key 'sed': did you mean 'seed'?"),
        (["draft.pruned.layer=4"], "unknown key 'draft.pruned.layer': did you mean 'draft.pruned.layers'?"),
        (["draft.prunned.layers=4"], "unknown key 'draft.prunned.layers': did you mean"),
        (["trainr.lr=1"], "unknown key 'trainr.lr': did you mean"),
        (["draft=lookup", "draft.pruned.layers=4"], "unknown key 'draft.pruned.layers': did you mean"),
        (["draft=[none"], "cannot read 'draft=[none' ("),
        (["=3"], "cannot read '=3': write key=value"),
        (["draft=none,lookup"], "draft=none,lookup names several values: write key=[a,b] for a list, or add -m"),
        (["draft.pruned.layers=many"], "could not be converted to Integer"),
        (["seed=x"], "could not be converted to Integer"),
        (["draft.pruned.layers=0"], "layers must be at least 1, got 0: keep one layer or more [configuration]"),
        (["draft=[]"], "draft is empty: choose at least one"),
        (["+draft.other.kind=pruned"], "draft.other was never chosen"),
        (["objective=null"], "cannot use objective=null: Config group"),
        (["seed=-1"], "seed must be at least 0, got -1"),
        (["stage=nothing"], "stage must be all or one of corpus"),
        (["target.layers=???"], "target.layers"),
        (["target.layers=${nowhere}"], "nowhere"),
        (["budget.corpus_minutes=0"], "budget.corpus_minutes must be above 0, got 0.0"),
        (["hydra/launcher=slurm"], "hydra/launcher has no choice 'slurm'"),
        (["-m", "draft=bogus,none"], "draft has no choice 'bogus'"),
        (["--config-dir", "/no/such/folder"], "/no/such/folder"),
        (["--config-name", "other"], "other"),
        (["~nothing"], "nothing"),
        (["+seed.x=1"], "seed"),
    ],
)
def test_bad_words_are_one_line_and_exit_2(
    runs: Runs, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], expected: str
) -> None:
    assert cli.main(words) == 2
    assert expected in said(capsys)
    assert runs == []
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and path.parts[-2] == "artifacts"]
    assert left == []


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (InputError("no prompts", where="a.jsonl:3", mend="add some"), 2, "no prompts [a.jsonl:3]: add some"),
        (TrainingError("loss is nan", where="step 7", mend="lower lr"), 2, "loss is nan [step 7]: lower lr"),
        (OSError(errno.ENOSPC, "x", "/out"), 2, "no space left on the disk [/out]: free some space"),
        (OSError(errno.EROFS, "x", "/out"), 2, "the file system is read only [/out]"),
        (RegistryBusy("another run holds the registry", where="r"), 4, "another run holds the registry [r]"),
    ],
)
def test_what_ends_a_stage_is_one_line_and_its_code(
    runs: Runs, capsys: pytest.CaptureFixture[str], error: Exception, code: int, expected: str
) -> None:
    def act(cfg: config.RunConfig) -> float:
        raise error

    runs.act = act
    assert cli.main(["build"]) == code
    assert expected in said(capsys)


def test_a_multirun_goes_on_without_the_job_that_failed(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    def act(cfg: config.RunConfig) -> float:
        if "lookup" in cfg.draft:
            raise RegistryBusy("another run holds the registry")
        return 1.0

    runs.act = act
    assert cli.main(["-m", "build", "draft=none,lookup,pruned"]) == 0
    assert len(runs) == 3, "the other jobs ran"
    assert "another run holds the registry" in capsys.readouterr().err, "the table says why"


def test_what_nobody_foresaw_keeps_its_traceback(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    def act(cfg: config.RunConfig) -> float:
        raise RuntimeError("a bug of ours")

    runs.act = act
    assert cli.main([]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "in act" in err and err.endswith("RuntimeError: a bug of ours\n")


def test_control_c_is_130(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    def act(cfg: config.RunConfig) -> float:
        raise KeyboardInterrupt

    runs.act = act
    assert cli.main([]) == 130
    assert "run the same command again" in said(capsys)


def test_output_that_cannot_be_written_is_bad_input(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    Path("outputs").write_text("a file in the way")
    assert cli.main([]) == 2
    assert "a file stands where a folder is needed" in said(capsys)
    assert runs == []


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["build", "--help"]])
def test_help_shows_stages_examples_and_groups(
    runs: Runs, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    for expected in ("corpus", "publish", "generate", "-m build", "--cfg job", "lookup, none, pruned", "exit codes"):
        assert expected in out
    assert runs == []


def test_help_is_there_at_once() -> None:
    started = time.monotonic()
    command = [sys.executable, "-X", "importtime", "-m", "pipelines.cli", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dspark: ")
    assert " torch\n" not in done.stderr, "help does not import torch"
    assert time.monotonic() - started < 10


def test_cfg_job_shows_the_stage_and_the_choices(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "--cfg", "job", "draft=pruned"]) == 0
    out = capsys.readouterr().out
    assert "stage: build" in out and "kind: pruned" in out and "kind: lookup" not in out
    assert runs == []


@pytest.mark.parametrize("words", [["--info"], ["--info", "defaults-tree"], ["score", "--info", "searchpath"]])
def test_info_works_as_hydra_users_expect(runs: Runs, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert cli.main(words) == 0
    assert "standin_conf" in capsys.readouterr().out or "defaults-tree" in words
    assert runs == []


def test_hydra_help_is_hydras(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--hydra-help"]) == 0
    assert "--multirun" in capsys.readouterr().out


def test_generate_is_not_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def main(words: list[str]) -> int:
        given.extend(words)
        return 0

    monkeypatch.setitem(sys.modules, "pipelines.generate", SimpleNamespace(main=main))  # type: ignore[arg-type]
    assert cli.main(["generate", "--pair", "registry/x", "a=b prompt", "--help"]) == 0
    assert given == ["--pair", "registry/x", "a=b prompt", "--help"]


def test_bad_input_of_generate_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main(words: list[str]) -> int:
        raise InputError("no pair here", where=words[1])

    monkeypatch.setitem(sys.modules, "pipelines.generate", SimpleNamespace(main=main))  # type: ignore[arg-type]
    assert cli.main(["generate", "--pair", "nowhere"]) == 2
    assert "no pair here [nowhere]" in said(capsys)


def test_hydra_is_left_as_it_was(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = list(sys.argv)
    cli.main(["draft=bogus"])
    assert sys.argv == before
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_plug_in_without_its_own_name_is_refused(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package: Any = tmp_path / "misnamed_plugins"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "right.py").write_text(PLUGIN.format(kind="wrong"))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TypeError, match=r"misnamed_plugins\.right must define a dataclass Config .*'right'"):
        config.register(groups={"draft": ("misnamed_plugins",)}, schemas={})
