"""Sweeps: what becomes of the trials of a Hydra multirun. A trial that fails is noted and passed over, not the end.

    dspark -m build draft.pruned.layers=2,4,99     # multirun/<time>/sweep.json: two values and a reason

Every trial leaves a note in its own folder, wherever a launcher runs it; at the end the notes become one table. Which
trials there are is for Hydra's sweepers, and where they run for its launchers.
"""

import csv
import io
import json
import logging
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from inference.errors import InputError, first_line
from pipelines.config import register_resolvers
from pipelines.errors import StageFailed
from pipelines.files import read_json, write_json, write_text
from pipelines.provenance import redacted_argv

logger = logging.getLogger(__name__)

TRIAL_FILE, JSON_FILE, CSV_FILE = "trial.json", "sweep.json", "sweep.csv"
TIMED_STAGES = ("all", "score", "load")
"""Stages whose result is a speed, which neighbours on the same machine would falsify."""
EXTRA = "sweep"
_EXTRA_CHOICES = ("hydra/launcher/joblib", "hydra/launcher/submitit", "hydra/sweeper/optuna", "hydra/sweeper/sampler")


class SweepFailed(StageFailed):
    """Every trial of a sweep failed, or what runs them broke."""


@dataclass
class Trial:
    """One job of a sweep.

    Attributes:
        sweep: which sweep it belongs to; a folder may hold trials of earlier ones.
        trial: number, from 0.
        overrides: its words, secrets hidden.
        folder: its output.
        started: seconds since the epoch.
        seconds: how long it took (None = it never ended).
        value: its objective (None = it failed).
        reason: why it failed ("" = it did not).
    """

    sweep: str
    trial: int
    overrides: list[str]
    folder: str
    started: float
    seconds: float | None = None
    value: float | None = None
    reason: str = ""

    def write(self) -> None:
        """Leave the note in the trial's folder."""
        write_json(Path(self.folder) / TRIAL_FILE, asdict(self))

    @property
    def outcome(self) -> str:
        """The value, or why there is none."""
        if self.value is not None:
            return f"{self.value:.4g}"
        return self.reason or "stopped, or killed, before it ended"


@dataclass(frozen=True)
class Sweep:
    """A multirun that has begun.

    Attributes:
        id: written into its trials' notes.
        folder: `hydra.sweep.dir`.
        stage: what every trial runs.
    """

    id: str
    folder: Path
    stage: str

    def trials(self) -> list[Trial]:
        """What the trials left, by number."""
        notes = [read_json(path) for path in self.folder.rglob(TRIAL_FILE)]
        return sorted((Trial(**note) for note in notes if note["sweep"] == self.id), key=lambda trial: trial.trial)

    def close(self) -> list[Trial]:
        """Write and show the table of all trials; returns them."""
        trials = self.trials()
        if trials:
            write_json(self.folder / JSON_FILE, _summary(self, trials))
            write_text(self.folder / CSV_FILE, _csv(trials))
            _show(self, trials)
            if best := _best(trials):
                words = " ".join(_varied(trials)[best.trial].values()) or "as given"
                logger.info("best      trial %d: %.4g (%s)", best.trial, best.value, words)
        return trials


_begun: list[Sweep] = []
"""The sweep that Hydra has begun in this process, until `conclude` takes it."""


class Trials(Callback):
    """Hydra's hooks, named by `hydra.callbacks` in conf/config.yaml; it travels to other processes with every job."""

    def __init__(self) -> None:
        self.sweep = ""
        self.argv: list[str] = []
        self.trial: Trial | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in another process, whose Hydra does not know our resolvers yet."""
        self.__dict__.update(state)
        register_resolvers()

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Remember the sweep."""
        self.sweep, self.argv = uuid.uuid4().hex, list(sys.argv)
        _begun.append(Sweep(self.sweep, Path(str(config.hydra.sweep.dir)).absolute(), str(config.stage)))
        launcher = str(config.hydra.launcher.get("_target_", ""))
        if config.stage in TIMED_STAGES and launcher.endswith(("JoblibLauncher", "LocalLauncher")):
            logger.warning("trials side by side disturb each other's speed: sweep build, or run one at a time")

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Note that a trial has begun."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        sys.argv = list(self.argv)  # for the manifests: in a worker these are the launcher's words
        words = redacted_argv([str(word) for word in config.hydra.overrides.task])
        folder = str(config.hydra.runtime.output_dir)
        self.trial = Trial(self.sweep, int(config.hydra.job.num), words, folder, time.time())
        self.trial.write()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Note how a trial ended; Hydra is told of no failure, only of no value: a failure would end the sweep."""
        trial, self.trial = self.trial, None
        if trial is None:
            return
        trial.seconds = round(time.time() - trial.started, 3)
        result = job_return._return_value  # the property would raise and print a failure
        if job_return.status == JobStatus.FAILED:
            trial.reason = _reason(result)
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
            logger.warning("trial %d failed: %s", trial.trial, trial.reason)
        else:
            trial.value = float(result)
        trial.write()


def _reason(error: Exception) -> str:
    """Why a trial failed, in one line; what nobody foresaw leaves its traceback in the trial's log."""
    line = _foreseen(error)
    if line is None:
        logger.error("not foreseen", exc_info=error)
        line = f"{type(error).__name__}: {error}"
    return " ".join(line.split())


def conclude(entry: Callable[[], None]) -> None:
    """Let Hydra run; after a multirun, show what became of its trials.

    Raises:
        SweepFailed: every trial failed, or what runs them broke.
        Exception: whatever ended Hydra, the table of the trials so far having been shown.
    """
    _begun.clear()
    try:
        entry()
    except BaseException as error:
        trials = _begun.pop().close() if _begun else []
        if isinstance(error, Exception) and trials:
            _explain(error, trials)
        raise
    trials = _begun.pop().close() if _begun else []
    if trials and all(trial.value is None for trial in trials):
        raise _failed(trials)


def _explain(error: Exception, trials: list[Trial]) -> None:
    """Say in one line what ended a sweep that had begun, unless the error does.

    Raises:
        SweepFailed: nothing succeeded, over which sweepers stumble, or a launcher or sweeper broke.
    """
    if all(trial.reason for trial in trials):
        raise _failed(trials) from error
    if _foreseen(error) is None:
        logger.debug("the sweep broke off", exc_info=error)
        done = sum(trial.seconds is not None for trial in trials)
        why = f"{type(error).__name__}: {first_line(error)}"
        raise SweepFailed(f"the sweep broke off, {done} of {len(trials)} trials begun had ended: {why}") from error


def _foreseen(error: Exception) -> str | None:
    """The command line's words for an error; None for what nobody foresaw."""
    from pipelines.cli import ending

    return ending(error, words=()).line


def _failed(trials: list[Trial]) -> SweepFailed:
    return SweepFailed(f"no trial of {len(trials)} succeeded; trial {trials[0].trial}: {trials[0].outcome}")


def missing_extra(error: MissingConfigException) -> InputError | None:
    """What to install when the launcher or sweeper that was asked for is Hydra's, but is not there."""
    missing = str(error.missing_cfg_file or "")
    if not missing.startswith(_EXTRA_CHOICES):
        return None
    return InputError(f"{missing} is not installed", mend=f"pip install 'dspark[{EXTRA}]', or `-e .[{EXTRA}]`")


def _best(trials: list[Trial]) -> Trial | None:
    """The trial with the highest value; of equal ones the first."""
    return max((t for t in trials if t.value is not None), key=lambda t: (t.value or 0.0, -t.trial), default=None)


def _common(trials: list[Trial]) -> list[str]:
    """Words of the sweep that are the same in all trials; of a single one, none."""
    first, *rest = trials
    return [word for word in first.overrides if rest and all(word in trial.overrides for trial in rest)]


def _varied(trials: list[Trial]) -> dict[int, dict[str, str]]:
    """By trial: key -> word, of the words that are not the same in all trials."""
    common = _common(trials)
    return {
        trial.trial: {word.partition("=")[0]: word for word in trial.overrides if word not in common}
        for trial in trials
    }


def _summary(sweep: Sweep, trials: list[Trial]) -> Mapping[str, Any]:
    """What sweep.json says."""
    best, varied = _best(trials), _varied(trials)
    return {
        "stage": sweep.stage,
        "trials": len(trials),
        "failed": sum(trial.value is None for trial in trials),
        "best": {"trial": best.trial, "value": best.value, "overrides": best.overrides} if best else None,
        "common": _common(trials),
        "table": [
            {
                "trial": trial.trial,
                "overrides": list(varied[trial.trial].values()),
                "value": trial.value,
                "reason": _why(trial),
                "seconds": trial.seconds,
                "folder": trial.folder,
            }
            for trial in trials
        ],
    }


def _why(trial: Trial) -> str:
    return "" if trial.value is not None else trial.outcome


def _csv(trials: list[Trial]) -> str:
    """One row a trial, one column a word that varies."""
    varied = _varied(trials)
    keys = list(dict.fromkeys(key for words in varied.values() for key in words))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["trial", *keys, "value", "seconds", "reason"])
    for trial in trials:
        words = [varied[trial.trial].get(key, "").partition("=")[2] for key in keys]
        value = "" if trial.value is None else json.dumps(trial.value)
        rows.writerow([trial.trial, *words, value, trial.seconds if trial.seconds is not None else "", _why(trial)])
    return text.getvalue()


def _show(sweep: Sweep, trials: list[Trial]) -> None:
    """The table, on stderr like all progress."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("trial", "overrides", "value or reason", title=f"{sweep.stage}: {len(trials)} trials")
    varied = _varied(trials)
    for trial in trials:
        table.add_row(str(trial.trial), escape(" ".join(varied[trial.trial].values())), escape(trial.outcome))
    Console(stderr=True).print(table)
