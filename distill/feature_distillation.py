"""A feature-reading draft learning from one target's corpus: packed batches, anchors, losses, held-out acceptance.

Same contract towards a training loop as `distill.distillation`; what differs is what a batch is. Conversations are
packed into rows, anchors are drawn among positions whose next token is the target's own, a share of them among prompts,
and every slot is supervised by the target's stored state at its position: neither the target's layers nor a `V`-wide
tensor is kept for it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from distill.chunked import chunked_objective
from distill.conversation import Conversation, responds_within
from distill.distillation import LossSums
from distill.objectives import Objective, reads_labels
from distill.order import Order
from distill.resident import ResidentCorpus, resident_bytes
from distill.selection import select
from inference.feature_networks import FeatureNetwork, PackedBatch
from inference.model import CausalModel

FeaturesOf = Callable[[Conversation], Tensor]
"""Features `[T, m * D]` of a sample; the row of its last token is never looked at."""

_VALIDATION_ANCHORS = 24
# A GPU waits for launches, so it takes all positions of a usual step at once; a CPU's cache likes few.
_CHUNK_TOKENS = {"cuda": 8192, "cpu": 256}


@dataclass(frozen=True)
class _Piece:
    """One conversation as it enters a row, cut to the longest length, with its anchors."""

    tokens: Tensor  # shape: [T]
    features: Tensor  # shape: [T, m * D]
    states: Tensor  # shape: [stated, D]
    stated: Tensor  # shape: [T]
    mask: Tensor  # shape: [T]
    anchors: Tensor  # shape: [a]


class FeatureDistillation:
    """Pairs a feature network with its teacher's head and a corpus.

    Args:
        network: in training, bound to the target.
        target: the teacher; only its output head is used.
        samples: the whole corpus, each with states. Where they have none for prompts, or the objective reads labels, a
            share of anchors in prompts is not drawn.
        features_of: gives a sample's features.
        objective: per-slot divergence.
        seed: fixes the order of conversations and their anchors.

    Attributes:
        train: training conversations with something to learn from.
        validation: the same for validation.
        counts: what was chosen, left out and cut (see `distill.selection`).

    Raises:
        InputError: no training sample has a position that can be an anchor.
    """

    batches_ahead = True
    """Whether a batch reads nothing that is trained."""

    def __init__(
        self,
        network: FeatureNetwork,
        target: CausalModel,
        samples: Sequence[Conversation],
        *,
        features_of: FeaturesOf,
        objective: Objective,
        seed: int,
    ) -> None:
        self.network, self.target, self.features_of, self.objective, self.seed = (
            network,
            target,
            features_of,
            objective,
            seed,
        )
        self.config = network.config
        self.prompt_share = 0.0 if reads_labels(objective) else self.config.prompt_share
        self._chunk_tokens = self.config.chunk_tokens or _CHUNK_TOKENS.get(target.device.type, 1024)
        selection = select(samples, usable=self._usable, max_tokens=self.config.max_tokens, draft=self.config.kind)
        self.train, self.validation, self.counts = selection.train, selection.validation, selection.counts
        self._resident: ResidentCorpus | None = None
        self._places: list[tuple[Tensor, Tensor]] = []  # of resident conversations, where anchors may be: see `_drawn`
        # Conversations are packed, so their lengths decide nothing.
        lengths = np.zeros(len(self.train), dtype=np.int64)
        self._order = Order(lengths, size=self.config.sequences_per_step, window=0, seed=seed)
        vocabulary = network.vocabulary
        # Draft id of each target token; -1 where the draft cannot propose it.
        self._draft_ids = torch.arange(target.vocab_size, device=target.device)
        if vocabulary is not None:
            self._draft_ids = torch.full_like(self._draft_ids, -1)
            self._draft_ids[vocabulary] = torch.arange(vocabulary.shape[0], device=target.device)

    # Batches

    def _usable(self, sample: Conversation) -> bool:
        """Whether a response holds a possible anchor; as a rule the place of its first token tells without reading."""
        if sample.first_response >= 2:
            return responds_within(sample, self.config.max_tokens)
        return self._candidates(sample).numel() > 0

    def _candidates(self, sample: Conversation, *, prompts: bool = False) -> Tensor:
        """Positions that can be anchors, in responses or in prompts: the state that predicted the next token is known,
        and something lies before them."""
        length = min(sample.num_tokens, self.config.max_tokens)
        wanted = sample.stated & ~sample.mask if prompts else sample.mask
        positions = wanted[1:length].nonzero()[:, 0]
        return positions[positions >= 1]

    def keep_resident(self) -> None:
        """Put what is trained on onto the target's device as a whole; batches are places in it from then on, and losses
        those of the same conversations and anchors."""
        self._resident = ResidentCorpus(
            self.train, self.features_of, device=self.target.device, max_tokens=self.config.max_tokens
        )
        self._places = [
            (self._candidates(sample, prompts=True).int(), self._candidates(sample).int()) for sample in self.train
        ]

    def resident_bytes(self) -> int:
        """Bytes of the device that `keep_resident` takes."""
        hidden, taps = self.network.shape.hidden, len(self.network.taps)
        return resident_bytes(self.train, max_tokens=self.config.max_tokens, hidden=hidden, num_taps=taps)

    @property
    def fixed_shapes(self) -> bool:
        """Whether every batch has one of few shapes and nothing of a loss waits for the device."""
        return self._resident is not None

    def batch(self, step: int, micro: int, *, accumulation: int = 1) -> dict[str, Tensor]:
        """The micro-batch at a step: a pure function, so that the data position is the step alone."""
        index, size = step * accumulation + micro, self.config.sequences_per_step
        places = self._order.micro_batch(index)
        draws = [torch.Generator().manual_seed(self.seed * 1_000_003 + index * size + i) for i in range(len(places))]
        count, share = self.config.anchors, self.prompt_share
        if self._resident is None:
            samples = [self.train[place] for place in places]
            pairs = zip(samples, draws, strict=True)
            return self.collate([self._piece(s, count=count, share=share, generator=draw) for s, draw in pairs])
        anchors = [
            _drawn(*self._places[place], count=count, share=share, generator=draw).long()
            for place, draw in zip(places, draws, strict=True)
        ]
        return self._resident.batch(places, anchors, count=count)

    def _piece(self, sample: Conversation, *, count: int, generator: torch.Generator, share: float = 0.0) -> _Piece:
        asked, written = self._candidates(sample, prompts=True), self._candidates(sample)
        length = min(sample.num_tokens, self.config.max_tokens)
        stated = sample.stated[:length]
        return _Piece(
            tokens=sample.tokens[:length],
            features=self.features_of(sample)[:length],
            states=sample.states_of(stated),
            stated=stated,
            mask=sample.mask[:length],
            anchors=_drawn(asked, written, count=count, share=share, generator=generator),
        )

    def collate(self, pieces: list[_Piece], *, rows: list[list[int]] | None = None) -> dict[str, Tensor]:
        """Pack conversations into rows.

        Args:
            pieces: the conversations.
            rows: which of them go into which row; None packs them.

        Returns:
            the tensors of `PackedBatch`, and for the N valid slots, row by row, anchor by anchor: labels int64 `[N]`,
            places int64 `[N]` (0-based slot) and target_states `[N, D]`.
        """
        rows = rows or _pack([piece.tokens.shape[0] for piece in pieces], capacity=self.config.row_tokens)
        width = max(sum(pieces[i].tokens.shape[0] for i in row) for row in rows)
        count = max(sum(pieces[i].anchors.shape[0] for i in row) for row in rows)
        block = self.network.block
        first = pieces[0]
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        segments, positions = torch.full_like(tokens, -1), torch.zeros_like(tokens)
        features = first.features.new_zeros(len(rows), width, first.features.shape[-1])
        anchors = torch.zeros(len(rows), count, dtype=torch.long)
        slots = torch.zeros(len(rows), count, block, dtype=torch.bool)
        labels, places, states = [], [], []
        for row, members in enumerate(rows):
            start = at = 0
            for segment, index in enumerate(members):
                piece = pieces[index]
                length, number = piece.tokens.shape[0], piece.anchors.shape[0]
                tokens[row, start : start + length] = piece.tokens
                segments[row, start : start + length] = segment
                positions[row, start : start + length] = torch.arange(length)
                features[row, start : start + length] = piece.features
                anchors[row, at : at + number] = start + piece.anchors
                ahead = piece.anchors[:, None] + 1 + torch.arange(block)
                inside = ahead < length
                ahead = ahead.clamp(max=length - 1)
                # A block that begins in a response ends with it; one that begins in a prompt may run into the response.
                known = torch.where(piece.mask[piece.anchors + 1][:, None], piece.mask[ahead], piece.stated[ahead])
                valid = (known & inside).long().cumprod(1).bool()
                slots[row, at : at + number] = valid
                predicted = ahead[valid]
                labels.append(piece.tokens[predicted])
                places.append(torch.arange(block).expand(number, -1)[valid])
                states.append(piece.states[piece.stated.long().cumsum(0)[predicted] - 1])
                start, at = start + length, at + number
        return {
            "tokens": tokens,
            "segments": segments,
            "positions": positions,
            "features": features,
            "anchors": anchors,
            "slots": slots,
            "labels": torch.cat(labels),
            "places": torch.cat(places),
            "target_states": torch.cat(states),
        }

    # Loss

    def loss(self, batch: dict[str, Tensor]) -> LossSums:
        """Objective over the batch's slots, weighted by their place, plus the confidence head's own loss."""
        batch = self._on_device(batch)
        states = self._slot_states(batch)
        drafts = self._draft_ids[batch["labels"]]
        weights = self._weights(batch, drafts)
        result = chunked_objective(
            states,
            draft_head=self.network.head,
            target_logits=self._teacher(batch["target_states"]),
            labels=drafts.clamp(min=0),
            weights=weights,
            objective=self.objective,
            chunk_tokens=self._chunk_tokens,
        )
        loss = result.loss_sum
        confidence = self.network.confidence_logits(states)
        weight = self.config.confidence_weight
        if confidence is not None and weight > 0:
            # The detached chance of acceptance is what the head has to foretell (method section 2).
            wanted = result.acceptances.to(confidence.dtype).clamp(0.0, 1.0)
            terms = functional.binary_cross_entropy_with_logits(confidence, wanted, reduction="none")
            loss = loss + weight * (weights * terms).sum()
        supervised, fed = batch["slots"].sum(), (batch["segments"] >= 0).sum()
        return LossSums(loss, result.weight_sum, result.acceptance_sum, supervised, fed)

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch where the target is; places are followed."""
        device = self.target.device
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        if self._resident is None or "starts" not in batch:
            return batch
        return self._resident.gathered(batch, block=self.network.block)

    def _slot_states(self, batch: dict[str, Tensor]) -> Tensor:
        """States of the slots that labels are of, `[N, S]`."""
        dtype = next(self.network.parameters()).dtype
        packed = PackedBatch(
            tokens=batch["tokens"],
            segments=batch["segments"],
            positions=batch["positions"],
            features=batch["features"].to(dtype),
            anchors=batch["anchors"],
            slots=batch["slots"],
        )
        states = self.network.slot_states(packed)
        return states.flatten(0, 2) if "valid" in batch else states[batch["slots"]]

    def weight(self, batch: dict[str, Tensor]) -> float:
        """What `loss(batch).tokens` will be; no model runs."""
        if "starts" not in batch:
            batch = {name: batch[name] for name in ("places", "labels")}
        batch = self._on_device(batch)
        return float(self._weights(batch, self._draft_ids[batch["labels"]]).sum())

    def _weights(self, batch: dict[str, Tensor], drafts: Tensor) -> Tensor:
        """Weights of slots, fp32 `[N]`, of their places and draft ids."""
        places, decay = batch["places"], self.config.position_decay
        weights = torch.exp(-places / decay) if decay > 0 else torch.ones_like(places, dtype=torch.float32)
        # A slot whose token the draft cannot propose has nothing to learn; the teacher is renormalised over the rest.
        weights = weights * (drafts >= 0)
        return weights * batch["valid"] if "valid" in batch else weights

    def _teacher(self, states: Tensor) -> Callable[[slice], Tensor]:
        """Teacher logits over the draft's vocabulary for a slice of slots."""

        def logits(rows: slice) -> Tensor:
            return self.network.base_logits(states[rows].to(next(self.network.parameters()).dtype))

        return logits

    # Held-out figures

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Teacher-forced figures on validation conversations, each domain weighing by its anchors.

        Returns:
            acceptance: mean over first slots of sum_v min(p, q), over the target's whole vocabulary; acceptance_K: the
            same for slot K (from 1), over slots whose labels are all supervised; tau: 1 + the mean over anchors of the
            summed products of acceptances along the target's own tokens, temperature 1; tau_greedy: the same with
            agreement of the two argmaxes; and tau_<domain>.
        """
        block, size = self.network.block, self.config.sequences_per_step
        by_slot = torch.zeros(block, dtype=torch.float64)
        counts = torch.zeros(block, dtype=torch.float64)
        taus: dict[str, list[tuple[float, float]]] = {}
        for start in range(0, len(self.validation), size):
            samples = self.validation[start : start + size]
            draws = [torch.Generator().manual_seed(self.seed * 7_919 + start + i) for i in range(len(samples))]
            pairs = zip(samples, draws, strict=True)
            pieces = [self._piece(sample, count=_VALIDATION_ANCHORS, generator=draw) for sample, draw in pairs]
            batch = self.collate(pieces, rows=[[row] for row in range(len(pieces))])
            slots = batch["slots"]
            grids = [torch.zeros(slots.shape, dtype=torch.float64) for _ in range(2)]
            for grid, found in zip(grids, self._acceptance(batch), strict=True):
                grid[slots] = found.double().cpu()
            by_slot += grids[0].sum((0, 1))
            counts += slots.sum((0, 1))
            sums = [1.0 + grid.cumprod(2).sum(2) for grid in grids]
            for row, (sample, piece) in enumerate(zip(samples, pieces, strict=True)):
                mine = [found[row, : piece.anchors.shape[0]].tolist() for found in sums]
                taus.setdefault(sample.domain, []).extend(zip(*mine, strict=True))
        if not taus:
            return {}
        every = [pair for pairs in taus.values() for pair in pairs]
        mean = (by_slot / counts.clamp(min=1.0)).tolist()
        return {
            "acceptance": mean[0],
            "tau": math.fsum(pair[0] for pair in every) / len(every),
            "tau_greedy": math.fsum(pair[1] for pair in every) / len(every),
            **{f"tau_{name}": math.fsum(p[0] for p in pairs) / len(pairs) for name, pairs in taus.items()},
            **{f"acceptance_{slot + 1}": mean[slot] for slot in range(block) if counts[slot]},
        }

    def _acceptance(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """For each valid slot: sum_v min(p, q) with the target's whole distribution, and whether the argmaxes agree."""
        batch = self._on_device(batch)
        states = self._slot_states(batch)
        vocabulary = self.network.vocabulary
        accepted, agreed = [], []
        for start in range(0, states.shape[0], self._chunk_tokens):
            rows = slice(start, start + self._chunk_tokens)
            draft = self.network.head(states[rows]).float().softmax(-1)
            target = self.target.head(batch["target_states"][rows].to(states.dtype)).float().softmax(-1)
            best = target.argmax(-1)
            if vocabulary is not None:
                target = target[:, vocabulary]
            accepted.append(torch.minimum(draft, target).sum(-1))
            agreed.append(self._draft_ids[best] == draft.argmax(-1))
        return torch.cat(accepted), torch.cat(agreed)


def _drawn(asked: Tensor, written: Tensor, *, count: int, share: float, generator: torch.Generator) -> Tensor:
    """Anchors `[a]`, ascending, out of candidates in prompts `[p]` and in responses `[r]`: `count` of them, or all."""
    number = min(round(count * share), asked.shape[0])
    drawn = [
        candidates[torch.randperm(candidates.shape[0], generator=generator)[:wanted]]
        for candidates, wanted in ((written, count - number), (asked, number))
    ]
    return torch.cat(drawn).sort().values


def _pack(lengths: list[int], *, capacity: int) -> list[list[int]]:
    """Indices of conversations by row, longest first into the first row with room; else a row of its own."""
    rows: list[list[int]] = []
    filled: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, used in enumerate(filled) if used + lengths[index] <= capacity), None)
        if row is None:
            rows.append([])
            filled.append(0)
            row = len(rows) - 1
        rows[row].append(index)
        filled[row] += lengths[index]
    return rows
