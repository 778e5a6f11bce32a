"""The tokens of requests on the device, and what follows where a text's end stood before: prompt look-up (Saxena 2023)
in fixed shapes, the host not looking.

Of all earlier places the one is taken before which most tokens are those at the text's end, up to `LONGEST` of them,
and of several such the latest. What followed there is copied, and at the text's end once more from there: a loop goes
on. Where nothing matches, something is copied too: the proposals of a round are as many as ever, and are verified.

Letters in shapes: B requests, P positions of each, R texts, S positions of a text, L tokens that are copied.
"""

import torch
from torch import Tensor

LONGEST = 4
"""Tokens before a place that are compared; one that matches will do."""
# In front of every text, so that those of its first tokens are too.
_PAD = LONGEST - 1
_NOTHING = -1
# Texts that are looked through at once, each with all its positions.
_TEXTS = 256


class Written:
    """The tokens of B requests.

    Args:
        batch: B.
        positions: P.
        device: where they lie.
    """

    def __init__(self, batch: int, *, positions: int, device: torch.device) -> None:
        self._tokens = torch.zeros(batch, _PAD + positions, dtype=torch.long, device=device)
        self._tokens[:, :_PAD] = _NOTHING
        self._columns = torch.arange(positions, device=device)

    def begin(self, place: int, token: int) -> None:
        """Write the first token of a request."""
        self._tokens[place, _PAD].fill_(token)

    def write(self, rows: Tensor, starts: Tensor, tokens: Tensor) -> None:
        """Write tokens of some requests one after another; what lies behind them is not theirs.

        Args:
            rows: int64 `[R]`, the requests.
            starts: int64 `[R]`, position of the first of each.
            tokens: int64 `[R, n]`.
        """
        first = rows * self._tokens.shape[1] + starts + _PAD
        places = first[:, None] + self._columns[: tokens.shape[1]]
        self._tokens.view(-1).index_copy_(0, places.flatten(), tokens.flatten())

    def move(self, source: int, place: int) -> None:
        """Let a request's tokens lie in another place too."""
        self._tokens[place] = self._tokens[source]

    def copied(self, lengths: Tensor, *, shown: int, count: int) -> Tensor:
        """What each of the first requests may go on with; see `copied`.

        Args:
            lengths: int64 `[R]`, tokens before the anchors.
            shown: S, more than any of them has.
            count: L.
        """
        return copied(self._tokens[: lengths.shape[0], : _PAD + shown], lengths, count=count)


def copied(texts: Tensor, lengths: Tensor, *, count: int) -> Tensor:
    """What followed the latest earlier occurrence of each text's end, or of as much of its end as occurred.

    Args:
        texts: int64 `[R, pad + S]`, with what is no token in front; see `padded`.
        lengths: int64 `[R]`, position of the last token of each; nothing behind it is looked at.
        count: L.

    Returns:
        int64 `[R, L]`.
    """
    grams = texts.unfold(1, LONGEST, 1)
    ends = grams.gather(1, lengths[:, None, None].expand(-1, 1, LONGEST))
    # The last token that differs ends a match: the tokens behind it are as many as match.
    matching = torch.arange(_PAD, -1, -1, device=texts.device)
    matched = torch.where(grams == ends, LONGEST, matching).amin(-1)
    positions = torch.arange(grams.shape[1], device=texts.device)
    worth = torch.where(positions < lengths[:, None], matched * grams.shape[1] + positions, -1)
    # Before a text of one token there is no place, and that token is copied.
    found = torch.minimum(worth.argmax(1), lengths - 1)[:, None]
    steps = torch.arange(count, device=texts.device) % (lengths[:, None] - found)
    return texts.gather(1, _PAD + 1 + found + steps)


def padded(tokens: Tensor) -> Tensor:
    """A text as `copied` reads it, int64 `[pad + S]`, of its tokens `[S]`."""
    return torch.cat([tokens.new_full((_PAD,), _NOTHING), tokens])


def num_copied(tokens: Tensor, first: int, *, count: int) -> Tensor:
    """How many copied tokens a finished text goes on with, at every token before one that was written.

    Args:
        tokens: int64 `[T]`, prompt and the n tokens of the answer.
        first: of the answer, at least 1.
        count: L, at least 1.

    Returns:
        int64 `[n]`, at most L; less where the text ends before.
    """
    text, lengths = padded(tokens), torch.arange(first - 1, tokens.shape[0] - 1, device=tokens.device)
    given = [copied(text.expand(len(part), -1), part, count=count) for part in lengths.split(_TEXTS)]
    following = torch.cat([tokens, tokens.new_full((count,), _NOTHING)]).unfold(0, count, 1)[lengths + 1]
    return (torch.cat(given) == following).long().cumprod(1).sum(1)
