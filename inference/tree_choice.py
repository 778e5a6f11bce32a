"""Which tree a draft should propose: the target answers prompts, and what it went on with says which paths are worth
their place."""

from collections.abc import Sequence

from inference.drafters.feature import FeatureDrafter
from inference.graphed.decode import GraphedDecoder
from inference.prescore.responses import fixed_response
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import ScorePrompt
from inference.trees import Continuations

_GREEDY = SamplingSettings()


def continuations(
    decoder: GraphedDecoder,
    drafter: FeatureDrafter,
    prompts: Sequence[ScorePrompt],
    *,
    depth: int,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
) -> Continuations:
    """What the target goes on with after every anchor of its greedy answers.

    Args:
        decoder: of the target, with any draft: what it answers is the target's own.
        drafter: whose ranks are wanted.
        prompts: on which the tree is chosen; never those it is measured on.
        depth: most tokens of a path.
        max_new_tokens: per answer.
        stop_tokens: end an answer.
    """
    target, known = decoder.rounds.target.target, Continuations()
    request = Request(settings=_GREEDY, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
    for prompt in prompts:
        answer = decoder.decode(prompt.tokens, request=request, seed=0).tokens
        response = fixed_response(
            target, prompt, answer, settings=_GREEDY, max_new_tokens=max_new_tokens, taps=tuple(drafter.taps)
        )
        known.add(drafter.continuation_ranks(response, depth=depth).tolist())
    return known
