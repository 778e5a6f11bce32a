"""`dspark plan`: figures of a run before it is run, shown, written and judged.

    dspark plan experiment=dspark_qwen3_4b plan.json=plan.json

Nothing is trained, and nothing is kept but that file. No weights are loaded, unless this machine is to be measured.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch

from distill.drafts import TrainedConfig, pruned
from distill.responses.local import Config as LocalResponses
from inference.feature_drafts import FeatureDraftConfig
from inference.layers import decoder_layers
from pipelines.config import RunConfig
from pipelines.corpus import VALIDATION_SHARE
from pipelines.planning import disk, duration, memory, report
from pipelines.planning.figures import CorpusFigures, DraftFigures, Planning, misfits
from pipelines.planning.machine import Machine, described
from pipelines.planning.passes import Conversation, forward_flops, step_cost
from pipelines.planning.shapes import Sketch, count, sketch_draft, sketch_target, target_config

logger = logging.getLogger(__name__)

_RESPONSE_SHARE = 0.75
# What the index of a corpus holds of a conversation; tokens, states and features stay in mapped files.
_INDEX_BYTES = 45


def run_planning(cfg: RunConfig) -> float:
    """Plan, show, write where asked, and say whether it fits.

    Returns:
        1 when everything fits, else 0.

    Raises:
        InputError: a target or a draft that cannot be built, or a speed that is not known.
    """
    plan = make_planning(cfg)
    report.show(plan)
    if cfg.plan.json:
        report.write(plan, Path(cfg.plan.json).expanduser())
        logger.info("figures     %s", cfg.plan.json)
    for line in plan.misfits:
        logger.warning("does not fit: %s", line)
    if not plan.misfits:
        logger.info("fits        %s; %.1f hours in all", plan.machine, plan.hours)
    return 0.0 if plan.misfits else 1.0


def make_planning(cfg: RunConfig) -> Planning:
    """All figures of a run.

    Raises:
        InputError: see `run_planning`.
    """
    target = sketch_target(target_config(cfg))
    machine = described(cfg)
    parameters = count(target.model.model.parameters())
    conversation = _mean_conversation(cfg)
    amount = _amount(cfg, conversation)
    corpus = _corpus(cfg, target, machine, amount, conversation, parameters=parameters)
    drafts = {
        name: _draft(cfg, name, draft, target, machine, amount, parameters=parameters)
        for name, draft in cfg.draft.items()
        if draft.trained
    }
    stage, engine = _stage(cfg), _engine(cfg, machine)
    host = machine.processes * (
        _INDEX_BYTES * amount.conversations + max((draft.offloaded for draft in drafts.values()), default=0.0)
    )
    plan = Planning(
        machine=machine.name,
        arithmetic=machine.arithmetic,
        processes=machine.size,
        engine=engine,
        zero_stage=stage,
        micros=cfg.trainer.accumulation,
        target_parameters=parameters,
        memory=machine.memory,
        host=machine.host,
        disk=machine.disk,
        host_needed=host,
        corpus=corpus,
        drafts=drafts,
    )
    plan.misfits.extend(misfits(plan))
    return plan


def _stage(cfg: RunConfig) -> int:
    """The ZeRO stage: the plan's, else the trainer's where DeepSpeed runs it."""
    if cfg.plan.zero_stage >= 0:
        return cfg.plan.zero_stage
    return cfg.trainer.zero_stage if cfg.trainer.engine == "deepspeed" else 0


def _engine(cfg: RunConfig, machine: Machine) -> str:
    """What trains: the trainer's engine; but DeepSpeed where something is spread, or where several processes are
    planned for and that engine knows one alone."""
    engine = cfg.trainer.engine
    if _stage(cfg) > 0 or (engine == "plain" and machine.size > 1):
        return "deepspeed"
    return engine


def _mean_conversation(cfg: RunConfig) -> Conversation:
    response = cfg.plan.response_tokens or _RESPONSE_SHARE * cfg.corpus.max_new_tokens
    return Conversation(round(cfg.plan.prompt_tokens), max(1, round(response)))


def _amount(cfg: RunConfig, conversation: Conversation) -> disk.Amount:
    number = cfg.budget.responses or cfg.plan.responses
    return disk.Amount(number, number * conversation.tokens, number * conversation.response)


def _corpus(
    cfg: RunConfig,
    target: Sketch,
    machine: Machine,
    amount: disk.Amount,
    conversation: Conversation,
    *,
    parameters: int,
) -> CorpusFigures:
    shape = target.shape
    kept = disk.kept_layers(cfg.corpus, amount, layers=shape.target_layers, hidden=shape.hidden)
    flops = forward_flops(target, conversation.tokens) if machine.profile is None else 0.0
    speed = duration.generation(
        cfg,
        machine,
        conversation,
        conversations=amount.conversations,
        parameters=parameters,
        flops=flops,
        shape=shape,
    )
    taps = max((len(_taps(draft, target)) for draft in cfg.draft.values()), default=0) or len(kept)
    return CorpusFigures(
        conversations=amount.conversations,
        prompt_tokens=conversation.prompt,
        response_tokens=conversation.response,
        tokens=amount.tokens,
        to_write=amount.written,
        tokens_per_s=speed.tokens_per_s,
        how=speed.how,
        disk=disk.corpus_parts(cfg.corpus, amount, kept=kept, hidden=shape.hidden),
        reference_cache=disk.reference_bytes(amount, taps=taps, hidden=shape.hidden),
    )


def _taps(draft: Any, target: Sketch) -> list[int]:
    """Target layers a draft reads; none for those that read tokens."""
    return draft.tapped_layers(target.shape.target_layers) if isinstance(draft, FeatureDraftConfig) else []


def _unread(cfg: RunConfig, draft: Any, target: Sketch, kept: list[int]) -> int:
    """Layers of the target that are not loaded for a training, as `pipelines.training` decides."""
    corpus, layers = cfg.corpus, target.shape.target_layers
    stated = isinstance(corpus, LocalResponses) and corpus.keep_states
    if cfg.target.teacher_precision != "fp32" or not stated:
        return 0
    if not isinstance(draft, FeatureDraftConfig):
        return 0 if draft.on_policy_share > 0 else layers - 1
    read = draft.layers_read if draft.init == "target" and not draft.start_from else 0
    if read is None or not set(_taps(draft, target)) <= set(kept):
        return 0
    return layers - max(1, read)


def _draft(
    cfg: RunConfig,
    name: str,
    draft: Any,
    target: Sketch,
    machine: Machine,
    amount: disk.Amount,
    *,
    parameters: int,
) -> DraftFigures:
    """One trained draft. Time is that of mean conversations, memory that of the longest ones."""
    engine = _engine(cfg, machine)
    halved = engine == "deepspeed" and machine.arithmetic == "bf16"
    student = sketch_draft(name, draft, target, dtype=torch.bfloat16 if halved else torch.float32)
    trained, frozen = count(student.trained), count(student.frozen)
    mean = _mean_conversation(cfg)
    usual = Conversation.of(mean.prompt, mean.response, longest=draft.max_tokens)
    longest = Conversation.of(mean.prompt, draft.max_tokens, longest=draft.max_tokens)
    settings = {
        "objective": cfg.objective.build(),
        "arithmetic": machine.arithmetic,
        "device": machine.device,
    }
    cost = step_cost(student, draft, target, conversation=usual, **settings)
    peak = step_cost(student, draft, target, conversation=longest, **settings)
    micros = cfg.trainer.accumulation
    scores = isinstance(draft, TrainedConfig) and draft.on_policy_share > 0  # what the student writes itself
    shape = target.shape
    kept = disk.kept_layers(cfg.corpus, amount, layers=shape.target_layers, hidden=shape.hidden)
    layers = count(decoder_layers(target.model.model).parameters())
    training = memory.Training(
        loaded=parameters - _unread(cfg, draft, target, kept) * layers // shape.target_layers,
        kept=parameters if scores else parameters - layers,
        trained=trained,
        frozen=frozen,
        read=parameters if isinstance(draft, pruned.Config) else trained + frozen,
        cost=peak,
        optimizer=cfg.optimizer.kind,
        engine=engine,
        halved=halved,
        offload=cfg.trainer.offload,
        processes=machine.size,
    )
    saved = disk.checkpoint_bytes(trained, cfg.optimizer.kind)
    return DraftFigures(
        kind=draft.kind,
        parameters=trained + frozen,
        trained=trained,
        steps=_steps(cfg, draft, amount),
        conversations=draft.sequences_per_step * micros,
        supervised=cost.supervised * micros,
        step_flops=cost.flops * micros,
        step_seconds=duration.step_seconds(machine, draft, cost, micros=micros, conversation=usual, shape=shape),
        memory={stage: memory.memory_parts(training, stage) for stage in memory.stages(engine)},
        loading=memory.loading_bytes(training),
        offloaded=memory.offloaded_bytes(training, _stage(cfg)),
        checkpoint=saved,
        # One more than are kept exists while it is written.
        checkpoints=saved * (1 + cfg.trainer.keep_checkpoints),
        captured=disk.captured_bytes(cfg.corpus, amount, taps=_taps(draft, target), kept=kept, hidden=shape.hidden),
        disk=disk.draft_bytes(student),
    )


def _steps(cfg: RunConfig, draft: Any, amount: disk.Amount) -> int:
    """Optimizer steps: the trainer's, else those of the epochs over what is not for validation."""
    if cfg.trainer.steps:
        return cfg.trainer.steps
    train = amount.conversations - round(VALIDATION_SHARE * amount.conversations)
    a_step: int = draft.sequences_per_step * cfg.trainer.accumulation
    return max(1, math.ceil(cfg.plan.epochs * train / a_step))
