"""All figures of a plan, as plain data, and whether what they say fits the machines."""

from dataclasses import dataclass, field

from pipelines.planning.machine import GIB


@dataclass(frozen=True)
class DraftFigures:
    """One trained draft.

    Attributes:
        kind: of the draft.
        parameters: of its own.
        trained: of these the ones that move.
        steps: optimizer steps.
        conversations: of one step, over all processes.
        supervised: positions learned from in one step.
        step_flops: operations of one step.
        step_seconds: of one step.
        memory: bytes of one process by part, for each ZeRO stage that the engine knows.
        loading: bytes of one process before its first step.
        offloaded: bytes of one process that lie in its node's memory instead.
        checkpoint: bytes of one checkpoint.
        checkpoints: bytes of all that exist at one time.
        captured: bytes of features and states that exist while it is trained, where the corpus does not keep them.
        disk: bytes of the finished draft.
    """

    kind: str
    parameters: int
    trained: int
    steps: int
    conversations: int
    supervised: int
    step_flops: float
    step_seconds: float
    memory: dict[int, dict[str, float]]
    loading: float
    offloaded: float
    checkpoint: float
    checkpoints: float
    captured: float
    disk: float

    @property
    def hours(self) -> float:
        """Of all steps."""
        return self.steps * self.step_seconds / 3600


@dataclass(frozen=True)
class CorpusFigures:
    """The corpus.

    Attributes:
        conversations: of it, those for validation included.
        prompt_tokens: of a mean conversation.
        response_tokens: likewise.
        tokens: of all conversations.
        to_write: of these the target's own.
        tokens_per_s: that are written.
        how: where that comes from.
        disk: bytes by part.
        reference_cache: bytes of DeepSpec's cache for the same tokens.
    """

    conversations: int
    prompt_tokens: int
    response_tokens: int
    tokens: int
    to_write: int
    tokens_per_s: float
    how: str
    disk: dict[str, float]
    reference_cache: float

    @property
    def hours(self) -> float:
        """Of writing."""
        return self.to_write / self.tokens_per_s / 3600


@dataclass(frozen=True)
class Planning:
    """A whole plan.

    Attributes:
        machine: for people.
        arithmetic: of training.
        processes: that train together.
        engine: that trains.
        zero_stage: that is configured.
        micros: micro-batches of a step, of all processes together.
        target_parameters: of the target.
        memory: bytes of one process's device.
        host: bytes of one node.
        disk: bytes of room.
        host_needed: bytes of one node's memory that offloading and the corpus's index take.
        corpus: the corpus.
        drafts: the trained drafts by name.
        misfits: what does not fit, and how to mend it, one line each; empty when all does.
    """

    machine: str
    arithmetic: str
    processes: int
    engine: str
    zero_stage: int
    micros: int
    target_parameters: int
    memory: float
    host: float
    disk: float
    host_needed: float
    corpus: CorpusFigures
    drafts: dict[str, DraftFigures]
    misfits: list[str] = field(default_factory=list)

    @property
    def disk_parts(self) -> dict[str, float]:
        """Bytes on disk by part, when most is there: one draft is trained at a time."""
        drafts = self.drafts.values()
        return {
            **self.corpus.disk,
            "captured": max((draft.captured for draft in drafts), default=0.0),
            "checkpoints": max((draft.checkpoints for draft in drafts), default=0.0),
            "drafts": sum(draft.disk for draft in drafts),
        }

    @property
    def hours(self) -> float:
        """Of writing the corpus and training every draft."""
        return self.corpus.hours + sum(draft.hours for draft in self.drafts.values())


def misfits(plan: Planning) -> list[str]:
    """What does not fit the machines, one line each: how much, the largest part of it, and what would help."""
    found = [_memory_misfit(plan, name, draft) for name, draft in plan.drafts.items()]
    disk = sum(plan.disk_parts.values())
    if disk > plan.disk:
        largest = max(plan.disk_parts, key=lambda part: plan.disk_parts[part])
        found.append(
            f"disk: {_gib(disk)} of {_gib(plan.disk)}, most of it {largest} ({_gib(plan.disk_parts[largest])}): "
            f"{_DISK_MENDS.get(largest, _DISK_MENDS['text'])}"
        )
    if plan.host_needed > plan.host:
        needed = f"{_gib(plan.host_needed)} of {_gib(plan.host)}"
        found.append(f"memory of a node: {needed} for what is offloaded: use trainer.offload=none, or more nodes")
    if plan.micros % plan.processes:
        found.append(
            f"{plan.micros} micro-batches a step cannot be dealt to {plan.processes} processes: "
            f"use a multiple of {plan.processes} for trainer.accumulation"
        )
    return [line for line in found if line]


_DISK_MENDS = {
    "features": "corpus.compress_features=true halves them, fewer corpus.taps or plan.responses need less",
    "captured": "keep features and states with the corpus instead: corpus=local, and a larger corpus.features_gib",
    "states": "corpus.keep_prompt_states=false leaves out those of prompts",
    "checkpoints": "trainer.keep_checkpoints=1 keeps fewer",
    "drafts": "name fewer drafts",
    "text": "use fewer plan.responses, or more disk",
    "tokens": "use fewer plan.responses, or more disk",
}


def _memory_misfit(plan: Planning, name: str, draft: DraftFigures) -> str:
    """What of one draft's training does not fit a device; empty when all does."""
    if draft.loading > plan.memory:
        needed = f"{_gib(draft.loading)} of {_gib(plan.memory)}"
        return f"{name}: {needed} of device memory to load the target: use devices with more, or a smaller one"
    parts = draft.memory[plan.zero_stage]
    need = sum(parts.values())
    if need <= plan.memory:
        return ""
    largest = max(parts, key=lambda part: parts[part])
    return (
        f"{name}: {_gib(need)} of {_gib(plan.memory)} of device memory, most of it {largest} "
        f"({_gib(parts[largest])}): {_memory_mend(plan, name, draft, largest)}"
    )


def _memory_mend(plan: Planning, name: str, draft: DraftFigures, largest: str) -> str:
    for stage in sorted(draft.memory):
        total = sum(draft.memory[stage].values())
        if stage > plan.zero_stage and total <= plan.memory:
            return f"zero_stage={stage} needs {_gib(total)}"
    if largest == "target":
        return "use devices with more memory, or a smaller target"
    if largest in ("activations", "batch"):
        return (
            f"lower draft.{name}.sequences_per_step (with trainer.accumulation raised), anchors, max_tokens or "
            "chunk_tokens"
        )
    if plan.engine == "replicated":
        return "use trainer=deepspeed, which spreads weights, gradients and state, or a smaller draft"
    return "use more processes with a higher zero_stage, trainer.offload, or a smaller draft"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"


__all__ = ["CorpusFigures", "DraftFigures", "Planning", "misfits"]
