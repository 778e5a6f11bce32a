"""Start-up: seconds of commands that need no model, each in a fresh process, against an interpreter that does nothing.

Commands take turns. A user waits for the median; the best run shows what the machine would do undisturbed.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.bench.bench import Bench
from pipelines.bench.outcome import Figure, Goal, Outcome
from pipelines.bench.paired import interleaved, median_seconds, speed_ratio
from pipelines.errors import StageFailed

GOAL = Goal(1.0, at_least=False)
COMMANDS = {"dspark --help": ["--help"], "dspark --cfg job": ["--cfg", "job"], "dspark pairs list": ["pairs", "list"]}
BARE = "python -c pass"


@dataclass(kw_only=True)
class Config:
    """How often.

    Attributes:
        kind: this row.
        rounds: in each of which every command runs once.
    """

    kind: str = "startup"
    rounds: int = 9

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"startup.rounds is {self.rounds}; use at least 1")

    def run(self, bench: Bench) -> Outcome:
        """Measure."""
        seed = bench.options.seed
        with tempfile.TemporaryDirectory() as made:
            (Path(made) / "registry").mkdir()
            arms = {name: _started([*_program(), *words], Path(made)) for name, words in COMMANDS.items()}
            arms[BARE] = _started([sys.executable, "-c", "pass"], Path(made))
            units = {f"round {number + 1}": number for number in range(self.rounds)}
            samples = interleaved(units, arms, title=self.kind, unit="rounds", seed=seed)
        figures = []
        for name in arms:
            seconds = [sample.seconds for sample in samples if sample.arm == name]
            detail = {"best_s": min(seconds)}
            if name != BARE:
                detail["times_bare"] = speed_ratio(samples, BARE, name, seed=seed).value
            goal = None if name == BARE else GOAL
            figures.append(Figure(f"{name}: median", median_seconds(samples, name, seed=seed), "s", goal, detail))
        return Outcome(figures, samples, [f"{self.rounds} rounds after one that is not counted"])


def _program() -> list[str]:
    """The installed command, or its module where it is not installed."""
    installed = Path(sys.executable).with_name("dspark")
    return [str(installed)] if installed.is_file() else [sys.executable, "-m", "pipelines.cli"]


def _started(command: Sequence[str], folder: Path) -> Callable[[int], float]:
    """Run a command in a folder; one start a run.

    Raises:
        StageFailed: it failed.
    """

    def run(_: int) -> float:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise StageFailed(f"{' '.join(command)} ended with {done.returncode}: {last}")
        return 1.0

    return run
