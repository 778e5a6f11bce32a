"""One token of a block for drafters that compute rows of logits: the policy is asked first, then the row is sampled."""

import torch

from inference.lookahead import Lookahead, Visible
from inference.randomness import Source
from inference.sampling import SamplingSettings, process_logits


def draw_token(
    logits: torch.Tensor,
    context: torch.Tensor,
    tokens: torch.Tensor,
    *,
    settings: SamplingSettings,
    generator: Source,
    lookahead: Lookahead,
    so_far: tuple[float, ...],
    confidence: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[float, ...]]:
    """Ask the policy, then draw one token from its row.

    Args:
        logits: `[1, V]`, raw.
        context: int64 `[T]`, tokens up to the anchor.
        tokens: int64 `[k]`, proposed so far.
        settings: sampling settings of the request.
        generator: source of random decisions.
        lookahead: the policy; asked here only if it needs confidences.
        so_far: confidences of the positions before.
        confidence: chance that this token survives, a scalar; None takes the largest probability of the row.

    Returns:
        the token, int64 `[]`, or None when the policy ends the block; the row `[V]` it was sampled from, None when
        greedy; and the confidences, this position's included if they are needed.
    """
    history = torch.cat([context, tokens])
    row = process_logits(logits, context=history, block=tokens[:0], settings=settings)[0]
    probs = None if settings.greedy and not lookahead.needs_confidence else torch.softmax(row, dim=-1)
    if lookahead.needs_confidence and probs is not None:
        so_far = (*so_far, float(probs.max() if confidence is None else confidence))
        if not lookahead.keeps(Visible(tokens.shape[0] + 1, so_far)):
            return None, None, so_far
    if settings.greedy:
        return row.argmax(), None, so_far
    assert probs is not None, "sampling needs the distribution"
    return generator.categorical(probs), probs, so_far
