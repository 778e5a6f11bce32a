"""Stage 2: make every candidate draft, train those that are trained.

Joins what `distill` knows (students, batches, losses) with what `train` knows (how parameters move). A killed training
goes on from its last checkpoint and ends with the same weights.
"""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from distill.corpus import Sample, read_shards
from distill.distillation import Distillation, capture_states
from distill.drafts import DraftContext, Student, write_spec
from distill.feature_distillation import FeatureDistillation, FeaturesOf, covered_mass, draft_vocabulary
from distill.features import (
    FeatureShards,
    capture_features,
    feature_bytes,
    features_path,
    kept_taps,
    write_features,
)
from inference.errors import InputError
from inference.feature_drafts import FeatureDraftConfig, make_network
from inference.feature_drafts._checkpoint import go_on_from, save_network
from inference.model import CausalModel
from inference.parallel import load_target
from inference.target import config_shape
from pipelines.artifacts import Artifact, Spec, Work
from pipelines.config import RunConfig
from pipelines.context import RunContext
from pipelines.files import content_digest, plain, write_json
from pipelines.plan import resolved_trainer
from pipelines.progress import tracked
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
    if other := needed(cfg, name):
        # What it is made from says what it is; its settings and its target are in there.
        inputs["draft"] = draft_spec(context, other, corpus).key
    config: dict[str, Any] = {"draft": settings}
    if draft.trained:
        assert corpus is not None, "a trained draft needs a corpus"
        inputs["corpus"] = corpus.digest
        trainer = resolved_trainer(cfg, context.plan, name)
        config |= {"objective": cfg.objective, "optimizer": cfg.optimizer, "trainer": trainer.trajectory()}
    return Spec("draft", config=config, inputs=inputs, seed=cfg.seed)


def run_build(context: RunContext, corpus: Artifact | None) -> dict[str, Artifact]:
    """Make every configured draft, or find it; returns artifacts by draft name."""
    made: dict[str, Artifact] = {}
    # Whatever needs another draft comes after it.
    for name in sorted(context.cfg.draft, key=lambda name: len(_chain(context.cfg, name))):
        make = partial(_make, context, name, corpus, made)
        made[name] = context.store.obtain(draft_spec(context, name, corpus), make=make)
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
        key = "of" if getattr(draft, "of", None) else "start_from"
        wanted = getattr(draft, key, None)
        if not wanted:
            continue
        names = wanted if isinstance(wanted, list) else [wanted]
        other = needed(cfg, name)
        where = f"draft.{name}.{key}"
        if other is None:
            mend = f"add it to the list, as in draft=[none,{names[0]},{name}], or name one that is in it"
            raise InputError(f"no draft {' or '.join(map(repr, names))} in the list", where=where, mend=mend)
        if hasattr(draft, "of") and hasattr(cfg.draft[other], "of"):
            raise InputError(f"{other!r} contains a draft itself", where=where, mend="name one that contains none")
        if name in _chain(cfg, other):
            raise InputError(f"{name!r} needs itself", where=where, mend="name a draft that does without it")


def needed(cfg: RunConfig, name: str) -> str | None:
    """Name of the draft that a draft contains or starts from; None for most, and where none of those is in the list."""
    draft = cfg.draft[name]
    wanted = getattr(draft, "of", None) or getattr(draft, "start_from", None) or []
    return next((other for other in ([wanted] if isinstance(wanted, str) else wanted) if other in cfg.draft), None)


def _chain(cfg: RunConfig, name: str) -> list[str]:
    """A draft, the one it needs, the one that needs, and so on, until one needs none or comes up again."""
    chain = [name]
    while (other := needed(cfg, chain[-1])) is not None:
        chain.append(other)
        if other in chain[:-1]:
            break
    return chain


@dataclass(frozen=True)
class _Trainee:
    """A draft in training, whatever its kind: what moves, what it learns from, and how it is saved."""

    module: nn.Module
    task: Distillation | FeatureDistillation
    save: Callable[[Path], None]


def _make(context: RunContext, name: str, corpus: Artifact | None, made: dict[str, Artifact], work: Work) -> None:
    draft = context.cfg.draft[name]
    work.metrics["kind"] = draft.kind
    other = needed(context.cfg, name)
    folder = made[other].path / DRAFT_FOLDER if other else None
    if not draft.trained:
        draft.write(dataclasses.replace(_draft_context(context, work), other=folder))
        return
    assert corpus is not None, "a trained draft needs a corpus"
    # The head alone is used, once per supervised token; fp32 keeps teacher and student comparable.
    target = load_target(context.target_folder, precision="fp32", device=context.cfg.target.torch_device())
    target.model.requires_grad_(False)
    shards = read_shards(corpus.path)
    if any(sample.states is None for shard in shards for sample in shard):
        shards = [capture_states(target, shard) for shard in tracked(shards, "states", unit="shards")]
    if isinstance(draft, FeatureDraftConfig):
        trainee = _feature_trainee(context, draft, target, shards, corpus, work, start=folder)
    else:
        trainee = _student_trainee(context, name, target, shards, work)
    _train(context, name, trainee, work)
    trainee.save(work.folder / DRAFT_FOLDER)


def _draft_context(context: RunContext, work: Work) -> DraftContext:
    return DraftContext(
        target_folder=context.target_folder,
        folder=work.folder / DRAFT_FOLDER,
        device=context.cfg.target.torch_device(),
        num_target_layers=int(str(config_shape(context.target_folder)["num_hidden_layers"])),
    )


def _student_trainee(
    context: RunContext, name: str, target: CausalModel, shards: list[list[Sample]], work: Work
) -> _Trainee:
    """A language model of its own, learning from tokens and states."""
    cfg = context.cfg
    draft = cfg.draft[name]
    student: Student = draft.student(_draft_context(context, work))
    target.check_same_vocabulary(student.model, where=f"draft.{name}")
    task = Distillation(
        student.model,
        target,
        [sample for shard in shards for sample in shard],
        objective=cfg.objective.build(),
        sequences_per_step=draft.sequences_per_step,
        max_tokens=draft.max_tokens,
        chunk_tokens=draft.chunk_tokens,
        seed=cfg.seed,
    )
    return _Trainee(student.model.model, task, student.save)


def _feature_trainee(
    context: RunContext,
    draft: FeatureDraftConfig,
    target: CausalModel,
    shards: list[list[Sample]],
    corpus: Artifact,
    work: Work,
    *,
    start: Path | None,
) -> _Trainee:
    """A network that reads the target's features, kept with the corpus or captured now; new, or that of `start`."""
    cfg = context.cfg
    samples = [sample for shard in shards for sample in shard]
    if start is None:
        vocabulary = draft_vocabulary(samples, size=draft.vocabulary, vocab_size=target.vocab_size)
        network = make_network(draft, target, vocabulary, seed=cfg.seed)
    else:
        network = go_on_from(start, target, draft)
        vocabulary = network.vocabulary
    covered = covered_mass(target, samples, vocabulary)
    if vocabulary is not None:
        logger.info("%s proposes %d tokens, %.1f %% of the target's mass", draft.kind, len(vocabulary), 100 * covered)
    work.metrics["covered_mass"] = covered
    task = FeatureDistillation(
        network,
        target,
        samples,
        features_of=_features(target, shards, corpus, network.taps, work),
        objective=cfg.objective.build(),
        seed=cfg.seed,
    )

    def save(folder: Path) -> None:
        save_network(network, folder, target_folder=context.target_folder)
        write_spec(folder, {"kind": "feature"})

    return _Trainee(network, task, save)


def _features(
    target: CausalModel, shards: list[list[Sample]], corpus: Artifact, taps: list[int], work: Work
) -> FeaturesOf:
    """Features by sample: the corpus's own where it kept these layers; else captured beside the draft, shard by shard,
    if the disk has room; else from the target again whenever a batch asks."""
    if set(taps) <= set(kept_taps(corpus.path)):
        return FeatureShards(corpus.path, shards, taps=taps).resident(target.device).of
    folder = work.folder / "features"
    work.drop.add("features")
    # What an interrupted build has captured already needs no further room.
    missing = [shard for index, shard in enumerate(shards) if not features_path(folder, index).is_file()]
    tokens = sum(sample.tokens.shape[0] for shard in missing for sample in shard)
    hidden = target.model.config.get_text_config(decoder=True).hidden_size
    size = feature_bytes(tokens=tokens, hidden=hidden, num_taps=len(taps))
    room = shutil.disk_usage(work.folder).free / 2
    if size > room:
        said = f"features need {size / 2**20:.0f} MiB, there is room for {room / 2**20:.0f}"
        logger.warning("%s: the target runs again every step", said)
        return partial(capture_features, target, taps=taps)
    logger.info("the corpus kept no features of layers %s: capturing %.0f MiB", taps, size / 2**20)
    folder.mkdir(exist_ok=True)
    for index, shard in tracked(list(enumerate(shards)), "features", unit="shards"):
        if not features_path(folder, index).is_file():
            write_features(folder, index, [capture_features(target, sample, taps) for sample in shard], taps)
    return FeatureShards(folder, shards, taps=taps).resident(target.device).of


def _train(context: RunContext, name: str, trainee: _Trainee, work: Work) -> None:
    """Let the training loop move the draft, and leave its curve beside it."""
    cfg, task = context.cfg, trainee.task
    draft = cfg.draft[name]
    trainer = resolved_trainer(cfg, context.plan, name)
    logger.info("training %s: %d steps, %d samples", name, trainer.steps, len(task.train))

    def batches(step: int, micro: int) -> Batch:
        return task.batch(step, micro, accumulation=trainer.accumulation)

    def loss(batch: Batch) -> LossOutput:
        sums = task.loss(batch)
        return LossOutput(sums.loss, sums.tokens, {"acceptance": (sums.acceptance, sums.tokens)})

    settings = {"draft": name, "kind": draft.kind, "steps": trainer.steps, "seed": cfg.seed}
    result = fit(
        trainee.module,
        batches=batches,
        loss=loss,
        optimizer=_optimizer(cfg.optimizer, draft),
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


def _optimizer(optimizer: Any, draft: Any) -> Any:
    """The optimizer's settings, with the draft's own learning rate where it has one."""
    return dataclasses.replace(optimizer, lr=draft.lr) if draft.lr else optimizer
