"""Accept, reject, resample: the pure functions that make speculation lossless.

Sources: Leviathan et al. 2023, algorithm 1; Chen et al. 2023, theorem 1; for siblings, recursive rejection sampling
without replacement (Jeon et al. 2024). `target_probs` and `draft_probs` are the distributions after temperature, top-k,
top-p and penalties. `draft_probs=None` means that every proposed token was certain under the draft (a point mass), as
with n-gram look-up, without spelling out a `V`-wide one-hot row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inference.randomness import Source


@dataclass(frozen=True)
class Verdict:
    """What one target pass decided.

    Attributes:
        num_accepted: leading proposed tokens that stand.
        next_token: int64 `[]`, the token that follows them: a sibling that stands, else what the target adds, which is
            resampled on a rejection and otherwise the bonus token.
        sibling: which of the proposal's siblings `next_token` is; None for the target's own.
    """

    num_accepted: int
    next_token: torch.Tensor
    sibling: int | None = None


def verify_greedy(
    draft_tokens: torch.Tensor,
    choices: torch.Tensor,
    *,
    siblings: torch.Tensor | None = None,
    slots: Sequence[int] = (),
) -> Verdict:
    """Keep proposed tokens while they equal the target's own choice, then add the target's choice.

    Args:
        draft_tokens: int64 `[l]`.
        choices: int64 `[l + 1]`, the likeliest token of each row of the target; row k predicts the token after the
            first k proposed ones.
        siblings: see `Proposal`.
        slots: likewise.
    """
    length = draft_tokens.shape[0]
    # One transfer from the device for all that is compared.
    numbers = torch.cat([draft_tokens, choices] if siblings is None else [draft_tokens, choices, siblings]).tolist()
    said, chosen, beside = numbers[:length], numbers[length : 2 * length + 1], numbers[2 * length + 1 :]
    num_accepted = next((k for k, token in enumerate(said) if token != chosen[k]), length)
    sibling = None
    if beside:
        # Tokens of one row are all different: one of them at most is the choice.
        right = (i for i, own in enumerate(slots) if own == num_accepted and beside[i] == chosen[num_accepted])
        sibling = next(right, None)
    return Verdict(num_accepted, choices[num_accepted], sibling)


def verify_sampled(
    draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    *,
    generator: Source,
    siblings: torch.Tensor | None = None,
    slots: Sequence[int] = (),
) -> Verdict:
    """Accept token k with chance `min(1, p_k(x_k) / q_k(x_k))`; on the first rejection try its siblings in turn.

    What a rejection leaves is p' = `normalize(max(p - q, 0))`, and a sibling y was drawn from q' = q without the tokens
    before it. So y is accepted with chance `min(1, p'(y) / q'(y))`, and so on; when all are rejected, the next token is
    drawn from what is left.

    Args:
        draft_tokens: int64 `[l]`, each sampled from its row of `draft_probs`.
        draft_probs: `[l, V]`, or None for point masses.
        target_probs: `[l + 1, V]`.
        generator: source of the random decisions.
        siblings: see `Proposal`.
        slots: likewise.

    Returns:
        The verdict; its output law is the target's own for every draft.
    """
    num_proposed = draft_tokens.shape[0]
    num_accepted = 0
    if num_proposed:
        ratios = acceptance_ratios(draft_tokens, draft_probs, target_probs)
        num_accepted = generator.accepted_prefix(ratios)
    row = target_probs[num_accepted]
    if num_accepted < num_proposed:
        draft_row = None if draft_probs is None else draft_probs[num_accepted]
        rejected = draft_tokens[num_accepted]
        row = residual_probs(row, draft_row, rejected)
        for index, token in _beside(num_accepted, siblings, slots):
            draft_row = None if draft_row is None else without(draft_row, rejected)
            ratio = acceptance_ratios(token[None], None if draft_row is None else draft_row[None], row[None])
            if generator.accepted_prefix(ratio):
                return Verdict(num_accepted, token, index)
            row, rejected = residual_probs(row, draft_row, token), token
    return Verdict(num_accepted, generator.categorical(row))


def _beside(slot: int, siblings: torch.Tensor | None, slots: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
    """Siblings of one place in the chain, with their indices."""
    return [] if siblings is None else [(i, siblings[i]) for i, own in enumerate(slots) if own == slot]


def without(row: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """`row` `[V]` given that it is not `token`, int64 `[]`; zeros when nothing else has mass."""
    rest = row.clone()
    rest[token] = 0.0
    return rest / rest.sum().clamp(min=torch.finfo(rest.dtype).tiny)


def acceptance_ratios(
    draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None, target_probs: torch.Tensor
) -> torch.Tensor:
    """`min(1, p_k(x_k) / q_k(x_k))` for every proposed token, shape `[l]`."""
    index = draft_tokens[:, None]
    target_chance = target_probs[: draft_tokens.shape[0]].gather(1, index)[:, 0]
    if draft_probs is None:
        return target_chance
    return (target_chance / draft_probs.gather(1, index)[:, 0]).clamp(max=1.0)


def residual_probs(target_row: torch.Tensor, draft_row: torch.Tensor | None, token: torch.Tensor) -> torch.Tensor:
    """`normalize(max(p - q, 0))`, the law of the token that replaces a rejected one.

    Args:
        target_row: `[V]`.
        draft_row: `[V]`, or None when the draft was certain of `token`.
        token: int64 `[]`, the rejected token.

    Returns:
        `[V]`. Where the two laws are equal a rejection has probability zero and the residual vanishes; rounding can
        still lead here, and then the target's own row is the limit to draw from.
    """
    if draft_row is None:
        residual = target_row.clone()
        residual[token] = 0.0
    else:
        residual = (target_row - draft_row).clamp_(min=0.0)
    total = residual.sum()
    return torch.where(total > 0, residual / total.clamp(min=torch.finfo(residual.dtype).tiny), target_row)
