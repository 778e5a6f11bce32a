"""From logits to the distribution that is sampled: one code path for target and draft alike.

Order: repetition penalty, temperature, top-k, top-p, softmax. Losslessness needs `p` and `q` to be what was really
sampled from, so the caller samples from, and scores with, the one tensor returned here.
"""

import torch

from inference.sampling_settings import SamplingSettings


def process_logits(
    logits: torch.Tensor, *, context: torch.Tensor, block: torch.Tensor, settings: SamplingSettings
) -> torch.Tensor:
    """Apply repetition penalty, temperature, top-k and top-p.

    Args:
        logits: `[rows, V]`; row i predicts the token after `context` and the first i tokens of `block`.
        context: int64 `[T]`, tokens before the block, the anchor included.
        block: int64 `[rows - 1]` or longer, the proposed tokens.
        settings: how to process; with temperature 0 only the repetition penalty changes anything that matters.

    Returns:
        `[rows, V]` in fp32 (fp64 stays fp64); removed tokens are -inf. The caller's logits are left as they are;
        where there is nothing to do they are returned themselves.
    """
    rows = logits.shape[0]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if settings.repetition_penalty != 1.0:
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        seen[:, context] = True
        for position in range(1, rows):
            seen[position:, block[position - 1]] = True
        penalised = torch.where(logits > 0, logits / settings.repetition_penalty, logits * settings.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if settings.greedy:
        return logits
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        kept = logits.topk(settings.top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, kept.indices, kept.values)
    if settings.top_p < 1.0:
        logits = _keep_nucleus(logits, settings.top_p)
    return logits


def token_probs(
    logits: torch.Tensor, *, context: torch.Tensor, block: torch.Tensor, settings: SamplingSettings
) -> torch.Tensor:
    """Distributions `[rows, V]` after all processing, each row summing to 1; see `process_logits` for arguments."""
    return torch.softmax(process_logits(logits, context=context, block=block, settings=settings), dim=-1)


def _keep_nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep, per row, the most probable tokens until their mass reaches `top_p`; the first token always stays."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = torch.softmax(ordered, dim=-1)
    drop_ordered = probs.cumsum(dim=-1) - probs >= top_p
    drop = torch.zeros_like(drop_ordered).scatter_(-1, order, drop_ordered)
    return logits.masked_fill(drop, -torch.inf)
