"""What drafting costs, in seconds: a drafter is led along fixed responses as decoding would lead it, without a target.

What is proposed is compared with the response instead of being verified; that takes no time of the target, and a few
rounds tell what a round takes.
"""

from collections.abc import Sequence

import torch

from inference.block_length import DraftedRequest, Drafting
from inference.decoder import Clock
from inference.drafters import Drafter, ReadsFeatures
from inference.lookahead.fixed import FixedLookahead
from inference.prescore.rehearsal import FixedResponse
from inference.randomness import TorchSource

_RESPONSES = 3
_ROUNDS = 6


def drafting_costs(
    drafter: Drafter, responses: Sequence[FixedResponse], *, longest: int, device: torch.device
) -> tuple[float, float]:
    """Seconds of drafting a block whatever its length, and a token besides, from blocks of two lengths.

    Args:
        drafter: is timed; a request of its own under way is lost.
        responses: it is led along the first rounds of the first few of them.
        longest: the longer of the two lengths; the other is 1.
        device: where it runs.
    """
    drafts = {tokens: Drafting() for tokens in (longest, 1)}
    # The first response warms up.
    for number, response in enumerate([*responses[:1], *responses[:_RESPONSES]]):
        for tokens, drafting in drafts.items():
            drafted = _drafted(drafter, response, tokens=tokens, device=device)
            if number and drafted.rounds:
                drafting.requests.append(drafted)
    return drafts[longest].costs(drafts[1] if longest > 1 else Drafting())


@torch.inference_mode()
def _drafted(drafter: Drafter, response: FixedResponse, *, tokens: int, device: torch.device) -> DraftedRequest:
    """A few rounds with one block length. The first is not counted: in it the whole prompt is caught up with."""
    sequence, answer = response.tokens.to(device), response.answer.tolist()
    reader = drafter if isinstance(drafter, ReadsFeatures) else None
    features = response.features_of(reader.taps).to(device) if reader else None
    policy, source = FixedLookahead(tokens), TorchSource.seeded(0, device=device)
    anchor = read = rounds = proposed = 0
    seconds = {"first": 0.0, "draft": 0.0}
    clock = Clock(seconds, device)
    drafter.begin(sequence[: response.first])
    for number in range(_ROUNDS + 1):
        limit = min(tokens, response.budget - anchor - 1)
        if anchor >= len(answer) or limit < 1:
            break
        context = sequence[: response.first + anchor]
        if reader is not None and features is not None and read < context.shape[0] - 1:
            reader.read(features[read : context.shape[0] - 1])
            read = context.shape[0] - 1
        with clock.part("draft" if number else "first"):
            proposal = drafter.propose(
                context, limit=limit, lookahead=policy, settings=response.settings, generator=source
            )
        stood = 0
        for said, came in zip(proposal.tokens.tolist(), answer[anchor:], strict=False):
            if said != came:
                break
            stood += 1
        drafter.rollback(stood)
        anchor += stood + 1
        if number and len(proposal):
            rounds, proposed = rounds + 1, proposed + len(proposal)
    return DraftedRequest(rounds, proposed, seconds["draft"])
