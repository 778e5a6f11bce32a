"""One student learning from one target's corpus: batches, loss and held-out acceptance, for any training loop.

Knows sequences, states and objectives; does not move parameters. Teacher logits are computed from the target's stored
states, a chunk of positions at a time, so the target's layers run during training only where the student writes itself
(`distill.on_policy`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from distill.chunked import TargetLogits, chunked_objective
from distill.conversation import Conversation, in_memory, responds_within
from distill.objectives import Objective, reads_labels
from distill.on_policy import OnPolicy, check_whole
from distill.order import Order
from distill.selection import select
from distill.token_filter import gaps, kept_count, largest
from inference.errors import InputError
from inference.model import CausalModel
from inference.precision import storage_dtype


@dataclass(frozen=True)
class LossSums:
    """Sums over the tokens of a batch that are learned from; divide by `tokens` for means.

    What is a tensor stays on the device, so that nobody waits for it who does not ask.

    Attributes:
        loss: with its graph.
        tokens: these tokens, or their weights.
        acceptance: sum of `1 - TV(p, q)`.
        supervised: positions learned from, whatever they weigh.
        fed: tokens that the draft reads, without padding.
    """

    loss: torch.Tensor
    tokens: torch.Tensor
    acceptance: torch.Tensor
    supervised: torch.Tensor | int
    fed: torch.Tensor


class Distillation:
    """Pairs a student with its teacher's head and a corpus.

    Args:
        student: the model in training.
        target: the teacher; its output head alone is used, unless the student writes itself.
        samples: the whole corpus, each with states.
        objective: per-token divergence.
        sequences_per_step: sequences in one micro-batch.
        max_tokens: longer sequences are cut.
        chunk_tokens: positions whose `V`-wide rows exist at one time.
        seed: fixes the order of sequences and what the student writes.
        bucket_batches: micro-batches sorted by length together (see `distill.order`); 0 for none.
        on_policy: what the student writes itself; None for nothing.
        keep_share: share of a micro-batch's supervised tokens that is learned from (see `distill.token_filter`); 1 for
            all.
        reference: a frozen draft that says which these are; needed for a share below 1.

    Attributes:
        train: training conversations with something to learn from.
        validation: the same for validation.
        counts: what was chosen, left out and cut (see `distill.selection`).

    Raises:
        InputError: no training sample with a supervised token; a share of tokens without a reference; a student that
            writes itself with an objective that reads labels, or for a target without layers.
    """

    def __init__(
        self,
        student: CausalModel,
        target: CausalModel,
        samples: Sequence[Conversation],
        *,
        objective: Objective,
        sequences_per_step: int,
        max_tokens: int,
        chunk_tokens: int,
        seed: int,
        bucket_batches: int = 0,
        on_policy: OnPolicy | None = None,
        keep_share: float = 1.0,
        reference: CausalModel | None = None,
    ) -> None:
        self.student, self.target, self.objective = student, target, objective
        self.sequences_per_step, self.max_tokens, self.chunk_tokens, self.seed = (
            sequences_per_step,
            max_tokens,
            chunk_tokens,
            seed,
        )
        self.on_policy, self.keep_share, self.reference = on_policy, keep_share, reference
        self._check()
        usable = partial(responds_within, max_tokens=max_tokens)
        selection = select(samples, usable=usable, max_tokens=max_tokens, draft="the student")
        self.train, self.validation, self.counts = selection.train, selection.validation, selection.counts
        lengths = np.fromiter((sample.num_tokens for sample in self.train), np.int64, len(self.train))
        self._order = Order(lengths, size=sequences_per_step, window=bucket_batches, seed=seed)

    def _check(self) -> None:
        if self.keep_share < 1.0 and self.reference is None:
            raise InputError(
                f"a share of {self.keep_share:g} of the tokens is to be kept, and no reference says which",
                where="draft.reference",
                mend="name a trained draft of this target, or set draft.keep_share to 1",
            )
        if self.on_policy is None:
            return
        if reads_labels(self.objective):
            raise InputError(
                "the objective learns from labels, which would be the student's own tokens",
                where="draft.on_policy_share",
                mend="choose an objective that reads no labels, such as objective=forward_kl, or set it to 0",
            )
        check_whole(self.target)

    # Batches

    @property
    def batches_ahead(self) -> bool:
        """Whether a batch reads nothing that is trained."""
        return self.on_policy is None

    @property
    def fixed_shapes(self) -> bool:
        """Whether every batch has one of few shapes; sequences are padded to their longest."""
        return False

    def batch(self, step: int, micro: int, *, accumulation: int = 1) -> dict[str, torch.Tensor]:
        """The micro-batch at a step: a pure function, so that the data position is the step alone.

        Of the student's weights as well, where it writes itself: such a batch is made after the step before, not ahead.
        """
        index = step * accumulation + micro
        samples = [self.train[place] for place in self._order.micro_batch(index)]
        if self.on_policy is not None and self.on_policy.chosen(index, seed=self.seed):
            return self._written(samples, self.on_policy, index)
        return self.collate(samples)

    def collate(self, samples: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        """Pad on the right.

        Returns:
            tokens, attention int64 `[B, T]`; rows, columns int64 `[N]`, the positions whose state predicts a supervised
            token; labels int64 `[N]`; target_states `[N, D]`.
        """
        masks = [sample.mask[: self.max_tokens] for sample in samples]
        batch = _padded([sample.tokens[: self.max_tokens] for sample in samples], masks)
        states = [sample.states_of(mask) for sample, mask in zip(samples, masks, strict=True)]
        return {**batch, "target_states": torch.cat(states)}

    def _written(self, samples: list[Conversation], on_policy: OnPolicy, index: int) -> dict[str, torch.Tensor]:
        """The batch that the student makes of the samples' prompts, its answers scored by the target in one pass."""
        rows, masks = on_policy.written(self.student, samples, index, seed=self.seed, max_tokens=self.max_tokens)
        batch = _padded(rows, masks)
        device = self.target.device
        with torch.no_grad():
            states = self.target.states(batch["tokens"].to(device), mask=batch["attention"].to(device))
        return {**batch, "target_states": states[batch["rows"], batch["columns"]]}

    def weight(self, batch: dict[str, torch.Tensor]) -> float:
        """What `loss(batch).tokens` will be; no model runs."""
        return float(kept_count(batch["labels"].shape[0], self.keep_share))

    # Loss

    def loss(self, batch: dict[str, torch.Tensor]) -> LossSums:
        """Objective and acceptance over a batch's supervised tokens, or over the share of them that is kept."""
        return self._sums(batch, keep_share=self.keep_share)

    def _sums(self, batch: dict[str, torch.Tensor], *, keep_share: float) -> LossSums:
        device = self.student.device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        hidden = _states_at(self.student, batch)
        labels, states = batch["labels"], batch["target_states"]
        if keep_share < 1.0:
            kept = self._kept(batch, hidden.detach(), keep_share)
            hidden, labels, states = hidden[kept], labels[kept], states[kept]
        result = chunked_objective(
            hidden,
            draft_head=self.student.head,
            target_logits=self._teacher(states),
            labels=labels,
            weights=torch.ones_like(labels, dtype=torch.float32),
            objective=self.objective,
            chunk_tokens=self.chunk_tokens,
        )
        return LossSums(
            result.loss_sum, result.weight_sum, result.acceptance_sum, labels.shape[0], batch["attention"].sum()
        )

    def _teacher(self, states: torch.Tensor) -> TargetLogits:
        """Teacher logits `[n, V]` for a slice of its states `[N, D]`."""

        def logits(positions: slice) -> torch.Tensor:
            rows: torch.Tensor = self.target.head(states[positions].to(_head_dtype(self.target)))
            return rows

        return logits

    @torch.no_grad()
    def _kept(self, batch: dict[str, torch.Tensor], hidden: torch.Tensor, share: float) -> torch.Tensor:
        """Places int64 `[n]` of the supervised tokens that are learned from, out of the student's states `[N, D]`."""
        assert self.reference is not None, "a share of tokens comes with a reference"
        found = gaps(
            hidden,
            _states_at(self.reference, batch),
            head=self.student.head,
            reference_head=self.reference.head,
            target_logits=self._teacher(batch["target_states"]),
            chunk_tokens=self.chunk_tokens,
        )
        return largest(found, share)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Expected acceptance `1 - TV` and loss per validation token: overall and acceptance by domain.

        Teacher-forced on the target's own responses, so position 1 of a block at temperature 1.
        """
        sums: dict[str, list[float]] = {}
        for start in range(0, len(self.validation), self.sequences_per_step):
            for sample in self.validation[start : start + self.sequences_per_step]:
                result = self._sums(self.collate([sample]), keep_share=1.0)
                for name in ("all", sample.domain):
                    total = sums.setdefault(name, [0.0, 0.0, 0.0])
                    total[0] += float(result.acceptance)
                    total[1] += float(result.loss)
                    total[2] += float(result.tokens)
        if not sums:
            return {}
        metrics = {f"acceptance_{name}": a / n for name, (a, _, n) in sums.items() if name != "all"}
        acceptance, loss, tokens = sums["all"]
        return {"acceptance": acceptance / tokens, "loss": loss / tokens, **metrics}


def _padded(rows: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Token rows int64 `[T]` and their masks bool `[T]`, padded on the right; see `Distillation.collate`."""
    tokens = torch.zeros(len(rows), max(row.shape[0] for row in rows), dtype=torch.long)
    attention = torch.zeros_like(tokens)
    for row, line in enumerate(rows):
        tokens[row, : line.shape[0]] = line
        attention[row, : line.shape[0]] = 1
    places = [mask.nonzero()[:, 0] for mask in masks]
    return {
        "tokens": tokens,
        "attention": attention,
        "rows": torch.cat([torch.full_like(place, row) for row, place in enumerate(places)]),
        "columns": torch.cat(places) - 1,
        "labels": torch.cat([line[place] for line, place in zip(rows, places, strict=True)]),
    }


def _states_at(model: CausalModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A model's states `[N, D]` that predict a batch's supervised tokens."""
    states = model.states(batch["tokens"], mask=batch["attention"])
    return states[batch["rows"], batch["columns"]]


def capture_states(target: CausalModel, samples: Sequence[Conversation]) -> list[Conversation]:
    """Run the target over whole samples to get the states a generator did not keep, prompts included, one sequence at a
    time."""
    captured: list[Conversation] = []
    for sample in samples:
        if sample.has_states:
            captured.append(sample)
            continue
        with torch.inference_mode():
            states = target.states(sample.tokens[None].to(target.device))[0, :-1].to(torch.bfloat16).cpu()
        captured.append(in_memory(sample, states=states))
    return captured


def _head_dtype(target: CausalModel) -> torch.dtype:
    return storage_dtype(target.precision)
