"""A training corpus that lies on an accelerator as a whole, and batches of it that are places only.

What a step reads is then gathered where it is used, and every tensor of a batch has a shape that the draft's settings
fix: one conversation a row, as wide as the longest of the step rounded up, equally many anchors in each. So a step can
be captured as a graph (`train.engines.captured`), and nothing is copied to the device for it but a few thousand places.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.conversation import Conversation

_WIDTH = 64
"""Rows are as wide as a multiple of this: few widths are few graphs."""


class ResidentCorpus:
    """Tokens, states and features of conversations, one after the other.

    Args:
        samples: with states, at least one.
        features_of: gives a conversation's features `[T, m * D]`.
        device: where everything lies from now on.
        max_tokens: longer conversations are cut.
    """

    def __init__(
        self,
        samples: Sequence[Conversation],
        features_of: Callable[[Conversation], Tensor],
        *,
        device: torch.device,
        max_tokens: int,
    ) -> None:
        self._longest = max_tokens
        self.lengths = [min(sample.num_tokens, max_tokens) for sample in samples]
        self.starts = [0]
        for length in self.lengths:
            self.starts.append(self.starts[-1] + length)
        total = self.starts[-1]
        self._tokens = torch.zeros(total, dtype=torch.long, device=device)
        self._mask = torch.zeros(total, dtype=torch.bool, device=device)
        self._stated = torch.zeros_like(self._mask)
        first = samples[0]
        features, states = features_of(first), first.states_of(first.stated)
        self._features = features.new_empty((total, features.shape[1]), device=device)
        # A row for every token: those without a state are few, and a place then needs no other number.
        self._states = states.new_zeros((total, states.shape[1]), device=device)
        for sample, start, length in zip(samples, self.starts, self.lengths, strict=False):
            rows = slice(start, start + length)
            stated = sample.stated[:length]
            self._tokens[rows] = sample.tokens[:length].to(device)
            self._mask[rows] = sample.mask[:length].to(device)
            self._stated[rows] = stated.to(device)
            self._features[rows] = features_of(sample)[:length].to(device)
            places = start + stated.nonzero()[:, 0].to(device)
            self._states[places] = sample.states_of(stated).to(device)

    def batch(self, places: Sequence[int], anchors: Sequence[Tensor], *, count: int) -> dict[str, Tensor]:
        """Where the conversations of a step begin and end, and their anchors.

        Args:
            places: of the conversations, B.
            anchors: columns of each, int64 `[a]`, at least one and at most `count`.
            count: anchors of a row, A.

        Returns:
            starts, lengths, drawn int64 `[B]`, anchors int64 `[B, A]` (the last one repeated), columns int64 `[T]`.
        """
        lengths = [self.lengths[place] for place in places]
        width = min(-(-max(lengths) // _WIDTH) * _WIDTH, self._longest)
        filled = torch.empty(len(places), count, dtype=torch.long)
        for row, columns in zip(filled, anchors, strict=True):
            row[: columns.shape[0]] = columns
            row[columns.shape[0] :] = columns[-1]
        return {
            "starts": torch.tensor([self.starts[place] for place in places]),
            "lengths": torch.tensor(lengths),
            "drawn": torch.tensor([columns.shape[0] for columns in anchors]),
            "anchors": filled,
            "columns": torch.arange(width),
        }

    def gathered(self, batch: dict[str, Tensor], *, block: int) -> dict[str, Tensor]:
        """The batch itself, on the device; nothing waits and every shape is that of `batch`.

        Returns:
            As `FeatureDistillation.collate`, but labels, places and target_states are of all B * A * block slots, and
            valid, bool `[B * A * block]`, says which of them count.
        """
        columns, anchors = batch["columns"], batch["anchors"]
        starts, lengths = batch["starts"][:, None], batch["lengths"][:, None]
        inside = columns < lengths
        rows = starts + torch.where(inside, columns, 0)
        slot = torch.arange(block, device=columns.device)
        ahead = anchors[..., None] + 1 + slot
        reached = ahead < lengths[..., None]
        ahead = starts[..., None] + torch.where(reached, ahead, 0)
        # A block that begins in a response ends with it; one that begins in a prompt may run into the response.
        known = torch.where(self._mask[ahead[..., :1]], self._mask[ahead], self._stated[ahead])
        real = torch.arange(anchors.shape[1], device=columns.device) < batch["drawn"][:, None]
        slots = (known & reached).long().cumprod(-1).bool() & real[..., None]
        flat = ahead.flatten()
        return {
            "tokens": self._tokens[rows],
            "segments": torch.where(inside, 0, -1),
            "positions": torch.where(inside, columns, 0),
            "features": self._features[rows],
            "anchors": anchors,
            "slots": slots,
            "labels": self._tokens[flat],
            "places": slot.expand(slots.shape).flatten(),
            "target_states": self._states[flat],
            "valid": slots.flatten(),
        }


def resident_bytes(samples: Sequence[Conversation], *, max_tokens: int, hidden: int, num_taps: int) -> int:
    """Bytes that a resident corpus takes, reading none of it."""
    each = 2 * hidden * (num_taps + 1) + 8 + 2
    return each * sum(min(sample.num_tokens, max_tokens) for sample in samples)
