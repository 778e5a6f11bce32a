"""One student learning from one target's corpus: batches, loss and held-out acceptance, for any training loop.

Knows sequences, states and objectives; does not move parameters. Teacher logits are computed from the target's stored
states, a chunk of positions at a time, so the target's layers never run during training.
"""

import functools
from dataclasses import dataclass

import torch

from distill.chunked import chunked_objective
from distill.corpus import Sample
from distill.objectives import Objective
from inference.errors import InputError
from inference.model import CausalModel
from inference.precision import storage_dtype


@functools.lru_cache(maxsize=2)  # a batch may lie across the end of an epoch
def epoch_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """Indices of `count` samples in the order of one epoch: a pure function of its arguments."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


@dataclass(frozen=True)
class LossSums:
    """Sums over the supervised tokens of a batch; divide by `tokens` for means.

    Attributes:
        loss: with its graph.
        tokens: supervised tokens.
        acceptance: sum of `1 - TV(p, q)`.
    """

    loss: torch.Tensor
    tokens: float
    acceptance: float


class Distillation:
    """Pairs a student with its teacher's head and a corpus.

    Args:
        student: the model in training.
        target: the teacher; only its output head is used.
        samples: the whole corpus, each with states.
        objective: per-token divergence.
        sequences_per_step: sequences in one micro-batch.
        max_tokens: longer sequences are cut.
        chunk_tokens: positions whose `V`-wide rows exist at one time.
        seed: fixes the order of sequences.

    Raises:
        InputError: no training sample with a supervised token.
    """

    def __init__(
        self,
        student: CausalModel,
        target: CausalModel,
        samples: list[Sample],
        *,
        objective: Objective,
        sequences_per_step: int,
        max_tokens: int,
        chunk_tokens: int,
        seed: int,
    ) -> None:
        self.student, self.target, self.objective = student, target, objective
        self.sequences_per_step, self.max_tokens, self.chunk_tokens, self.seed = (
            sequences_per_step,
            max_tokens,
            chunk_tokens,
            seed,
        )
        self.train = [s for s in samples if s.split == "train" and bool(s.mask[:max_tokens].any())]
        self.validation = [s for s in samples if s.split == "validation" and bool(s.mask[:max_tokens].any())]
        if not self.train:
            raise InputError("no training sample has a response", where="corpus", mend="build a larger corpus")

    def batch(self, step: int, micro: int, *, accumulation: int = 1) -> dict[str, torch.Tensor]:
        """The micro-batch at a step: a pure function, so that the data position is the step alone."""
        start = (step * accumulation + micro) * self.sequences_per_step
        return self.collate([self.train[self._sample_at(start + i)] for i in range(self.sequences_per_step)])

    def _sample_at(self, position: int) -> int:
        """Index of the sample at a position of the endless, per epoch shuffled stream."""
        epoch, offset = divmod(position, len(self.train))
        return epoch_order(len(self.train), seed=self.seed, epoch=epoch)[offset]

    def collate(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """Pad on the right.

        Returns:
            tokens, attention int64 `[B, T]`; rows, columns int64 `[N]`, the positions whose state predicts a supervised
            token; labels int64 `[N]`; target_states `[N, D]`.
        """
        longest = min(self.max_tokens, max(s.tokens.shape[0] for s in samples))
        tokens = torch.zeros(len(samples), longest, dtype=torch.long)
        attention = torch.zeros_like(tokens)
        rows, columns, labels, states = [], [], [], []
        for row, sample in enumerate(samples):
            length = min(longest, sample.tokens.shape[0])
            tokens[row, :length] = sample.tokens[:length]
            attention[row, :length] = 1
            index = sample.mask[:length].nonzero()[:, 0]
            rows.append(torch.full_like(index, row))
            columns.append(index - 1)
            labels.append(sample.tokens[index])
            states.append(sample.states_of(sample.mask[:length]))
        return {
            "tokens": tokens,
            "attention": attention,
            "rows": torch.cat(rows),
            "columns": torch.cat(columns),
            "labels": torch.cat(labels),
            "target_states": torch.cat(states),
        }

    def loss(self, batch: dict[str, torch.Tensor]) -> LossSums:
        """Objective and acceptance over a batch's supervised tokens."""
        device = self.student.device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        hidden = self.student.states(batch["tokens"], mask=batch["attention"])[batch["rows"], batch["columns"]]
        states = batch["target_states"]

        def target_logits(positions: slice) -> torch.Tensor:
            logits: torch.Tensor = self.target.head(states[positions].to(_head_dtype(self.target)))
            return logits

        result = chunked_objective(
            hidden,
            draft_head=self.student.head,
            target_logits=target_logits,
            labels=batch["labels"],
            weights=torch.ones_like(batch["labels"], dtype=torch.float32),
            objective=self.objective,
            chunk_tokens=self.chunk_tokens,
        )
        return LossSums(result.loss_sum, float(result.weight_sum), float(result.acceptance_sum))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Expected acceptance `1 - TV` and loss per validation token: overall and acceptance by domain.

        Teacher-forced on the target's own responses, so position 1 of a block at temperature 1.
        """
        sums: dict[str, list[float]] = {}
        for start in range(0, len(self.validation), self.sequences_per_step):
            for sample in self.validation[start : start + self.sequences_per_step]:
                result = self.loss(self.collate([sample]))
                for name in ("all", sample.domain):
                    total = sums.setdefault(name, [0.0, 0.0, 0.0])
                    total[0] += result.acceptance
                    total[1] += float(result.loss)
                    total[2] += result.tokens
        if not sums:
            return {}
        metrics = {f"acceptance_{name}": a / n for name, (a, _, n) in sums.items() if name != "all"}
        acceptance, loss, tokens = sums["all"]
        return {"acceptance": acceptance / tokens, "loss": loss / tokens, **metrics}


def capture_states(target: CausalModel, samples: list[Sample]) -> list[Sample]:
    """Run the target over whole samples to get the states a generator did not keep, prompts included, one sequence at a
    time."""
    captured = []
    with torch.inference_mode():
        for sample in samples:
            if sample.states is not None:
                captured.append(sample)
                continue
            states = target.states(sample.tokens[None].to(target.device))[0]
            kept = states[:-1].to(torch.bfloat16).cpu()
            captured.append(Sample(**{**sample.__dict__, "states": kept}))
    return captured


def _head_dtype(target: CausalModel) -> torch.dtype:
    return storage_dtype(target.precision)
