"""Weights & Biases. Offline unless told otherwise: nothing leaves the machine until `wandb sync` or mode=online."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from train.trackers import GuardedTracker, Tracker

MODES = ("offline", "online", "disabled")


class WandbTracker:
    """One wandb run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        """Record metrics of a step."""
        self._run.log(metrics, step=step)

    def finish(self) -> None:
        """Close the run."""
        self._run.finish(quiet=True)


@dataclass
class Config:
    """Options of wandb.

    Attributes:
        kind: name of this plug-in.
        mode: "offline" (files under the run's folder), "online" (needs an account and a network) or "disabled".
        project: project the run belongs to.
        entity: team or user ("" = wandb's default).
    """

    kind: str = "wandb"
    mode: str = "offline"
    project: str = "dspark"
    entity: str = ""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"tracker wandb: mode is {self.mode!r}: choose one of {', '.join(MODES)}")

    def build(self, folder: Path, run_name: str, config: dict[str, Any]) -> Tracker:
        """Return the tracker; the run opens at the first metric.

        Args:
            folder: wandb writes below it.
            run_name: name shown for the run.
            config: plain settings shown beside it.
        """
        return GuardedTracker(lambda: WandbTracker(self._start(folder, run_name, config)))

    def _start(self, folder: Path, run_name: str, config: dict[str, Any]) -> Any:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        # The id follows from name and settings, so a run that was killed and resumed stays one run.
        identity = json.dumps([run_name, config], sort_keys=True, default=str)
        return wandb.init(
            project=self.project,
            entity=self.entity or None,
            name=run_name,
            id=hashlib.sha256(identity.encode()).hexdigest()[:16],
            resume="allow" if self.mode == "online" else None,
            dir=str(folder),
            mode=cast(Literal["offline", "online", "disabled"], self.mode),
            config=config,
            reinit="finish_previous",
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
