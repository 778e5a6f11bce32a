"""Which of the target's tokens a draft can propose, and how much of its probability falls on them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.conversation import Conversation
from inference.model import CausalModel


def draft_vocabulary(samples: Sequence[Conversation], *, size: int, vocab_size: int) -> Tensor | None:
    """The most frequent tokens of the training responses, sorted ids int64 `[size]`; None for the whole vocabulary.

    Where the responses hold fewer kinds, the lowest other ids fill up: tokenizers number frequent merges first.
    """
    if size == 0 or size >= vocab_size:
        return None
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for sample in samples:
        if sample.split == "train":
            counts += torch.bincount(sample.tokens[sample.mask], minlength=vocab_size)
    order = torch.sort(counts, descending=True, stable=True).indices
    return order[:size].sort().values


@torch.no_grad()
def covered_mass(
    target: CausalModel, samples: Sequence[Conversation], vocabulary: Tensor | None, *, limit: int = 2048
) -> float:
    """Share of the target's probability that falls on a vocabulary, averaged over validation positions."""
    if vocabulary is None:
        return 1.0
    states: list[Tensor] = []
    for sample in samples:
        if sum(len(rows) for rows in states) >= limit:
            break
        if sample.split == "validation" and sample.has_states:
            states.append(sample.states_of(sample.mask))
    if not states:
        return 1.0
    rows = torch.cat(states)[:limit].to(target.device)
    mass = [
        target.head(piece.to(target.model.dtype)).float().softmax(-1)[:, vocabulary.to(target.device)].sum(-1)
        for piece in rows.split(128)
    ]
    return float(torch.cat(mass).mean())
