"""From a draft's rows of logits to the chances and ranks of the response's tokens; see `inference.prescore`."""

from typing import NamedTuple

import torch
from torch import Tensor

from inference.drafters._token import plain
from inference.prescore.rehearsal import FixedResponse
from inference.sampling import process_logits


class Judged(NamedTuple):
    """What rows say of the response's tokens.

    Attributes:
        chances: fp64 `[c]`, that a token drawn from the row stands, given the response.
        ranks: int64 `[c]`, place of the response's token in the row, 0 for the likeliest, -1 where it is not in it;
            None above temperature 0.
    """

    chances: Tensor
    ranks: Tensor | None


def judged(rows: Tensor, response: FixedResponse, *, start: int, vocabulary: Tensor | None = None) -> Judged:
    """Compare rows with the response.

    Where a temperature is all the processing there is, nothing is spread over the target's vocabulary.

    Args:
        rows: `[c, Vd]`, raw logits; row i is for token `start + i` of the response, which has it.
        response: what was written.
        start: token of the response that the first row is for, from 0.
        vocabulary: sorted ids the rows are of, int64 `[Vd]`; None for all.
    """
    if vocabulary is not None and not plain(response.settings):
        # What neither side names need not be there.
        width = 1 + max(int(vocabulary[-1]), int(response.tokens.max()))
        rows = rows.new_full((rows.shape[0], width), -torch.inf).index_copy_(1, vocabulary, rows)
        vocabulary = None
    wanted = response.answer[start : start + rows.shape[0]].to(rows.device)
    places, known = _places(wanted, vocabulary)
    rows = processed(rows, response, start=start)
    own = rows.gather(1, places[:, None])
    if response.settings.greedy:
        before = torch.arange(rows.shape[1], device=rows.device) < places[:, None]
        ahead = (rows > own) | ((rows == own) & before)
        ranks = torch.where(known & (own[:, 0] > -torch.inf), ahead.sum(-1), -1).cpu()
        return Judged((ranks == 0).double(), ranks)
    assert response.target_probs is not None, "a sampled response comes with the target's probabilities"
    draft_probs = torch.where(known, (own[:, 0] - rows.logsumexp(-1)).exp(), 0.0).double().cpu()
    target_probs = response.target_probs[start : start + rows.shape[0]]
    # Rounding may put a drawn token just outside the nucleus, where both are 0: then the draft cannot propose it.
    sure = draft_probs >= target_probs
    return Judged(torch.where(sure, (draft_probs > 0.0).double(), draft_probs / target_probs), None)


def processed(rows: Tensor, response: FixedResponse, *, start: int) -> Tensor:
    """Rows for successive tokens of the response after all processing; see `process_logits`."""
    tokens = response.tokens.to(rows.device)
    here = response.first + start
    return process_logits(rows, context=tokens[:here], block=tokens[here:], settings=response.settings)


def _places(tokens: Tensor, vocabulary: Tensor | None) -> tuple[Tensor, Tensor]:
    """Columns of tokens in rows of a vocabulary, and which of them have one."""
    if vocabulary is None:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    places = torch.searchsorted(vocabulary, tokens).clamp(max=vocabulary.shape[0] - 1)
    return places, vocabulary[places] == tokens
