"""Arms on the same prompts in one run: decode a prompt under every arm, in shuffled order, and keep the records.

Writes nothing. `inference.block_length` chooses how much an arm proposes, on other prompts.
"""

import hashlib
import math
import random
from dataclasses import dataclass

import torch

from inference.decoder import decode
from inference.drafters import Drafter
from inference.graphed.decode import GraphedDecoder
from inference.lookahead import Lookahead
from inference.model import CausalModel
from inference.randomness import TorchSource
from inference.records import Mismatch, Record, record_of
from inference.request import Decoded, Request
from inference.sampling_settings import SamplingSettings
from inference.statistics import BASELINE

# A greedy mismatch counts as rounding when both tokens are this close to the best logit, in the units of the logits, as
# long as that is below 32. From there on numbers lie twice as far apart, and so on for each power of two: of bf16 these
# are four steps.
NEAR_TIE = {
    "bf16": 0.5,
    "bf16_packed": 0.5,
    "packed_by_rows": 0.5,
    "fp16": 0.1,
    "fp16_packed": 0.05,
    "fp32": 0.01,
    "fp32_packed": 0.01,
}


@dataclass(frozen=True)
class Arm:
    """One way to decode.

    Attributes:
        name: of the draft.
        target: the model that verifies, in this arm's arithmetic.
        drafter: proposes.
        lookahead: how much it proposes.
        captured: decodes in their place by captured rounds of the same target and draft; None for none.
    """

    name: str
    target: CausalModel
    drafter: Drafter
    lookahead: Lookahead
    captured: GraphedDecoder | None = None

    def decode(self, prompt: torch.Tensor, *, request: Request, seed: int) -> Decoded:
        """Answer one request; `prompt` is int64 `[T]`."""
        if self.captured is not None:
            return self.captured.decode(prompt, request=request, seed=seed)
        return decode(
            self.target,
            self.drafter,
            prompt,
            request=request,
            lookahead=self.lookahead,
            generator=TorchSource.seeded(seed, device=self.target.device),
        )

    def draft_nbytes(self) -> int:
        """Bytes of the draft, weights and caches."""
        return self.drafter.nbytes() if self.captured is None else self.captured.draft_nbytes()


@dataclass(frozen=True)
class ScorePrompt:
    """A held-out prompt in tokens.

    Attributes:
        id: of the prompt.
        domain: of the prompt.
        tokens: int64 `[T]`.
    """

    id: str
    domain: str
    tokens: torch.Tensor


def request_seed(seed: int, *parts: object) -> int:
    """A seed of its own for one request: the same for the same parts, whatever ran before."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def score_prompt(
    arms: list[Arm],
    prompt: ScorePrompt,
    *,
    settings: SamplingSettings,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    seed: int,
) -> list[Record]:
    """Decode one prompt under every arm, in an order shuffled by the seed.

    At temperature 0 every arm's tokens are compared with the baseline's, and a difference is explained.

    Args:
        arms: the baseline `none` among them.
        prompt: what is asked.
        settings: sampling.
        max_new_tokens: longest answer.
        stop_tokens: end an answer.
        seed: of the run.
    """
    order = list(range(len(arms)))
    random.Random(request_seed(seed, prompt.id, settings.temperature, "order")).shuffle(order)
    request = Request(settings=settings, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
    decoded: dict[str, Decoded] = {}
    for index in order:
        arm = arms[index]
        decoded[arm.name] = arm.decode(
            prompt.tokens, request=request, seed=request_seed(seed, prompt.id, settings.temperature, arm.name)
        )
    reference = decoded[BASELINE].tokens
    reference_precision = next(arm.target.precision for arm in arms if arm.name == BASELINE)
    return [
        record_of(
            decoded[arm.name],
            prompt_id=prompt.id,
            domain=prompt.domain,
            temperature=settings.temperature,
            arm=arm.name,
            order=order.index(index),
            prompt_tokens=prompt.tokens.shape[0],
            draft_bytes=arm.draft_nbytes(),
            target_bytes=arm.target.nbytes(),
            mismatch=explain_mismatch(
                arm.target, prompt.tokens, decoded[arm.name].tokens, reference, reference_precision=reference_precision
            )
            if settings.greedy
            else None,
        )
        for index, arm in enumerate(arms)
    ]


def _coarseness(logit: float) -> float:
    """How far numbers of this size lie apart, with those from 16 to 32 for 1; 1 of all smaller ones too."""
    return max(1.0, 2.0 ** (math.frexp(abs(logit))[1] - 5))


def explain_mismatch(
    target: CausalModel, prompt: torch.Tensor, tokens: list[int], reference: list[int], *, reference_precision: str
) -> Mismatch | None:
    """Where greedy tokens leave the reference, and whether rounding explains it; None when they are the same.

    The two may come from different arithmetics, since target-only decoding gets its own fastest one; then the coarser
    of the two says what counts as a near-tie. A repetition penalty is not applied to the margin.

    Args:
        target: that verified the tokens; margins are its own.
        prompt: int64 `[T]`.
        tokens: what the arm wrote.
        reference: what target-only decoding wrote.
        reference_precision: in which it did.
    """
    if tokens == reference:
        return None
    position = next(
        (i for i, (a, b) in enumerate(zip(tokens, reference, strict=False)) if a != b), min(len(tokens), len(reference))
    )
    prefix = torch.cat([prompt, prompt.new_tensor(reference[:position])])
    row = target.logits(prefix, target.new_cache(), num_rows=1)[0].float()
    # More than two tokens may be close: bf16 knows some twenty logits between 16 and 18.
    pair = [*tokens[position : position + 1], *reference[position : position + 1]]
    margin = float(row.max() - row[pair].min())
    close = max(NEAR_TIE[target.precision], NEAR_TIE[reference_precision]) * _coarseness(float(row.max()))
    near_tie = len(pair) == 2 and margin <= close
    return Mismatch(position=position, margin=margin, near_tie=near_tie)
