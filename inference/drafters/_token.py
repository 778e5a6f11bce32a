"""One token of a block for drafters that compute rows of logits: the policy is asked first, then the row is sampled."""

from dataclasses import dataclass

import torch

from inference.lookahead import Lookahead, Signals, Visible
from inference.randomness import Source
from inference.sampling import process_logits
from inference.sampling_settings import SamplingSettings
from inference.verification import without

_WIDEST_MARGIN = 30.0


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one position.

    Attributes:
        token: int64 `[]`.
        row: `[V]`, the distribution it was sampled from; None when greedy.
        siblings: int64 `[s]`, further tokens of the row, without replacement.
        signals: of the positions before and of this one, if the policy reads any.
    """

    token: torch.Tensor
    row: torch.Tensor | None
    siblings: torch.Tensor
    signals: tuple[Signals, ...]


def draw_token(
    logits: torch.Tensor,
    context: torch.Tensor,
    tokens: torch.Tensor,
    *,
    settings: SamplingSettings,
    generator: Source,
    lookahead: Lookahead,
    so_far: tuple[Signals, ...],
    confidence: torch.Tensor | None = None,
) -> Drawn | None:
    """Ask the policy, then draw one token from its row, and as many siblings as the policy wants beside it.

    Args:
        logits: `[1, V]`, raw.
        context: int64 `[T]`, tokens up to the anchor.
        tokens: int64 `[k]`, proposed so far.
        settings: sampling settings of the request.
        generator: source of random decisions.
        lookahead: the policy; asked here only if it reads signals.
        so_far: signals of the positions before.
        confidence: chance that this token survives, a scalar; None takes the largest probability of the row.

    Returns:
        None when the policy ends the block.
    """
    history = torch.cat([context, tokens])
    row = process_logits(logits, context=history, block=tokens[:0], settings=settings)[0]
    probs = None if settings.greedy else torch.softmax(row, dim=-1)
    if lookahead.reads:
        [signals] = row_signals(
            row[None],
            None if probs is None else probs[None],
            None if confidence is None else confidence[None],
            reads=lookahead.reads,
        )
        so_far = (*so_far, signals)
        if not lookahead.keeps(Visible(tokens.shape[0] + 1, so_far)):
            return None
    beside = lookahead.siblings[tokens.shape[0]] if tokens.shape[0] < len(lookahead.siblings) else 0
    if settings.greedy:
        if not beside:
            return Drawn(row.argmax(), None, tokens[:0], so_far)
        best = row.topk(min(1 + beside, row.shape[0]))
        ranked = best.indices[best.values > -torch.inf]
        return Drawn(ranked[0], None, ranked[1:], so_far)
    assert probs is not None, "sampling needs the distribution"
    token = generator.categorical(probs)
    siblings, rest, last = [tokens[:0]], probs, token
    for _ in range(beside):
        rest = without(rest, last)
        if not bool(rest.any()):
            break
        last = generator.categorical(rest)
        siblings.append(last[None])
    return Drawn(token, probs, torch.cat(siblings), so_far)


def plain(settings: SamplingSettings) -> bool:
    """Whether a row of logits needs a temperature and no further processing."""
    return settings.repetition_penalty == 1.0 and not settings.top_k and settings.top_p == 1.0


def row_signals(
    rows: torch.Tensor, probs: torch.Tensor | None, confidence: torch.Tensor | None, *, reads: frozenset[str]
) -> list[Signals]:
    """What policies read of rows `[n, V]` of processed logits; one transfer from the device, whatever they read.

    See `signal_values` for the arguments.
    """
    values = signal_values(rows, probs, confidence, reads=reads)
    columns = torch.stack([value.double() for value in values.values()], dim=-1).tolist()
    return [Signals(**dict(zip(values, numbers, strict=True))) for numbers in columns]


def signal_values(
    rows: torch.Tensor, probs: torch.Tensor | None, confidence: torch.Tensor | None, *, reads: frozenset[str]
) -> dict[str, torch.Tensor]:
    """The fields of `Signals` of rows, each `[n]`, still on the device.

    Args:
        rows: `[n, V]`, processed logits.
        probs: their softmax, where one was made.
        confidence: `[n]`, chances that the tokens survive; None takes the largest probabilities.
        reads: fields of `Signals`.
    """
    values: dict[str, torch.Tensor] = {}
    if probs is None and reads != {"margin"}:
        probs = torch.softmax(rows, dim=-1)
    if "confidence" in reads and probs is not None:
        values["confidence"] = probs.amax(dim=-1) if confidence is None else confidence
    if "entropy" in reads and probs is not None:
        values["entropy"] = torch.special.entr(probs).sum(dim=-1)
    if "margin" in reads:
        best = rows.topk(2, dim=-1).values
        values["margin"] = (best[:, 0] - best[:, 1]).clamp(max=_WIDEST_MARGIN)
    return values
