"""One draft in training: what it is, what it learns from, and the loop that moves it.

Joins what `distill` knows (students, batches, losses) with what `train` knows (how parameters move). Under an engine of
several processes all of them do all of this with the same arguments: each holds a target of its own, captures its share
of what the corpus lacks, and takes its share of every step. The first one leads; it alone writes the draft.
"""

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.conversation import Joined
from distill.corpus import StoredSamples, read_shards
from distill.distillation import Distillation
from distill.draft_vocabulary import covered_mass, draft_vocabulary
from distill.drafts import DraftContext, Student, write_spec
from distill.feature_distillation import FeatureDistillation
from distill.features import kept_taps
from inference.drafters.quantized import quantization_config
from inference.errors import InputError
from inference.feature_drafts import FeatureDraftConfig
from inference.feature_networks import FeatureNetwork, make_network
from inference.feature_networks._checkpoint import go_on_from, save_network, taps_of
from inference.lean import use_plain_layers
from inference.loading import load_causal_model, load_ends
from inference.model import CausalModel
from inference.parallel import load_target
from inference.precision import storage_dtype
from inference.processes import Group, num_processes
from inference.target import PACKED_FORMATS, config_shape, stop_tokens
from pipelines.capturing import FEATURES, STATED, captured_features, captured_states, let_layers_go
from pipelines.company import Company
from pipelines.config import RunConfig
from train.config import TrainerConfig
from train.engines.spreading import spread_frozen
from train.loop import Batch, FitResult, LossOutput, fit
from train.results import Pair
from train.trackers import Tracker
from train.trackers.none import NoTracker

logger = logging.getLogger(__name__)

SCRATCH = ("checkpoints", FEATURES, STATED)
"""What training leaves in its folder that the finished draft does without."""
# Left of the device beside a resident corpus; steps of the embedded target's drafts take under 8 GiB.
_ROOM_FOR_STEPS = 16 * 2**30


@dataclass(frozen=True)
class Lesson:
    """Everything that decides a training, as every process knows it.

    Attributes:
        cfg: the run's configuration.
        name: of the draft.
        trainer: the loop's settings, steps and precision resolved.
        target_folder: the target's files.
        corpus: folder of the corpus.
        folder: where checkpoints and captured features go.
        start: folder of the draft whose weights training goes on from; None to start anew.
        reference: folder of the draft that says which tokens are worth learning from; None without one.
    """

    cfg: RunConfig
    name: str
    trainer: TrainerConfig
    target_folder: Path
    corpus: Path
    folder: Path
    start: Path | None = None
    reference: Path | None = None

    @property
    def draft(self) -> Any:
        """The draft's settings."""
        return self.cfg.draft[self.name]


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Attributes:
        result: of the loop.
        metrics: of the draft and its corpus, for the manifest.
        save: writes the draft into a folder.
    """

    result: FitResult
    metrics: dict[str, Any]
    save: Callable[[Path], None]


@dataclass
class _Trainee:
    """A draft in training, whatever its kind: what moves, what it learns from, and how it is saved."""

    module: nn.Module
    task: Distillation | FeatureDistillation
    save: Callable[[Path], None]
    used_apart: list[nn.Module]
    metrics: dict[str, Any] = field(default_factory=dict)


def train(lesson: Lesson, *, tracker: Tracker | None = None, group: Group | None = None) -> Trained:
    """Train a draft, or go on with its training.

    Args:
        lesson: what and how.
        tracker: where curves go, on the process that leads.
        group: the processes that train together; all of them call this.

    Raises:
        InputError: the corpus or the target cannot be read, or do not fit the draft.
        TrainingError: see `train.loop.fit`.
    """
    company = Company(group)
    trainee = _trainee(lesson, company)
    trainer, task = lesson.trainer, trainee.task
    if company.rank == 0:
        logger.info("training %s: %d steps, %d samples", lesson.name, trainer.steps, len(task.train))

    def batches(step: int, micro: int) -> Batch:
        return task.batch(step, micro, accumulation=trainer.accumulation)

    def loss(batch: Batch) -> LossOutput:
        sums = task.loss(batch)
        counted: dict[str, Pair] = {"acceptance": (sums.acceptance, sums.tokens)}
        return LossOutput(sums.loss, sums.tokens, counted, supervised=sums.supervised, fed=sums.fed)

    result = fit(
        trainee.module,
        batches=batches,
        loss=loss,
        optimizer=_optimizer(lesson.cfg.optimizer, lesson.draft),
        cfg=trainer,
        folder=lesson.folder,
        tracker=tracker or NoTracker(),
        evaluate=task.evaluate if task.validation else None,
        weigh=task.weight,
        used_apart=trainee.used_apart,
        ahead=task.batches_ahead and company.device(lesson.cfg).type == "cuda",
        fixed_shapes=task.fixed_shapes,
    )
    if company.rank == 0 and result.speed is not None:
        logger.info("trained %s: %s", lesson.name, result.speed)
    return Trained(result, {**trainee.metrics, **task.counts}, trainee.save)


def _optimizer(optimizer: Any, draft: Any) -> Any:
    """The optimizer's settings, with the draft's own learning rate where it has one."""
    return dataclasses.replace(optimizer, lr=draft.lr) if draft.lr else optimizer


# What is trained


def _trainee(lesson: Lesson, company: Company) -> _Trainee:
    shards = company.together(lambda: read_shards(lesson.corpus))
    target = company.together(lambda: _target(lesson, company, shards))
    if isinstance(lesson.draft, FeatureDraftConfig):
        return _feature_trainee(lesson, company, target, shards)
    return _student_trainee(lesson, company, target, shards)


def _target(lesson: Lesson, company: Company, shards: Sequence[StoredSamples]) -> CausalModel:
    """The teacher, frozen, without its layers where nothing runs them. Alone under torchrun it is spread over the
    processes; where these train, each has its own.

    Its head is used once per supervised token; fp32 keeps teacher and student comparable.

    Raises:
        InputError: it cannot be loaded, or its head is in bf16 and training is not.
    """
    cfg, device = lesson.cfg.target, company.device(lesson.cfg)
    alone = company.group is not None or num_processes() == 1
    last_layers = _layers_read(lesson, shards)
    if alone and cfg.teacher_precision == "fp32" and last_layers is not None:
        target = load_ends(lesson.target_folder, precision="fp32", device=device, last_layers=last_layers)
        target.model.requires_grad_(False)
        return target
    packs = cfg.teacher_precision in PACKED_FORMATS
    compute = ("fp32" if device.type == "cpu" else "bf16") if packs else cfg.teacher_precision
    if compute == "bf16" and lesson.trainer.precision != "bf16":
        raise InputError(
            f"a teacher in {cfg.teacher_precision} has a head in bf16, and trainer.precision is fp32",
            where="target.teacher_precision",
            mend="use trainer.precision=bf16, or target.teacher_precision=fp32",
        )
    if packs:
        packed = quantization_config(cfg.teacher_precision, compute_dtype=storage_dtype(compute))
        target = load_causal_model(lesson.target_folder, precision=compute, device=device, quantization=packed)
    else:
        load = load_causal_model if company.group else load_target
        target = load(lesson.target_folder, precision=compute, device=device)
    # A spread target is gathered when a module is called, and lean layers call none; a whole one is to say the same.
    use_plain_layers(target.model)
    target.model.requires_grad_(False)
    return target


def _layers_read(lesson: Lesson, shards: Sequence[StoredSamples]) -> int | None:
    """How many of the target's last layers a training reads the weights of; None where it runs the target, since the
    corpus lacks states or features that the draft learns from, or the draft writes some of its lessons."""
    draft = lesson.draft
    if not all(sample.has_states for shard in shards for sample in shard):
        return None
    if not isinstance(draft, FeatureDraftConfig):
        return None if draft.on_policy_share > 0.0 else 0
    num_layers = int(str(config_shape(lesson.target_folder)["num_hidden_layers"]))
    taps = draft.tapped_layers(num_layers) if lesson.start is None else taps_of(lesson.start)
    if not set(taps) <= set(kept_taps(lesson.corpus)):
        return None
    return draft.layers_read if lesson.start is None and draft.init == "target" else 0


def _spread(lesson: Lesson, company: Company, target: CausalModel) -> bool:
    """Spread the target's layers over the processes (ZeRO stage 3) where that is asked for. From here on these call it
    the same number of times. What drafts borrow, embedding and head, stays whole."""
    if not lesson.cfg.target.spread_teacher or company.size == 1:
        return False
    embedding = target.model.get_input_embeddings()
    target.model.set_input_embeddings(copy.deepcopy(embedding))
    spread_frozen(target.model.base_model)
    return True


def _student_trainee(lesson: Lesson, company: Company, target: CausalModel, shards: list[StoredSamples]) -> _Trainee:
    """A language model of its own, learning from tokens and states."""
    cfg, draft = lesson.cfg, lesson.draft
    device = company.device(cfg)
    context = DraftContext(
        target_folder=lesson.target_folder,
        folder=lesson.folder,
        device=device,
        num_target_layers=int(str(config_shape(lesson.target_folder)["num_hidden_layers"])),
    )

    def student_of() -> Student:
        student: Student = draft.student(context)
        use_plain_layers(student.model.model)
        target.check_same_vocabulary(student.model, where=f"draft.{lesson.name}")
        return student

    student = company.together(student_of)
    on_policy = draft.on_policy(stop_tokens(target))
    spread = _spread(lesson, company, target)
    shards = captured_states(lesson.folder, company, target, shards, spread=spread)
    if on_policy is None:
        let_layers_go(target)
    task = company.together(
        lambda: Distillation(
            student.model,
            target,
            Joined(shards),
            objective=cfg.objective.build(),
            sequences_per_step=draft.sequences_per_step,
            max_tokens=draft.max_tokens,
            chunk_tokens=draft.chunk_tokens,
            seed=cfg.seed,
            bucket_batches=draft.bucket_batches,
            on_policy=on_policy,
            keep_share=draft.keep_share,
            reference=_reference(lesson, target, device),
        )
    )
    return _Trainee(student.model.model, task, student.save, used_apart=[student.model.head])


def _reference(lesson: Lesson, target: CausalModel, device: torch.device) -> CausalModel | None:
    """The frozen draft that says which tokens are worth learning from.

    Raises:
        InputError: it cannot be read, or its tokens are others.
    """
    if lesson.reference is None or lesson.draft.keep_share == 1.0:
        return None
    reference = load_causal_model(lesson.reference, precision="fp32", device=device)
    target.check_same_vocabulary(reference, where=f"draft.{lesson.name}.reference")
    reference.model.requires_grad_(False).eval()
    return reference


def _feature_trainee(lesson: Lesson, company: Company, target: CausalModel, shards: list[StoredSamples]) -> _Trainee:
    """A network that reads the target's features, kept with the corpus or captured now; new, or that of `start`."""
    cfg, draft = lesson.cfg, lesson.draft

    def network_of() -> FeatureNetwork:
        if lesson.start is not None:
            return go_on_from(lesson.start, target, draft)
        vocabulary = draft_vocabulary(Joined(shards), size=draft.vocabulary, vocab_size=target.vocab_size)
        return make_network(draft, target, vocabulary, seed=cfg.seed)

    network = company.together(network_of)
    spread = _spread(lesson, company, target)
    shards = captured_states(lesson.folder, company, target, shards, spread=spread)
    samples = Joined(shards)
    covered = covered_mass(target, samples, network.vocabulary)
    if network.vocabulary is not None and company.rank == 0:
        said = (draft.kind, len(network.vocabulary), 100 * covered)
        logger.info("%s proposes %d tokens, %.1f %% of the target's mass", *said)
    captures = lesson.trainer.captures(target.device.type)
    features = captured_features(
        lesson.corpus, lesson.folder, company, target, shards, network.taps, spread=spread, resident=not captures
    )
    task = company.together(
        lambda: FeatureDistillation(
            network, target, samples, features_of=features, objective=cfg.objective.build(), seed=cfg.seed
        )
    )

    if captures and _all_have_room(task, lesson.name, company):
        company.together(task.keep_resident)

    def save(folder: Path) -> None:
        save_network(network, folder, target_folder=lesson.target_folder)
        write_spec(folder, {"kind": "feature"})

    apart = [network.head, *([network.lm_head] if network.vocabulary is not None else [])]
    return _Trainee(network, task, save, used_apart=apart, metrics={"covered_mass": covered})


def _all_have_room(task: FeatureDistillation, name: str, company: Company) -> bool:
    """Whether every process has room on its device for the whole corpus and for steps. Where one has not, all go kernel
    by kernel; the first one says so."""
    wanted, device = task.resident_bytes(), task.target.device
    own = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    room = min(map(float, company.of_all(str(own))))
    fits = wanted + _ROOM_FOR_STEPS <= room
    if company.rank == 0 and fits:
        logger.info("%s: %.1f GiB of the corpus onto the device", name, wanted / 2**30)
    elif company.rank == 0:
        said = f"the corpus needs {wanted / 2**30:.1f} GiB of the device and steps {_ROOM_FOR_STEPS / 2**30:.0f}"
        logger.info("%s: %s, of which %.1f are free, so steps run kernel by kernel", name, said, room / 2**30)
    return fits
