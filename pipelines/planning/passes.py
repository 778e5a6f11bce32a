"""What one training step does, counted while the real code runs it on fake tensors: operations, and bytes held at once.

The networks, the chunked loss and the objective are those of training; only the batch is made here, of conversations of
one length. Values do not exist, so nothing that depends on them is run: slots that are supervised are a number.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from distill.chunked import chunked_objective
from distill.objectives import Objective, reads_labels
from inference.feature_drafts import FeatureDraftConfig
from inference.feature_networks import FeatureNetwork, PackedBatch
from inference.loading import quiet_transformers
from pipelines.planning.shapes import Sketch, Student
from train import precision
from train.throughput import FlopCount

_CHUNK_TOKENS = {"cuda": 8192, "cpu": 256}
"""As `distill.feature_distillation` takes them where draft.<name>.chunk_tokens is 0."""


@dataclass(frozen=True)
class Conversation:
    """One conversation, cut to a longest length.

    Attributes:
        prompt: its tokens that are not the target's own.
        response: its tokens that are, at least 1.
    """

    prompt: int
    response: int

    @classmethod
    def of(cls, prompt: float, response: float, *, longest: int) -> "Conversation":
        """A conversation of about these numbers of tokens, cut as training cuts it: at the end."""
        asked = max(2, min(round(prompt), longest - 1))
        return cls(asked, max(1, min(round(response), longest - asked)))

    @property
    def tokens(self) -> int:
        """All of it."""
        return self.prompt + self.response


@dataclass(frozen=True)
class StepCost:
    """What one micro-batch costs.

    Attributes:
        flops: floating-point operations, forward and backward.
        held: most bytes held at once besides weights, gradients and the batch: activations and rows of logits.
        batch: bytes of the batch: tokens, features, states.
        supervised: positions that are learned from.
    """

    flops: float
    held: int
    batch: int
    supervised: int


class Meter(FlopCount):
    """Counts floating-point operations, and the bytes of tensors that were made inside and are still held.

    Args:
        known: tensors that were there before, whose memory does not count.

    Attributes:
        flops: operations so far, of products and attention.
        peak: most bytes held at once.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak, self._live = 0, 0
        self._held: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it made."""
        output = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return output

    def _hold(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return
        self._live += size
        self.peak = max(self.peak, self._live)

        def drop(_: Any) -> None:
            self._live -= size
            del self._held[key]

        self._held[key] = weakref.ref(storage, drop)


def step_cost(
    student: Student,
    draft: Any,
    target: Sketch,
    *,
    conversation: Conversation,
    objective: Objective,
    arithmetic: str,
    device: str,
) -> StepCost:
    """Run one micro-batch, gradients of an earlier one in place.

    Args:
        student: the draft.
        draft: its settings.
        target: whose head is the teacher.
        conversation: every conversation of the batch is like this.
        objective: what training minimises.
        arithmetic: "fp32" or "bf16".
        device: "cpu" or "cuda", which decides how many rows of logits exist at a time.
    """
    with target.mode, quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about kernels that fake tensors cannot take
        if isinstance(student.module, FeatureNetwork):
            batch, supervised = _packed(student.module, target, conversation, objective)
            work = _feature_work(student.module, target, objective, batch, supervised, device)
        else:
            batch, supervised = _padded(draft, target, conversation)
            work = _student_work(student, draft, target, objective, batch)
        for parameter in student.trained:
            parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in student.trained if parameter.grad is not None]
        there = [*student.module.parameters(), *student.module.buffers(), *target.model.model.parameters()]
        meter = Meter([*there, *target.model.model.buffers(), *grads, *batch.values()])
        with meter:
            with precision.arithmetic(arithmetic, device=torch.device("cpu")):
                loss = work()
            loss.backward()
            del loss
        for parameter in student.trained:
            parameter.grad = None
    return StepCost(meter.flops, meter.peak, sum(tensor.nbytes for tensor in batch.values()), supervised)


def forward_flops(target: Sketch, tokens: int) -> float:
    """Operations of the target reading one text of some tokens, output head at every position included."""
    with target.mode, torch.no_grad(), quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = target.model
        meter = Meter([*model.model.parameters(), *model.model.buffers()])
        with meter:
            model.head(model.states(torch.zeros(1, tokens, dtype=torch.long)))
    return meter.flops


def _packed(
    network: FeatureNetwork, target: Sketch, conversation: Conversation, objective: Objective
) -> tuple[dict[str, Tensor], int]:
    """The batch of `distill.feature_distillation`, and its supervised slots."""
    config, shape = network.config, target.shape
    length = conversation.tokens
    a_row = max(1, min(config.sequences_per_step, config.row_tokens // length))
    rows = math.ceil(config.sequences_per_step / a_row)
    asked, written = _anchors(config, conversation, objective)
    count = a_row * (asked + written)

    def whole(*size: int) -> Tensor:
        return torch.zeros(*size, dtype=torch.long)

    # A block that begins in a response ends with it.
    ends = min(config.block, conversation.response)
    valid = config.block - ends * (ends - 1) / (2 * conversation.response)
    supervised = max(1, round(config.sequences_per_step * (asked * config.block + written * valid)))
    width = rows, a_row * length
    return {
        "tokens": whole(*width),
        "segments": whole(*width),
        "positions": whole(*width),
        "features": torch.zeros(*width, len(network.taps) * shape.hidden, dtype=torch.bfloat16),
        "anchors": whole(rows, count),
        "slots": torch.zeros(rows, count, config.block, dtype=torch.bool),
        "labels": whole(supervised),
        "places": whole(supervised),
        "target_states": torch.zeros(supervised, shape.hidden, dtype=torch.bfloat16),
    }, supervised


def _anchors(config: FeatureDraftConfig, conversation: Conversation, objective: Objective) -> tuple[int, int]:
    """Anchors of one conversation: in its prompt, and in its response."""
    share = 0.0 if reads_labels(objective) else config.prompt_share
    asked = min(round(config.anchors * share), conversation.prompt - 2)
    return asked, min(config.anchors - asked, conversation.response)


def _feature_work(
    network: FeatureNetwork,
    target: Sketch,
    objective: Objective,
    batch: dict[str, Tensor],
    supervised: int,
    device: str,
) -> Callable[[], Tensor]:
    """As `FeatureDistillation.loss`."""
    config, dtype = network.config, next(network.parameters()).dtype

    def work() -> Tensor:
        packed = PackedBatch(
            **{name: batch[name] for name in ("tokens", "segments", "positions", "anchors", "slots")},
            features=batch["features"].to(dtype),
        )
        states = network.slot_states(packed).flatten(0, 2)[:supervised].clone()
        weights = torch.ones(supervised)
        result = chunked_objective(
            states,
            draft_head=network.head,
            target_logits=lambda rows: network.base_logits(batch["target_states"][rows].to(dtype)),
            labels=batch["labels"],
            weights=weights,
            objective=objective,
            chunk_tokens=config.chunk_tokens or _CHUNK_TOKENS[device],
        )
        confidence = network.confidence_logits(states)
        if confidence is None or not config.confidence_weight:
            return result.loss_sum
        wanted = result.acceptances.to(confidence.dtype).clamp(0.0, 1.0)
        terms = functional.binary_cross_entropy_with_logits(confidence, wanted, reduction="none")
        return result.loss_sum + config.confidence_weight * (weights * terms).sum()

    return work


def _padded(draft: Any, target: Sketch, conversation: Conversation) -> tuple[dict[str, Tensor], int]:
    """The batch of `distill.distillation`, and its supervised tokens."""
    sequences = int(draft.sequences_per_step)
    supervised = sequences * conversation.response
    size = sequences, conversation.tokens
    return {
        "tokens": torch.zeros(*size, dtype=torch.long),
        "attention": torch.ones(*size, dtype=torch.long),
        **{name: torch.zeros(supervised, dtype=torch.long) for name in ("rows", "columns", "labels")},
        "target_states": torch.zeros(supervised, target.shape.hidden, dtype=torch.bfloat16),
    }, supervised


def _student_work(
    student: Student, draft: Any, target: Sketch, objective: Objective, batch: dict[str, Tensor]
) -> Callable[[], Tensor]:
    """As `Distillation.loss`."""
    language = student.language
    assert language is not None, "what is no feature network is a language model"

    def work() -> Tensor:
        hidden = language.states(batch["tokens"])[batch["rows"], batch["columns"]]
        result = chunked_objective(
            hidden,
            draft_head=language.head,
            target_logits=lambda rows: target.model.head(batch["target_states"][rows].float()),
            labels=batch["labels"],
            weights=torch.ones_like(batch["labels"], dtype=torch.float32),
            objective=objective,
            chunk_tokens=int(draft.chunk_tokens),
        )
        return result.loss_sum

    return work


__all__ = ["Conversation", "Meter", "StepCost", "forward_flops", "step_cost"]
