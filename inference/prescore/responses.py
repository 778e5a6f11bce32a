"""Fixed responses: the target answers prompts, and one more pass over each answer says what it thought of it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from inference.decoder import decode
from inference.drafters.none import NoDrafter
from inference.generation import generate_batch
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.prescore.rehearsal import FixedResponse
from inference.prescore.rows import processed
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import ScorePrompt, request_seed

_BATCH = 16
_ROWS = 128


def fixed_responses(
    target: CausalModel,
    prompts: Sequence[ScorePrompt],
    *,
    settings: SamplingSettings,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    seed: int,
    taps: Iterable[int] = (),
) -> list[FixedResponse]:
    """Let the target answer prompts.

    Args:
        target: that will verify.
        prompts: what is asked.
        settings: sampling.
        max_new_tokens: longest answer.
        stop_tokens: end an answer.
        seed: of the run.
        taps: layers that any of the drafts reads.
    """
    layers = tuple(sorted(set(taps)))
    answers: list[list[int]] = []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        answers += _answers(target, batch, settings, max_new_tokens, stop_tokens, seed)
    return [
        fixed_response(target, prompt, answer, settings=settings, max_new_tokens=max_new_tokens, taps=layers)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _answers(
    target: CausalModel,
    prompts: Sequence[ScorePrompt],
    settings: SamplingSettings,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    seed: int,
) -> list[list[int]]:
    """All prompts at once, or one by one where a repetition penalty is asked for, which a batch has not."""
    seeds = [request_seed(seed, prompt.id, settings.temperature, "prescore") for prompt in prompts]
    if settings.repetition_penalty == 1.0:
        responses = generate_batch(
            target,
            [prompt.tokens.tolist() for prompt in prompts],
            settings=settings,
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_tokens,
            seed=seeds[0],
        )
        return [response.tokens for response in responses]
    request = Request(settings=settings, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
    return [
        decode(
            target,
            NoDrafter(),
            prompt.tokens,
            request=request,
            lookahead=FixedLookahead(0),
            generator=TorchSource.seeded(own, device=target.device),
        ).tokens
        for prompt, own in zip(prompts, seeds, strict=True)
    ]


@torch.inference_mode()
def fixed_response(
    target: CausalModel,
    prompt: ScorePrompt,
    answer: Sequence[int],
    *,
    settings: SamplingSettings,
    max_new_tokens: int,
    taps: tuple[int, ...] = (),
) -> FixedResponse:
    """An answer with what a pass of the target over it gives.

    Args:
        target: that wrote it.
        prompt: it answers.
        answer: its tokens, at least one.
        settings: how it was written.
        max_new_tokens: longest answer.
        taps: layers to keep.
    """
    first = prompt.tokens.shape[0]
    tokens = torch.cat([prompt.tokens.cpu(), torch.tensor(answer)])
    fed = tokens[:-1].to(target.device)
    with target.tapped(taps) as features, target.captured_states() as states:
        target.logits(fed, target.new_cache(), num_rows=1)
        kept = features.take()[0].cpu() if taps else torch.empty(fed.shape[0], 0)
    response = FixedResponse(
        prompt_id=prompt.id,
        domain=prompt.domain,
        tokens=tokens,
        first=first,
        budget=min(max_new_tokens, target.context_limit - first),
        settings=settings,
        taps=taps,
        features=kept,
        target_probs=None,
    )
    if settings.greedy:
        return response
    probs = _probs(target, response, states[-1][0, first - 1 :])
    return replace(response, target_probs=probs)


def _probs(target: CausalModel, response: FixedResponse, states: Tensor) -> Tensor:
    """The target's chance of each token of the response, fp64 `[n]`, from the states that predicted it."""
    found = []
    for start in range(0, states.shape[0], _ROWS):
        rows = processed(target.head(states[start : start + _ROWS]), response, start=start)
        wanted = response.answer[start : start + _ROWS, None].to(rows.device)
        found.append((rows.gather(1, wanted)[:, 0] - rows.logsumexp(-1)).exp().double().cpu())
    return torch.cat(found)
