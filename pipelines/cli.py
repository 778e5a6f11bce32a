"""The command line: `dspark [stage] [Hydra words]`, and `dspark generate` for decoding with a published pair.

    dspark corpus experiment=smoke

It finds the stage, lets Hydra compose the configuration, converts that once, calls `pipelines.run.run` and turns what
went wrong into one line and an exit code. What the stages do is not known here.
"""

import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from inference.errors import InputError, ProcessLost

DONE, FAILED, BAD_INPUT, KEPT, BUSY, STOPPED, TERMINATED = 0, 1, 2, 3, 4, 130, 143
"""Exit codes."""

COMMANDS = {
    "all": "the five stages below, in order (the default)",
    "corpus": "let the target answer the prompts",
    "build": "make every candidate draft",
    "score": "measure acceptance and speed of every candidate",
    "select": "choose the best pair",
    "publish": "put the chosen pair into the registry",
    "plan": "parameters, memory, time and disk of a run before it is run, and whether it fits",
    "load": "measure throughput and latency of many requests at once; not part of all",
    "drift": "look at the traffic log: has the published pair drifted, and why",
    "realign": "one cycle of re-alignment: notice, retrain, promote only what is faster; for a timer",
    "rollback": "make the champion before this one champion again",
    "traffic": "show a traffic log, or import an engine's metrics into one: dspark traffic --help",
    "launch": "any of these on several processes, by torchrun: dspark launch --help",
    "generate": 'decode with a published pair: dspark generate --pair FOLDER "prompt"',
    "pairs": "published pairs: list, show, diff, verify, gc, rollback, export, import: dspark pairs --help",
    "engines": "load a published pair's exports in serving engines, and compare: dspark engines --help",
    "bench": "ratios against what anyone could run instead, measured on this machine: dspark bench --help",
    "report": "the report of a published version as one HTML file: dspark report --help",
    "serve": "answer OpenAI-compatible requests with a published pair: dspark serve --help",
}

OWN_WORDS = {
    "launch": "pipelines.launch",
    "generate": "pipelines.generate",
    "traffic": "pipelines.traffic_import",
    "pairs": "pipelines.pairs.command",
    "engines": "pipelines.engines.command",
    "bench": "pipelines.bench.command",
    "report": "pipelines.version_report.command",
    "serve": "pipelines.server.command",
}
"""Commands with options of their own -> module whose `main` reads them."""

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
OPTIONAL_VALUE = ("--info", "-i")
OPTIONS: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("--hydra-help", "--resolve", "--run", "-r", "--multirun", "-m", "--shell-completion", "-sc")),
    **dict.fromkeys(("--cfg", "-c"), ("job", "hydra", "all")),
    **dict.fromkeys(OPTIONAL_VALUE, INFO),
    **dict.fromkeys(("--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"), ()),
    "--experimental-rerun": (),
}
"""Hydra's options: None takes no value, () takes any, names are the values allowed."""

HELP = """dspark: build, measure and publish the draft that makes a language model decode fastest, losslessly

usage: dspark [stage] [group=choice] [key=value] ... [-m]
       dspark generate --pair FOLDER "prompt" [--temperature T] [--max-new-tokens N]
       dspark traffic show|import ...
       dspark pairs list|show|diff|verify|gc|rollback|export|import ...
       dspark engines FOLDER [--engine NAME] ...
       dspark bench [--rows A,B] [--out DIR] ...
       dspark report FOLDER [--out FILE] [--png DIR] [--price-per-hour X] [--load FOLDER]
       dspark serve --pair FOLDER [--port N] ...
       dspark launch [--processes N] [--nodes N ...] [stage] [words] ...

stages
{stages}

examples
  dspark                                              the whole loop on the embedded target
  dspark experiment=smoke                             every stage once, small: to see that it works
  dspark target.path=HuggingFaceTB/SmolLM2-360M-Instruct
  dspark build draft=[lookup,pruned] draft.pruned.layers=6
  dspark -m build draft=none,lookup,pruned            one run for each
  dspark build sweep=optuna draft=pruned "draft.pruned.layers=range(2,12)"
  dspark realign target.path=/models/retrained drift.log=/var/log/dspark
  dspark --cfg job                                    show the whole configuration
  dspark score --info defaults-tree                   show where it comes from

groups and their choices (several at once: draft=[a,b])
{groups}

exit codes: 0 done, 1 failed, 2 bad input, 3 re-alignment kept the champion, 4 another run holds the registry,
130 and 143 stopped by ctrl-c and SIGTERM, what was done is saved
more: --hydra-help, --version
"""


class Ending(NamedTuple):
    """How a run ends: exit code and the line for the user (None asks for a traceback)."""

    code: int
    line: str | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: words after the program's name; None takes them from the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # GNU OpenMP reads this when torch is imported. Its default spins for milliseconds at every barrier, so that one
    # busy neighbour on the machine makes each pass many times dearer; this much spinning costs nothing on an idle one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return _on_all_processes(lambda: _noted(_run(words)))
    return _noted(_run(words))


def _on_all_processes(program: Callable[[], int]) -> int:
    """Under torchrun, run a program on the first process; the others do their parts: of targets, trainings, corpora."""
    try:
        tasks = [importlib.import_module(f"pipelines.{name}") for name in ("ranks", "corpus_shards")]
        run = importlib.import_module("inference.parallel").run
        code: int = run(program, {module.TASK: module.come for module in tasks})
    except Exception as error:
        return _end(ending(error, words=()))
    # All have parted in good order; what libraries take down after that aborts now and then, with threads running.
    importlib.import_module("inference.processes").leave(code)
    raise AssertionError("this process has ended")


def _noted(code: int) -> int:
    """Leave the exit code where `dspark launch` finds it, which torchrun does not pass on."""
    if "DSPARK_CODE_FILE" in os.environ:
        importlib.import_module("pipelines.launch").leave_code(code)
    return code


def _run(words: list[str]) -> int:
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return _end(Ending(STOPPED, "stopped; run the same command again to go on"))
    except Exception as error:
        return _end(ending(error, words=words))


def _dispatch(words: list[str]) -> int:
    if words[:1] and words[0] in OWN_WORDS:
        code: int = importlib.import_module(OWN_WORDS[words[0]]).main(words[1:])
        return code
    if {"-h", "--help"} & set(words):
        sys.stdout.write(help_text())
        return DONE
    if "--version" in words:
        sys.stdout.write(f"dspark {importlib.import_module('importlib.metadata').version('dspark')}\n")
        return DONE
    return _run_hydra(hydra_words(words))


def help_text() -> str:
    """Stages, examples and groups; reads file names only, so that it is there at once."""
    from pipelines.composition import choices

    stages = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    groups = "\n".join(f"  {group:<10} {', '.join(names)}" for group, names in choices().items() if "/" not in group)
    return HELP.format(stages=stages, groups=groups)


def hydra_words(words: Sequence[str]) -> list[str]:
    """Turn the stage, the first bare word, into the override `stage=...`; check the options.

    Returns:
        Overrides, then options: Hydra's own parser takes no override on both sides of an option.

    Raises:
        InputError: an unknown stage or option, or a bare word that comes later.
    """
    overrides: list[str] = []
    options: list[str] = []
    takes: tuple[str, ...] | None = None  # values of the option just before, see OPTIONS
    for word in words:
        if takes is not None and (word in takes or not takes):
            options.append(word)
            takes = None
            continue
        if takes is not None and options[-1] not in OPTIONAL_VALUE:
            raise InputError(f"{options[-1]} takes one of {', '.join(takes)}, got {word!r}")
        takes = None
        if word.startswith("="):
            raise InputError(f"cannot read {word!r}", mend="write key=value, without spaces")
        if word.startswith("-"):
            options.append(word)
            takes = _takes(word)
        elif "=" in word or word.startswith("~"):
            overrides.append(word)
        elif overrides:
            raise InputError(f"{word!r} is not an override", mend="the stage comes first, then words such as key=value")
        else:
            overrides.append(f"stage={_stage(word)}")
    if takes is not None and options[-1] not in OPTIONAL_VALUE:
        raise InputError(f"{options[-1]} needs a value", mend=f"one of {', '.join(takes)}" if takes else "")
    if not options and any(word.startswith("sweep=") and word != "sweep=null" for word in overrides):
        options.append("--multirun")  # hydra.mode says so too, but Hydra does not read it beside a word that is wrong
    return [*overrides, *options]


def _takes(word: str) -> tuple[str, ...] | None:
    """Values the next word may have when this one is an option; None when the option is complete."""
    from pipelines.composition import nearest

    option, equals, _ = word.partition("=") if word.startswith("--") else (word, "", "")
    if option not in OPTIONS:
        hint = nearest(option, [*OPTIONS, "--help", "--version"]) or "dspark --help shows what there is"
        raise InputError(f"unknown option {option!r}", mend=hint)
    if equals and OPTIONS[option] is None:
        raise InputError(f"{option} takes no value", where=word)
    return None if equals else OPTIONS[option]


def _stage(word: str) -> str:
    """The stage a bare word names."""
    from pipelines.composition import nearest

    if word not in COMMANDS or word in OWN_WORDS:
        raise InputError(f"unknown stage {word!r}", mend=f"{nearest(word, COMMANDS)} stages are {', '.join(COMMANDS)}")
    return word


def _run_hydra(words: list[str]) -> int:
    """Compose and run, once or (multirun) many times."""
    import hydra

    from pipelines.composition import CONF, PRIMARY, VERSION_BASE
    from pipelines.config import register
    from pipelines.sweeps import conclude
    from train.signals import Stopped

    register()
    entry = hydra.main(version_base=VERSION_BASE, config_path=f"pkg://{CONF}", config_name=PRIMARY)(job)
    with _command_line(words):
        try:
            conclude(entry)
        except SystemExit as end:  # of a job, or of Hydra after --info and its like
            if isinstance(end, Stopped):
                saved = f"step {end.step} of the training is saved"
                return _end(Ending(TERMINATED, f"stopped by SIGTERM, {saved}; resume with: {resume_with(words)}"))
            return end.code if isinstance(end.code, int) else DONE if end.code is None else FAILED
    return DONE


def resume_with(words: Sequence[str]) -> str:
    """The command that goes on with a run of these Hydra words."""
    stage = next((word.partition("=")[2] for word in words if word.startswith("stage=")), "")
    others = [shlex.quote(word) for word in words if not word.startswith("stage=")]
    return " ".join(filter(None, ("dspark", stage if stage != "all" else "", *others)))


def job(cfg: Any) -> float:
    """One job of Hydra's: convert the configuration, run the stages, return the objective for a sweeper.

    A single run that ends badly leaves at once with its line and exit code. In a multirun the exception goes back to
    Hydra, which tells `pipelines.sweeps`: the sweep goes on without that trial.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from pipelines.config import typed

    try:
        run = typed(cfg)
        ranks = importlib.import_module("pipelines.ranks")
        ranks.WORDS.set(ranks.words_of_job() if HydraConfig.initialized() else None)
        objective: float = importlib.import_module("pipelines.run").run(run, run.stage)
        return objective
    except Exception as error:
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        how = ending(error, words=())
        raise SystemExit(_end(how, error=error)) from error


def ending(error: Exception, *, words: Sequence[str]) -> Ending:
    """Decide exit code and line for an exception.

    Args:
        error: what ended the run.
        words: words of the command line, to find the names nearest to a wrong one.
    """
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    from pipelines.composition import explain
    from pipelines.errors import ChampionKept, StageFailed
    from pipelines.files import write_error
    from pipelines.locks import RegistryBusy
    from pipelines.sweeps import missing_extra
    from train.errors import TrainingError

    if isinstance(error, RegistryBusy):
        return Ending(BUSY, str(error))
    if isinstance(error, (InputError, TrainingError)):
        return Ending(BAD_INPUT, str(error))
    if isinstance(error, ChampionKept):
        return Ending(KEPT, str(error))
    if isinstance(error, (StageFailed, ProcessLost)):
        return Ending(FAILED, str(error))
    if isinstance(error, MissingConfigException) and (extra := missing_extra(error)):
        return Ending(BAD_INPUT, str(extra))
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return Ending(BAD_INPUT, explain(error, words=[word for word in words if "=" in word]))
    if isinstance(error, (ValueError, TypeError)) and _raised_in(error).partition(".")[0] in ("hydra", "omegaconf"):
        return Ending(BAD_INPUT, f"cannot use {' '.join(words) or 'these values'}: {error}")
    known = write_error(error)
    return Ending(BAD_INPUT, str(known)) if known else Ending(FAILED, None)


def _raised_in(error: BaseException) -> str:
    """Name of the module that raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals["__name__"]) if frames else ""


def _end(how: Ending, *, error: Exception | None = None) -> int:
    """Print the line, or the traceback of what nobody foresaw."""
    if how.line is None:
        traceback.print_exception(error) if error else traceback.print_exc()
    else:
        line = " ".join(how.line.split())
        sys.stderr.write(f"dspark: {line}\n")
    return how.code


@contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    """Show Hydra these words, and have it raise what goes wrong instead of printing it and leaving."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full


if __name__ == "__main__":  # by its own name, so that jobs of a sweep find it again in their processes
    sys.exit(importlib.import_module("pipelines.cli").main())
