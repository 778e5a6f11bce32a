"""Training of drafts against a plain loop and the public EAGLE-3 step: supervised tokens per second and peak memory.

All arms learn from one corpus of the target's own responses, each in a fresh process, in turns, in fp32. A supervised
token is one position with one target distribution; an unrolled step counts each of its positions.
"""

import json
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from inference.statistics import Array, Bootstrap, Estimate, ratio
from pipelines.bench.bench import Bench
from pipelines.bench.outcome import Figure, Goal, Outcome
from pipelines.bench.paired import RESAMPLES
from pipelines.errors import StageFailed
from pipelines.progress import tracked

ARMS = {"student": ("ours", "plain"), "eagle3": ("ours", "plain", "public")}
SPEED, MEMORY = Goal(2.0), Goal(0.5, at_least=False)


@dataclass(frozen=True)
class Trained:
    """One arm in one round.

    Attributes:
        round: number.
        draft: what was trained.
        arm: how.
        step_seconds: median.
        tokens: supervised in a step.
        tokens_per_s: supervised.
        peak_mib: most memory of the process, or of the GPU where it used one.
    """

    round: int
    draft: str
    arm: str
    step_seconds: float
    tokens: float
    tokens_per_s: float
    peak_mib: float


@dataclass(kw_only=True)
class Config:
    """How much is trained.

    Attributes:
        kind: this row.
        steps: of each arm and round.
        rounds: how often each arm runs.
        unroll: steps of EAGLE-3, in all of its arms.
        responses: of the corpus.
        words: further words of the configuration, as on a command line.
    """

    kind: str = "training"
    steps: int = 10
    rounds: int = 3
    unroll: int = 7
    responses: int = 64
    words: str = ""

    def __post_init__(self) -> None:
        if min(self.steps, self.rounds, self.unroll, self.responses) < 1:
            raise ValueError("training needs steps, rounds, unroll and responses of at least 1")

    def run(self, bench: Bench) -> Outcome:
        """Measure."""
        folder = (bench.options.folder / "training").resolve()
        shutil.rmtree(folder / "artifacts", ignore_errors=True)  # of another target or other settings
        corpus = [*self._words(bench, "eagle3", folder), f"hydra.run.dir={folder}/log"]
        _run([sys.executable, "-m", "pipelines.cli", "corpus", *corpus])
        order = random.Random(bench.options.seed)
        turns = []
        for number in range(self.rounds):
            pairs = [(draft, arm) for draft, arms in ARMS.items() for arm in arms]
            order.shuffle(pairs)
            turns += [(number, draft, arm) for draft, arm in pairs]
        trained = []
        for number, draft, arm in tracked(turns, self.kind, unit="trainings"):
            shutil.rmtree(folder / "work", ignore_errors=True)
            command = [sys.executable, "-m", "pipelines.bench.training_arms", draft, arm, "--folder", str(folder)]
            command += ["--steps", str(self.steps), "--threads", str(bench.options.threads)]
            said = _run([*command, "--words", *self._words(bench, draft, folder)])
            trained.append(Trained(number, draft, arm, **json.loads(said.splitlines()[-1])))
        figures = [
            figure
            for draft, arms in ARMS.items()
            for other in arms[1:]
            for figure in _figures(trained, draft, other, seed=bench.options.seed)
        ]
        notes = [f"forward KL, fp32, {self.steps} steps an arm and round, EAGLE-3 unrolled {self.unroll} times"]
        return Outcome(figures, [asdict(one) for one in trained], notes)

    def _words(self, bench: Bench, draft: str, folder: Path) -> list[str]:
        """The configuration of our arm; the others take their numbers from it."""
        options = bench.options
        eagle3 = [
            f"draft.eagle3.block={self.unroll}",
            "draft.eagle3.position_decay=0",  # every token weighs one, so that weights count tokens
            "draft.eagle3.prompt_share=0",
        ]
        own = [
            f"draft=[none,{'pruned' if draft == 'student' else 'eagle3'}]",
            "objective=forward_kl",
            "prompts=[stdlib,gsm8k,human_eval,gsm8k_heldout,mt_bench]",
            f"budget.responses={self.responses}",
            "trainer.precision=fp32",
            f"trainer.steps={self.steps}",
            "trainer.checkpoint_every_steps=0",
            f"target.path={options.target}",
            f"target.revision={options.revision}",
            f"target.precision={options.precision}",
            f"target.device={options.device}",
            f"paths.artifacts={folder}/artifacts",
            f"paths.registry={folder}/registry",
            f"paths.cache={options.cache.expanduser()}",
            *(eagle3 if draft == "eagle3" else []),
        ]
        more = shlex.split(self.words)
        keys = {word.partition("=")[0] for word in more}
        other = "draft.pruned." if draft == "eagle3" else "draft.eagle3."
        return [word for word in own if word.partition("=")[0] not in keys] + [w for w in more if other not in w]


def _run(command: Sequence[str]) -> str:
    """What a program wrote on stdout.

    Raises:
        StageFailed: it failed; with its last line.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StageFailed(f"a process of the training row ended with {done.returncode}: {last}")
    return done.stdout


def _figures(trained: Sequence[Trained], draft: str, other: str, *, seed: int) -> list[Figure]:
    """Pace and memory of our arm over another one, rounds resampled."""
    rounds = sorted({one.round for one in trained})
    boot = Bootstrap([str(number) for number in rounds], seed=seed, resamples=RESAMPLES)

    def sums(arm: str, name: str) -> Array:
        of = {one.round: getattr(one, name) for one in trained if (one.draft, one.arm) == (draft, arm)}
        total: Array = boot.weights @ np.array([of[number] for number in rounds])
        return total

    def means(arm: str) -> dict[str, float]:
        names = ("tokens_per_s", "tokens", "step_seconds", "peak_mib")
        return {name: float(sums(arm, name)[0]) / len(rounds) for name in names}

    def estimate(name: str) -> Estimate:
        return boot.estimate(ratio(sums("ours", name), sums(other, name)))

    detail = {"ours": means("ours"), other: means(other)}
    return [
        Figure(f"{draft}: supervised tokens/s over the {other} step", estimate("tokens_per_s"), "x", SPEED, detail),
        Figure(f"{draft}: peak memory over the {other} step", estimate("peak_mib"), "x", MEMORY),
    ]
