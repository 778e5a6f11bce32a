"""The time plan: how many responses and training steps fit the budget on this machine, fixed before anything is run.

An artifact of its own, so that a rerun repeats the plan instead of measuring anew. Estimates come from the device
profile; explicit numbers in the configuration replace them. The number of scored prompts follows later from the speed
of the arms on validation prompts, and is then fixed in the score.
"""

import dataclasses
import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from distill.responses.local import Config as LocalResponses
from inference.batch.responses import answer_all
from inference.device_profile import DeviceProfile, device_profile, profile_from_json
from inference.errors import InputError
from inference.target import config_shape
from pipelines.artifacts import Artifact, Spec, Store, Work
from pipelines.config import RunConfig
from pipelines.files import read_json, write_json

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"

# Writing shards, drafting prompts, and batches that pad more than the timed one. From runs on two CPUs.
_GENERATION_OVERHEAD = 1.2
_TIMED_PROMPT_TOKENS = 48
_TIMED_STEPS = 8
# Of a training step under autocast over one in fp32, beside the products: casts. From runs on two CPUs.
_AUTOCAST_OVERHEAD = 1.4
MEAN_PROMPT_TOKENS = 110
_MEAN_RESPONSE_SHARE = 0.75


@dataclass(frozen=True)
class Plan:
    """What this machine will do within the budget.

    Attributes:
        device: it was made on.
        responses: conversations in the corpus.
        steps: optimizer steps by trained draft.
        baseline_precision: of target-only decoding.
        block_precision: of verifying blocks, and of draft models.
        generation_precision: of batched generation.
        train_precision: of training.
        profile: the measurements behind it.
    """

    device: str
    responses: int
    steps: dict[str, int]
    baseline_precision: str
    block_precision: str
    generation_precision: str
    train_precision: str
    profile: DeviceProfile

    def lines(self) -> list[str]:
        """The plan for people."""
        steps = ", ".join(f"{name} {count}" for name, count in self.steps.items()) or "no draft is trained"
        return [
            f"device      {self.device}",
            f"precision   target-only {self.baseline_precision}, blocks {self.block_precision}, "
            f"generation {self.generation_precision}, training {self.train_precision}",
            f"corpus      {self.responses} responses",
            f"training    steps: {steps}",
        ]


def make_plan(cfg: RunConfig, store: Store, *, target_digest: str) -> tuple[Plan, Artifact]:
    """The plan of this configuration on this machine, measured and fixed on first use."""
    profile = device_profile(cfg.target, cfg.paths.cache)
    spec = Spec(
        "plan",
        config={
            "budget": cfg.budget,
            "precision": cfg.target.precision,
            "trainer": {"steps": cfg.trainer.steps, "precision": cfg.trainer.precision},
            "corpus": cfg.corpus,
            "draft": {name: draft for name, draft in cfg.draft.items() if draft.trained},
            "device": profile.device,
            "versions": profile.versions,
        },
        inputs={"target": target_digest},
    )

    def make(work: Work) -> None:
        write_json(work.folder / PLAN_FILE, asdict(_plan(cfg, profile)))

    artifact = store.obtain(spec, make=make)
    return read_plan(artifact), artifact


def read_plan(artifact: Artifact) -> Plan:
    """Read a plan artifact."""
    data: dict[str, Any] = read_json(artifact.path / PLAN_FILE)
    return Plan(**{**data, "profile": profile_from_json(data["profile"])})


def _plan(cfg: RunConfig, profile: DeviceProfile) -> Plan:
    """Turn minutes into counts."""
    fixed = cfg.target.precision
    if fixed != "auto" and fixed not in profile.passes:
        raise InputError(
            f"{fixed} is not on offer on this device",
            where="target.precision",
            mend=f"use auto or one of {', '.join(profile.passes)}",
        )
    train_precision = cfg.trainer.precision if cfg.trainer.precision != "auto" else profile.train_precision
    generation_precision, responses = _responses(cfg, profile.generation_precisions if fixed == "auto" else [fixed])
    trained = {name: draft for name, draft in cfg.draft.items() if draft.trained}
    return Plan(
        device=profile.device,
        responses=responses,
        steps={name: _steps(cfg, profile, name, train_precision) for name in trained},
        baseline_precision=profile.baseline_precision if fixed == "auto" else fixed,
        block_precision=profile.block_precision if fixed == "auto" else fixed,
        generation_precision=generation_precision,
        train_precision=train_precision,
        profile=profile,
    )


def _responses(cfg: RunConfig, precisions: list[str]) -> tuple[str, int]:
    """The fastest arithmetic of several for generation, and how many responses fit, in whole batches.

    An explicit number of responses is not worth the timing: the first arithmetic then. A server's speed is unknown, so
    it needs one.
    """
    if cfg.budget.responses:
        return precisions[0], cfg.budget.responses
    corpus = cfg.corpus
    if not isinstance(corpus, LocalResponses):
        raise InputError(
            "the speed of a server is not known here", where="budget.responses", mend="set budget.responses=N"
        )

    def batch_seconds(precision: str) -> float:
        prompts, step = time_generation(cfg, corpus, precision)
        # Answers end before they are cut, and the batch shrinks with them.
        return prompts * MEAN_PROMPT_TOKENS + step * corpus.max_new_tokens * _MEAN_RESPONSE_SHARE

    seconds, precision = min((batch_seconds(precision), precision) for precision in precisions)
    batches = int(cfg.budget.corpus_minutes * 60 / (seconds * _GENERATION_OVERHEAD))
    return precision, max(1, batches) * corpus.batch_size


def time_generation(cfg: RunConfig, corpus: LocalResponses, precision: str) -> tuple[float, float]:
    """Seconds of a batch of responses, as the corpus will be written: per token of its prompts, and per step.

    Neither follows from passes of one request: prompts are wide passes, and a step attends for every row.
    """
    model = cfg.target.load(cfg.paths.cache, precision=precision)
    length = min(_TIMED_PROMPT_TOKENS, model.context_limit // 2)
    steps = min(_TIMED_STEPS, model.context_limit - length - 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (corpus.batch_size, length), generator=generator).tolist()

    taps = corpus.tapped_layers(model.model.config.get_text_config(decoder=True).num_hidden_layers)
    wanted = corpus.wanted(stop_tokens=frozenset(), taps=taps)

    def seconds(prompts: list[list[int]], tokens: int) -> float:
        start = time.perf_counter()
        asked = dataclasses.replace(wanted, max_new_tokens=tokens)
        answer_all(model, prompts, asked, max_running=corpus.batch_size, seed=0)
        return time.perf_counter() - start

    seconds([row[:4] for row in ids], 2)  # warms up
    prompts = seconds(ids, 1)
    step = max(0.0, seconds(ids, 1 + steps) - prompts) / steps
    return prompts / length, step


def _steps(cfg: RunConfig, profile: DeviceProfile, name: str, precision: str) -> int:
    """Optimizer steps of one draft that fit its share of the training time."""
    if cfg.trainer.steps:
        return cfg.trainer.steps
    draft = cfg.draft[name]
    shape = config_shape(cfg.target.folder(cfg.paths.cache))
    token_layers, head_positions = draft.step_work(
        prompt_tokens=MEAN_PROMPT_TOKENS,
        response_tokens=cfg.corpus.max_new_tokens * _MEAN_RESPONSE_SHARE,
        num_target_layers=int(str(shape.get("num_hidden_layers", 1))),
        vocab_size=int(str(shape["vocab_size"])),
    )
    cost = profile.train[precision]
    conversations = draft.sequences_per_step * cfg.trainer.accumulation
    step_seconds = (cost["layer"] * token_layers + cost["head"] * head_positions) * conversations
    share = draft.training_weight / sum(other.training_weight for other in cfg.draft.values() if other.trained)
    seconds = cfg.budget.training_minutes * 60 * share
    overhead = draft.training_overhead * (_AUTOCAST_OVERHEAD if precision == "bf16" else 1.0)
    return max(10, int(seconds / (step_seconds * overhead)))


def resolved_trainer(cfg: RunConfig, plan: Plan, name: str) -> Any:
    """The trainer's settings with the plan's steps and precision in place of zero and auto."""
    return dataclasses.replace(cfg.trainer, steps=plan.steps[name], precision=plan.train_precision, seed=cfg.seed)
