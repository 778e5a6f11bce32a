"""Training on all processes of a run: the first one calls, the others compose the same configuration and come.

    torchrun --nproc-per-node 8 -m pipelines.cli build trainer=replicated

What is called out is plain: the words of the command line, a name, a few folders. Every process reads corpus and target
by itself, so these lie on a disk that all of them see.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from inference import parallel, processes
from inference.errors import InputError
from pipelines.training import Lesson, train
from train.config import TrainerConfig
from train.errors import TrainingError
from train.signals import Stopped

TASK = "train"
WORDS: ContextVar[tuple[str, ...] | None] = ContextVar("words", default=None)
"""The Hydra words that this run was composed from; None where it was not."""


def called_together(lesson: Lesson) -> processes.Group | None:
    """Call all processes of this run to a lesson; None where there is no other.

    Raises:
        InputError: the run was not composed from words, which the others would need.
    """
    group = processes.current()
    if group is None:
        return None
    words = WORDS.get()
    if words is None:
        raise InputError(
            "training on several processes needs the words its configuration was composed from",
            where=f"trainer={lesson.trainer.engine}",
            mend="start the run by the command line, `dspark launch`",
        )
    folders = {name: getattr(lesson, name) for name in ("target_folder", "corpus", "folder", "start", "reference")}
    given = {
        "words": words,
        "name": lesson.name,
        "trainer": dataclasses.asdict(lesson.trainer),
        "folders": {name: str(path.resolve()) if path else None for name, path in folders.items()},
    }
    parallel.call_to(group, TASK, given)
    return group


def come(group: processes.Group, given: dict[str, Any]) -> None:
    """What the other processes do when called. What goes wrong for all is said by the first."""
    with suppress(InputError, TrainingError, Stopped, KeyboardInterrupt):
        folders: dict[str, Any] = {name: path and Path(path) for name, path in given["folders"].items()}
        trainer = TrainerConfig(**given["trainer"])
        lesson = Lesson(cfg=_composed(given["words"]), name=given["name"], trainer=trainer, **folders)
        with group.together():
            train(lesson, group=group)


def _composed(words: Sequence[str]) -> Any:
    """The configuration that the first process composed from these words."""
    from hydra import compose, initialize_config_module

    from pipelines.composition import CONF, PRIMARY, VERSION_BASE
    from pipelines.config import register, typed

    register()
    with initialize_config_module(CONF, version_base=VERSION_BASE):
        return typed(compose(PRIMARY, overrides=list(words)))


def words_of_job() -> tuple[str, ...]:
    """The words of the Hydra job that is running, folders of configuration given on the command line included."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    added = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    search = [f"hydra.searchpath=[{','.join(f'file://{path}' for path in added)}]"] if added else []
    return (*hydra.overrides.task, *search)
