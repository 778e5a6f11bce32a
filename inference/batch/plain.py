"""transformers' own `generate` on a batch, for comparison: the same model and prompts, greedy, padded on the left.

Not used to decode anything else. Every row goes on until the last has ended; what a row writes after its end does not
count.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from inference.attention import GROUPED, use_grouped_attention
from inference.batch.load import Asked, Served, Trace
from inference.batch.timing import Clock, clocked, timed_passes
from inference.decoder import up_to_stop
from inference.generation import left_padded
from inference.model import CausalModel
from inference.records import tokens_digest


@torch.inference_mode()
def plain_generate(
    model: CausalModel, asked: Sequence[Asked], *, clock: Clock = time.perf_counter
) -> tuple[Trace, list[list[int]]]:
    """Answer all requests in one batch, with transformers' own attention.

    Args:
        model: the target.
        asked: greedy requests of the same length and stop rules.
        clock: seconds.

    Returns:
        What happened, and the tokens of every request. All of a request's tokens carry the moment of the end, before
        which `generate` hands nothing out.

    Raises:
        ValueError: requests that differ, or are sampled.
    """
    request = asked[0].request
    if not request.settings.greedy or any(one.request != request for one in asked):
        raise ValueError("transformers' generate is compared on greedy requests that ask for the same")
    pad = min(request.stop_tokens, default=0)
    ids, mask = left_padded([one.prompt.tolist() for one in asked], device=model.device, pad=pad)
    longest = ids.shape[1]
    now = clocked(model.device, clock)
    generating: Any = model.model  # only some classes of transformers' own declare `generate`
    with _own_attention(model.model), timed_passes(model, clock=clock) as timer:
        began = now()
        written = generating.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=min(request.max_new_tokens, model.context_limit - longest),
                repetition_penalty=request.settings.repetition_penalty,
                eos_token_id=sorted(request.stop_tokens) or None,
                pad_token_id=pad,
            ),
        )
        elapsed = round(now() - began, 6)
    answers = [up_to_stop(row, request.stop_tokens)[0] for row in written[:, longest:].tolist()]
    served = [_served(one, tokens, elapsed) for one, tokens in zip(asked, answers, strict=True)]
    trace = Trace(
        window=elapsed,
        elapsed=elapsed,
        rounds=timer.passes,
        pass_seconds=round(timer.seconds, 6),
        draft_seconds=0.0,
        served=served,
    )
    return trace, answers


def _served(one: Asked, tokens: list[int], elapsed: float) -> Served:
    return Served(
        prompt_id=one.prompt_id,
        domain=one.domain,
        temperature=0.0,
        arrival=0.0,
        start=0.0,
        end=elapsed,
        emissions=[(elapsed, len(tokens))],
        passes=len(tokens),
        proposed=[],
        accepted=[],
        blocks={"0": len(tokens)},
        digest=tokens_digest(tokens),
    )


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """transformers' `sdpa` in place of ours inside the block."""
    ours = model.config._attn_implementation == GROUPED
    if ours:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if ours:
            use_grouped_attention(model)
