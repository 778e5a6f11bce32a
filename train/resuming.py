"""Whether a run may go on from a checkpoint: settings as they are kept, and a refusal of others. Reads no file."""

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from train.errors import TrainingError
from train.optimizers import OptimizerConfig


def plain_settings(optimizer: OptimizerConfig) -> dict[str, Any]:
    """An optimizer's settings as they will read when they come back from a checkpoint."""
    settings: dict[str, Any] = asdict(optimizer) if is_dataclass(optimizer) and not isinstance(optimizer, type) else {}
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def check_same_settings(saved: dict[str, Any], given: dict[str, Any], *, where: Path) -> None:
    """Refuse to go on under other settings: the result would belong to neither.

    Raises:
        TrainingError: the first setting that differs.
    """
    for part, settings in given.items():
        for name in sorted(set(settings) | set(saved[part])):
            before, now = saved[part].get(name), settings.get(name)
            if before != now:
                raise TrainingError(
                    f"{part}.{name} was {before} and is now {now}",
                    where=str(where),
                    mend="give the earlier value to go on, or remove the checkpoints to start afresh",
                )


__all__ = ["check_same_settings", "plain_settings"]
