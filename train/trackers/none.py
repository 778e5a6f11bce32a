"""No tracker: metrics go to the log and the result only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.trackers import NoTracker, Tracker


@dataclass
class Config:
    """No options.

    Attributes:
        kind: name of this plug-in.
    """

    kind: str = "none"

    def build(self, folder: Path, run_name: str, config: dict[str, Any]) -> Tracker:
        """Return the tracker; the arguments are not used."""
        return NoTracker()


__all__ = ["Config", "NoTracker"]
