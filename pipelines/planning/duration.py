"""Seconds of training and of writing responses: from operations and bandwidth, or from this machine's profile."""

import math
from dataclasses import dataclass
from typing import Any

from distill.responses.local import Config as LocalResponses
from inference.errors import InputError
from inference.feature_networks._layers import DraftShape
from pipelines.config import RunConfig
from pipelines.plan import time_generation
from pipelines.planning.machine import Machine
from pipelines.planning.passes import Conversation, StepCost

_BF16 = 2
# Writing shards, drafting prompts, and batches that pad more than the timed one. As in pipelines.plan.
_GENERATION_OVERHEAD = 1.2
# Of a step over its products: attention, loss, update. In CPU seconds of a thread, on the embedded target, what is
# predicted with it was 1.02 of what was measured for a pruned draft, 1.16 for EAGLE-3 and 0.96 for DSpark.
_STEP_OVERHEAD = 1.25
# Of a step under autocast over one in fp32, beside the products. As in pipelines.plan.
_AUTOCAST_OVERHEAD = 1.4


@dataclass(frozen=True)
class Generation:
    """How fast responses are written.

    Attributes:
        tokens_per_s: response tokens of all devices together.
        how: for people.
    """

    tokens_per_s: float
    how: str


def step_seconds(
    machine: Machine, draft: Any, cost: StepCost, *, micros: int, conversation: Conversation, shape: DraftShape
) -> float:
    """Seconds of one optimizer step.

    Args:
        machine: that trains.
        draft: settings of what is trained.
        cost: of one micro-batch.
        micros: micro-batches of a step, of all processes together.
        conversation: a typical one.
        shape: of the target.
    """
    rounds = micros / machine.size
    if machine.profile is None:
        return rounds * cost.flops / machine.flops
    token_layers, head_positions = draft.step_work(
        prompt_tokens=conversation.prompt,
        response_tokens=conversation.response,
        num_target_layers=shape.target_layers,
        vocab_size=shape.vocab,
    )
    each = machine.profile.train[machine.arithmetic]
    overhead = _STEP_OVERHEAD * (_AUTOCAST_OVERHEAD if machine.arithmetic == "bf16" else 1.0)
    seconds: float = (each["layer"] * token_layers + each["head"] * head_positions) * overhead
    conversations: float = rounds * draft.sequences_per_step
    return conversations * seconds


def generation(
    cfg: RunConfig,
    machine: Machine,
    conversation: Conversation,
    *,
    conversations: int,
    parameters: int,
    flops: float,
    shape: DraftShape,
) -> Generation:
    """How fast the target writes.

    Args:
        cfg: the run.
        machine: that writes.
        conversation: a typical one.
        conversations: how many are written.
        parameters: of the target.
        flops: of the target reading that conversation once.
        shape: of the target.
    """
    plan = cfg.plan
    batch = plan.generation_batch or int(cfg.corpus.batch_size)
    if plan.generation_tokens_per_s:
        return Generation(plan.generation_tokens_per_s, "as plan.generation_tokens_per_s says")
    if machine.profile is not None:
        return _measured(cfg, machine, conversation, conversations)
    cached = 2 * shape.target_layers * shape.kv_heads * shape.head_dim * _BF16  # bytes of one token's keys and values
    held = batch * (conversation.prompt + conversation.response / 2) * cached
    read = (_BF16 * parameters + held) / (plan.bandwidth_gb_s * 1e9)
    compute = batch * flops / conversation.tokens / machine.flops
    prompts = batch * conversation.prompt * flops / conversation.tokens / machine.flops
    seconds = prompts + conversation.response * max(read, compute)
    limit = "operations" if compute > read else "bandwidth"
    return Generation(
        machine.size * batch * conversation.response / seconds, f"batches of {batch} a device, limited by {limit}"
    )


def _measured(cfg: RunConfig, machine: Machine, conversation: Conversation, conversations: int) -> Generation:
    """By timing a batch on this machine, which loads the target."""
    assert machine.profile is not None, "this machine was measured"
    if not isinstance(cfg.corpus, LocalResponses):
        raise InputError(
            "the speed of a server is not known here",
            where="plan.generation_tokens_per_s",
            mend="say how many tokens a second it writes",
        )
    fixed = cfg.target.precision
    precision = machine.profile.generation_precisions[0] if fixed == "auto" else fixed
    prompts, step = time_generation(cfg, cfg.corpus, precision)
    seconds = (prompts * conversation.prompt + step * conversation.response) * _GENERATION_OVERHEAD
    # A last batch that is not full takes about as long.
    batches = math.ceil(conversations / cfg.corpus.batch_size)
    rate = machine.size * conversations * conversation.response / (batches * seconds)
    return Generation(rate, f"batches of {cfg.corpus.batch_size} in {precision}, timed here")
