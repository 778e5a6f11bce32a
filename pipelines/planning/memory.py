"""Bytes of one training process, part by part, for every ZeRO stage (Rajbhandari et al. 2019, arXiv 1910.02054).

Weights, gradients and state follow from counts; what is held during a step was measured by `passes`. It is a sum of
what must be there: allocators keep more than is asked for.
"""

from dataclasses import dataclass

from pipelines.planning.passes import StepCost

_FP32, _BF16 = 4, 2
# Bytes of state a weight: two fp32 moments, or two of 8 bits with a scale for each 256 of them.
_STATE_BYTES = {"adamw8bit": 2 + 2 * 4 / 256}
_FULL_STATE_BYTES = 8.0
# Numbers that DeepSpeed sends at a time, and the interpreter with its libraries: torch and transformers, on two CPUs.
_BUCKET = 500_000_000
_PROCESS_BYTES = 0.6 * 2**30


@dataclass(frozen=True)
class Training:
    """What decides the bytes of training.

    Attributes:
        loaded: parameters of the target that are read before the first step.
        kept: of these the ones that training uses: embedding and head, unless the target scores what a student writes.
        trained: parameters that move.
        frozen: the draft's own that do not.
        read: parameters of what the draft is made from: a student that is cut out of the target is a second copy first.
        cost: of one micro-batch.
        optimizer: kind of the optimizer.
        engine: that runs it (see `train.config`).
        halved: whether what is computed with are bf16 copies of fp32 weights, as DeepSpeed has them in bf16.
        offload: "none", "optimizer" or "all".
        processes: that train together.
    """

    loaded: int
    kept: int
    trained: int
    frozen: int
    read: int
    cost: StepCost
    optimizer: str
    engine: str
    halved: bool
    offload: str
    processes: int


def stages(engine: str) -> tuple[int, ...]:
    """ZeRO stages that training may be planned at: none but 0 where each process holds the whole of what is trained."""
    return (0,) if engine == "replicated" else (0, 1, 2, 3)


def state_bytes(optimizer: str) -> float:
    """Bytes of optimizer state a weight."""
    return _STATE_BYTES.get(optimizer, _FULL_STATE_BYTES)


def memory_parts(training: Training, stage: int) -> dict[str, float]:
    """Bytes of one process at a ZeRO stage, by part.

    Args:
        training: what is trained, and how.
        stage: 0 to 3.
    """
    number = _BF16 if training.halved else _FP32
    state = state_bytes(training.optimizer) + (_FP32 if training.halved else 0)

    def part(bytes_each: float, count: int, *, from_stage: int) -> float:
        return bytes_each * count / (training.processes if stage >= from_stage else 1)

    moved = training.trained
    # Gradients are summed as one flat copy of them; DeepSpeed sends it piece by piece.
    most = {"plain": 0, "deepspeed": _BUCKET, "replicated": moved}[training.engine]
    parts = {
        "target": float(_FP32 * training.kept),
        "weights": part(number, moved, from_stage=3) + part(number, training.frozen, from_stage=3),
        "gradients": part(number, moved, from_stage=2),
        "optimizer": part(state, moved, from_stage=1),
        "activations": float(training.cost.held),
        "batch": float(training.cost.batch),
        "exchange": float(number * min(moved, most)) if training.processes > 1 else 0.0,
        "process": _PROCESS_BYTES,
    }
    if training.offload != "none" and stage >= 1:
        parts["optimizer"] = 0.0
    if training.offload == "all" and stage == 3:
        parts["weights"] = 0.0
    return parts


def loading_bytes(training: Training) -> float:
    """Bytes of one process just before its first step: what is read of the target, in fp32, and the draft.

    The target's layers are let go then, because their outputs were kept with the corpus.
    """
    return _FP32 * (training.loaded + training.read) + _PROCESS_BYTES


def offloaded_bytes(training: Training, stage: int) -> float:
    """Bytes of one process that offloading moves to its node's own memory."""
    kept = Training(**{**training.__dict__, "offload": "none"})
    return sum(memory_parts(kept, stage).values()) - sum(memory_parts(training, stage).values())
