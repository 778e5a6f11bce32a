"""Stage 2: make every candidate draft, those first that others need, and train those that are trained.

A killed training goes on from its last checkpoint and ends with the same weights.
"""

import dataclasses
import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from distill.drafts import DraftContext
from inference.errors import InputError
from inference.target import config_shape
from pipelines import lineage, ranks
from pipelines.artifacts import Artifact, Spec, Work
from pipelines.config import RunConfig
from pipelines.context import RunContext
from pipelines.files import content_digest, plain, write_json
from pipelines.plan import resolved_trainer
from pipelines.training import SCRATCH, Lesson, train
from train.profiling import PROFILE_FILE
from train.trackers import Tracker

logger = logging.getLogger(__name__)

DRAFT_FOLDER = "draft"
HISTORY_FILE = "history.json"


def draft_spec(context: RunContext, name: str, corpus: Artifact | None) -> Spec:
    """What one draft is made from; drafts that are not trained do not depend on the corpus."""
    cfg = context.cfg
    draft = cfg.draft[name]
    inputs = {"target": context.target_digest}
    settings = plain(draft)
    if settings.get("path") and (digest := content_digest(Path(settings["path"]))):
        inputs["checkpoint"] = digest
        settings["path"] = ""
    if other := needed(cfg, name):
        # What it is made from says what it is; its settings and its target are in there.
        inputs["draft"] = draft_spec(context, other, corpus).key
    elif reference := getattr(draft, "reference", ""):
        inputs["reference"] = content_digest(Path(reference)) or reference
        settings["reference"] = ""
    config: dict[str, Any] = {"draft": settings}
    if draft.trained:
        assert corpus is not None, "a trained draft needs a corpus"
        inputs["corpus"] = corpus.digest
        trainer = resolved_trainer(cfg, context.plan, name)
        if cfg.target.teacher_precision != "fp32":
            config["teacher"] = cfg.target.teacher_precision
        config |= {"objective": cfg.objective, "optimizer": cfg.optimizer, "trainer": trainer.trajectory()}
    return Spec("draft", config=config, inputs=inputs, seed=cfg.seed)


def run_build(context: RunContext, corpus: Artifact | None) -> dict[str, Artifact]:
    """Make every configured draft, or find it; returns artifacts by draft name."""
    made: dict[str, Artifact] = {}
    # Whatever needs another draft comes after it.
    for name in sorted(context.cfg.draft, key=lambda name: len(_chain(context.cfg, name))):
        spec = draft_spec(context, name, corpus)
        make = partial(_make, context, name, corpus, made)
        settings = {"draft": name, "kind": context.cfg.draft[name].kind, "seed": context.cfg.seed}
        uses = [lineage.tracked(context, corpus)] if corpus is not None and context.cfg.draft[name].trained else []
        if other := needed(context.cfg, name):
            uses.append(lineage.tracked(context, made[other], other))
        made[name] = lineage.obtain(context, spec, name=name, make=make, settings=settings, uses=uses)
    return {name: made[name] for name in context.cfg.draft}


def offered(cfg: RunConfig, target_folder: Path) -> RunConfig:
    """The run without optional drafts that are no candidates for this target, and without those that start from them.

    Logs what is left out, and why.
    """
    out: dict[str, str] = {}
    for name, draft in cfg.draft.items():
        reason = draft.left_out(target_folder) if hasattr(draft, "left_out") else ""
        if reason:
            out[name] = reason
    for name, draft in cfg.draft.items():
        if getattr(draft, "start_from", "") in out:
            out[name] = f"it starts from {draft.start_from}"
    for name, reason in out.items():
        logger.info("draft %s is left out: %s", name, reason)
    kept = {name: draft for name, draft in cfg.draft.items() if name not in out}
    return dataclasses.replace(cfg, draft=kept) if out else cfg


def check_needed(cfg: RunConfig) -> None:
    """Refuse a draft that needs another which is not there, before anything is made for it.

    Raises:
        InputError: the other is not in the list of drafts, needs this one itself, or is a mixture like this one.
    """
    for name, draft in cfg.draft.items():
        _check_reference(cfg, name)
        key = next((key for key in ("of", "reference") if getattr(draft, key, None)), "start_from")
        wanted = getattr(draft, key, None)
        if not wanted:
            continue
        names = wanted if isinstance(wanted, list) else [wanted]
        other = needed(cfg, name)
        where = f"draft.{name}.{key}"
        if other is None and key == "reference":
            continue  # a folder
        if other is None:
            mend = f"add it to the list, as in draft=[none,{names[0]},{name}], or name one that is in it"
            raise InputError(f"no draft {' or '.join(map(repr, names))} in the list", where=where, mend=mend)
        if hasattr(draft, "of") and hasattr(cfg.draft[other], "of"):
            raise InputError(f"{other!r} contains a draft itself", where=where, mend="name one that contains none")
        if name in _chain(cfg, other):
            raise InputError(f"{name!r} needs itself", where=where, mend="name a draft that does without it")


def _check_reference(cfg: RunConfig, name: str) -> None:
    """Refuse a draft to compare with that is neither in the list nor a folder.

    Raises:
        InputError: that.
    """
    reference = getattr(cfg.draft[name], "reference", "")
    if reference and reference not in cfg.draft and not Path(reference).is_dir():
        raise InputError(
            f"{reference!r} is neither a draft in the list nor a folder",
            where=f"draft.{name}.reference",
            mend=f"add it to the list, as in draft=[none,{reference},{name}], or give the folder of a draft",
        )


def needed(cfg: RunConfig, name: str) -> str | None:
    """Name of the draft that a draft contains, starts from or is compared with in training; None for most, and where
    none of those is in the list."""
    draft = cfg.draft[name]
    wanted: Any = next(filter(None, (getattr(draft, key, None) for key in ("of", "start_from", "reference"))), [])
    return next((other for other in ([wanted] if isinstance(wanted, str) else wanted) if other in cfg.draft), None)


def _chain(cfg: RunConfig, name: str) -> list[str]:
    """A draft, the one it needs, the one that needs, and so on, until one needs none or comes up again."""
    chain = [name]
    while (other := needed(cfg, chain[-1])) is not None:
        chain.append(other)
        if other in chain[:-1]:
            break
    return chain


def _make(
    context: RunContext, name: str, corpus: Artifact | None, made: dict[str, Artifact], work: Work, tracker: Tracker
) -> None:
    draft = context.cfg.draft[name]
    work.metrics["kind"] = draft.kind
    other = needed(context.cfg, name)
    folder = made[other].path / DRAFT_FOLDER if other else None
    if not draft.trained:
        draft.write(_draft_context(context, work, other=folder))
        return
    assert corpus is not None, "a trained draft needs a corpus"
    reference = getattr(draft, "reference", "")
    lesson = Lesson(
        cfg=context.cfg,
        name=name,
        trainer=resolved_trainer(context.cfg, context.plan, name),
        target_folder=context.target_folder,
        corpus=corpus.path,
        folder=work.folder,
        start=None if reference else folder,
        reference=(folder or Path(reference)) if reference else None,
    )
    _train(lesson, work, tracker)


def _draft_context(context: RunContext, work: Work, *, other: Path | None) -> DraftContext:
    return DraftContext(
        target_folder=context.target_folder,
        folder=work.folder / DRAFT_FOLDER,
        device=context.cfg.target.torch_device(),
        num_target_layers=int(str(config_shape(context.target_folder)["num_hidden_layers"])),
        other=other,
    )


def _train(lesson: Lesson, work: Work, tracker: Tracker) -> None:
    """Train a draft, with all processes of this run where the trainer can, and leave its curve beside it."""
    work.drop |= set(SCRATCH)
    work.keep |= {HISTORY_FILE, PROFILE_FILE}
    group = ranks.called_together(lesson) if lesson.trainer.engine != "plain" else None
    with group.together() if group else nullcontext():
        trained = train(lesson, tracker=tracker, group=group)
    result = trained.result
    write_json(work.folder / HISTORY_FILE, result.history)
    work.metrics |= {
        **trained.metrics,
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "step_seconds": result.step_seconds,
        **(result.speed.figures() if result.speed else {}),
        **{key: value for key, value in result.metrics.items() if key.startswith("eval/")},
    }
    trained.save(work.folder / DRAFT_FOLDER)
