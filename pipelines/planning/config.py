"""Settings of `dspark plan`: a description of the machines, of the corpus, and of a target whose files are not here."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class PlanningConfig:
    """What is assumed where nothing has been run yet.

    Attributes:
        responses: conversations in the corpus, those for validation included; budget.responses goes before it.
        prompt_tokens: of a mean conversation, template included.
        response_tokens: of a mean conversation; 0 for three quarters of corpus.max_new_tokens.
        epochs: times every training conversation is seen; trainer.steps goes before it.
        nodes: machines.
        processes: training processes, each with a device, on one machine; several are taken to train by
            DeepSpeed, unless trainer.engine is replicated.
        memory_gib: memory of one device, in GiB; 0 for that of this machine.
        host_gib: memory of one machine, in GiB; 0 for that of this machine.
        disk_gib: room for artifacts, in GiB; 0 for what is free here.
        tflops: most of one device in the arithmetic of training, in 10^12 operations a second; 0 for what the device
            profile measures on this machine, which needs the target's files.
        mfu: share of that which training reaches.
        bandwidth_gb_s: of the memory of one device, in 10^9 bytes a second.
        generation_batch: conversations that one device answers at a time; 0 for corpus.batch_size.
        generation_tokens_per_s: of all devices together; 0 derives it from bandwidth, batch and operations.
        zero_stage: what DeepSpeed spreads over the processes (ZeRO): 0 nothing, 1 optimizer state, 2 gradients too, 3
            weights too; -1 for the trainer's own.
        shape: configuration of a target whose files are not here, as transformers writes it, `model_type` included;
            empty reads that of target.path.
        json: file that all figures go to; empty for none.
    """

    responses: int = 1000
    prompt_tokens: float = 110.0
    response_tokens: float = 0.0
    epochs: float = 1.0
    nodes: int = 1
    processes: int = 1
    memory_gib: float = 0.0
    host_gib: float = 0.0
    disk_gib: float = 0.0
    tflops: float = 0.0
    mfu: float = 0.4
    bandwidth_gb_s: float = 0.0
    generation_batch: int = 0
    generation_tokens_per_s: float = 0.0
    zero_stage: int = -1
    shape: dict[str, Any] = field(default_factory=dict)
    json: str = ""

    def __post_init__(self) -> None:
        for name in ("responses", "nodes", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan.{name} is {getattr(self, name)}: use 1 or more")
        for name in ("response_tokens", "memory_gib", "host_gib", "disk_gib", "tflops", "bandwidth_gb_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"plan.{name} is {getattr(self, name)}: use 0 or more")
        if self.generation_batch < 0 or not self.generation_tokens_per_s >= 0:
            raise ValueError("plan.generation_batch and plan.generation_tokens_per_s need 0 or more")
        if not self.prompt_tokens >= 1 or not self.epochs > 0:
            raise ValueError("plan needs prompt_tokens of at least 1 and epochs above 0")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"plan.mfu is {self.mfu}: use a share above 0, at most 1")
        if self.zero_stage not in range(-1, 4):
            raise ValueError(f"plan.zero_stage is {self.zero_stage}: use 0, 1, 2, 3, or -1 for the trainer's")
        if self.tflops and not self.bandwidth_gb_s and not self.generation_tokens_per_s:
            raise ValueError("plan.tflops alone says nothing of generation: set plan.bandwidth_gb_s besides")
        if self.shape and not self.tflops:
            raise ValueError("plan.shape has no weights to measure with: set plan.tflops and plan.bandwidth_gb_s")
        if self.shape and not self.shape.get("model_type"):
            raise ValueError("plan.shape needs a model_type, as in a config.json")
