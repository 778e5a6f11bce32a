"""TensorBoard event files, written by torch's own writer; look at them with `tensorboard --logdir <folder>`.

Lineage is text, under the tag `lineage/<kind>-<name>`: TensorBoard keeps no artifacts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.trackers import Fuse, GuardedTracker, TrackedArtifact, Tracker


class TensorboardTracker:
    """One folder of event files."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        """Record metrics of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    def artifact(
        self, made: TrackedArtifact, /, *, uses: Sequence[TrackedArtifact], metadata: Mapping[str, Any]
    ) -> None:
        """Record what was made, and from what, as text."""
        lines = [_line("made", made), *(_line("from", used) for used in uses)]
        lines += [f"{key}: {json.dumps(value, sort_keys=True)}" for key, value in sorted(metadata.items())]
        self._writer.add_text(f"lineage/{made.kind}-{made.name}", "\n".join(f"    {line}" for line in lines))
        self._writer.flush()

    def finish(self) -> None:
        """Flush and close the files."""
        self._writer.close()


def _line(word: str, item: TrackedArtifact) -> str:
    return f"{word} {item.kind} {item.name} {item.digest}" + (f" in {item.folder}" if item.folder else "")


@dataclass
class Config:
    """Options of TensorBoard.

    Attributes:
        kind: name of this plug-in.
        flush_every_s: seconds between writes to disk.
    """

    kind: str = "tensorboard"
    flush_every_s: int = 30

    def __post_init__(self) -> None:
        if self.flush_every_s < 1:
            raise ValueError(f"tracker tensorboard: flush_every_s is {self.flush_every_s}: choose at least 1")
        self._fuse = Fuse()

    def build(self, folder: Path, run_name: str, config: dict[str, Any]) -> Tracker:
        """Return the tracker; files appear at the first metric.

        Args:
            folder: event files go to `<folder>/tensorboard/<run_name>`.
            run_name: name shown for the run.
            config: plain settings, shown as text.
        """
        return GuardedTracker(lambda: TensorboardTracker(self._start(folder, run_name, config)), fuse=self._fuse)

    def _start(self, folder: Path, run_name: str, config: dict[str, Any]) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard" / run_name), flush_secs=self.flush_every_s)
        lines = [f"    {key}: {value}" for key, value in sorted(config.items())]
        writer.add_text("config", "\n".join(lines))
        return writer
