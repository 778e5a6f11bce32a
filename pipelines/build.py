"""Stage 2: make every candidate draft, train those that are trained.

Joins what `distill` knows (students, batches, losses) with what `train` knows (how parameters move). A killed training
goes on from its last checkpoint and ends with the same weights.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from distill.corpus import read_corpus
from distill.distillation import Distillation, capture_states
from distill.drafts import DraftContext, Student
from inference.model import load_causal_model
from inference.target import config_shape
from pipelines.artifacts import Artifact, Spec, Work
from pipelines.context import RunContext
from pipelines.files import content_digest, plain, write_json
from pipelines.plan import resolved_trainer
from train.loop import Batch, LossOutput, fit

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
    config: dict[str, Any] = {"draft": settings}
    if draft.trained:
        assert corpus is not None, "a trained draft needs a corpus"
        inputs["corpus"] = corpus.digest
        trainer = resolved_trainer(cfg, context.plan, name)
        config |= {"objective": cfg.objective, "optimizer": cfg.optimizer, "trainer": trainer.trajectory()}
    return Spec("draft", config=config, inputs=inputs, seed=cfg.seed)


def run_build(context: RunContext, corpus: Artifact | None) -> dict[str, Artifact]:
    """Make every configured draft, or find it; returns artifacts by draft name."""
    return {
        name: context.store.obtain(draft_spec(context, name, corpus), make=partial(_make, context, name, corpus))
        for name in context.cfg.draft
    }


def _make(context: RunContext, name: str, corpus: Artifact | None, work: Work) -> None:
    draft = context.cfg.draft[name]
    draft_context = DraftContext(
        target_folder=context.target_folder,
        folder=work.folder / DRAFT_FOLDER,
        device=context.cfg.target.torch_device(),
        num_target_layers=int(str(config_shape(context.target_folder)["num_hidden_layers"])),
    )
    work.metrics["kind"] = draft.kind
    if not draft.trained:
        draft.write(draft_context)
        return
    assert corpus is not None, "a trained draft needs a corpus"
    student: Student = draft.student(draft_context)
    _train(context, name, student, corpus, work)
    student.save(work.folder / DRAFT_FOLDER)


def _train(context: RunContext, name: str, student: Student, corpus: Artifact, work: Work) -> None:
    """Distil the student from the corpus and leave its curve beside it."""
    cfg = context.cfg
    draft = cfg.draft[name]
    trainer = resolved_trainer(cfg, context.plan, name)
    # The head alone is used, once per supervised token; fp32 keeps teacher and student comparable.
    target = load_causal_model(context.target_folder, precision="fp32", device=cfg.target.torch_device())
    target.check_same_vocabulary(student.model, where=f"draft.{name}")
    samples = capture_states(target, read_corpus(corpus.path))
    task = Distillation(
        student.model,
        target,
        samples,
        objective=cfg.objective.build(),
        sequences_per_step=draft.sequences_per_step,
        max_tokens=draft.max_tokens,
        chunk_tokens=draft.chunk_tokens,
        seed=cfg.seed,
    )
    logger.info("training %s: %d steps, %d samples", name, trainer.steps, len(task.train))

    def batches(step: int, micro: int) -> Batch:
        return task.batch(step, micro, accumulation=trainer.accumulation)

    def loss(batch: Batch) -> LossOutput:
        sums = task.loss(batch)
        return LossOutput(sums.loss, sums.tokens, {"acceptance": (sums.acceptance, sums.tokens)})

    settings = {"draft": name, "kind": draft.kind, "steps": trainer.steps, "seed": cfg.seed}
    result = fit(
        student.model.model,
        batches=batches,
        loss=loss,
        optimizer=cfg.optimizer,
        cfg=trainer,
        folder=work.folder,
        tracker=cfg.tracker.build(work.folder / "tracker", f"draft-{name}", settings),
        evaluate=task.evaluate if task.validation else None,
    )
    work.drop.add("checkpoints")
    work.keep |= {"tracker", HISTORY_FILE}
    write_json(work.folder / HISTORY_FILE, result.history)
    work.metrics |= {
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        **{key: value for key, value in result.metrics.items() if key.startswith("eval/")},
    }
