"""Arms on the same prompts in one run: decode a prompt under every arm, in shuffled order, and keep the records.

Also chooses block lengths, on other prompts than are scored. Writes nothing.
"""

import hashlib
import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from inference.costs import RoundCosts
from inference.decoder import Decoded, Request, decode
from inference.drafters import Drafter
from inference.lookahead import Chances, Lookahead, Measured
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.randomness import TorchSource
from inference.records import Mismatch, Record, record_of
from inference.sampling import SamplingSettings
from inference.statistics import BASELINE

# Later positions are seldom reached by a rejection, so that a sibling there is hardly ever worth its place.
_SIBLING_POSITIONS = 3
# A greedy mismatch counts as rounding when both tokens are this close to the best logit, in the units of the logits.
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
    """

    name: str
    target: CausalModel
    drafter: Drafter
    lookahead: Lookahead


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
        decoded[arm.name] = decode(
            arm.target,
            arm.drafter,
            prompt.tokens,
            request=request,
            lookahead=arm.lookahead,
            generator=TorchSource.seeded(
                request_seed(seed, prompt.id, settings.temperature, arm.name), device=arm.target.device
            ),
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
            draft_bytes=arm.drafter.nbytes(),
            target_bytes=arm.target.nbytes(),
            mismatch=explain_mismatch(
                arm.target, prompt.tokens, decoded[arm.name].tokens, reference, reference_precision=reference_precision
            )
            if settings.greedy
            else None,
        )
        for index, arm in enumerate(arms)
    ]


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
    near_tie = len(pair) == 2 and margin <= max(NEAR_TIE[target.precision], NEAR_TIE[reference_precision])
    return Mismatch(position=position, margin=margin, near_tie=near_tie)


@dataclass(frozen=True)
class BlockChoice:
    """The block length chosen for one draft.

    Attributes:
        tokens: proposed tokens a round, in the chain.
        conditional: acceptance by position seen on the validation prompts, smoothed.
        draft_seconds: seconds to propose one token.
        expected: expected speedup by block length, from 1.
        block_seconds: seconds a round besides, whatever its length: what a block drafter spends in one pass.
        siblings: tokens offered beside the one at each position.
    """

    tokens: int
    conditional: list[float]
    draft_seconds: float
    expected: list[float]
    block_seconds: float = 0.0
    siblings: list[int] = field(default_factory=list)

    def measured(self, passes: Mapping[int, float], chances: Chances) -> Measured:
        """What adaptive policies start from, with the target's passes by width and what signals are worth."""
        costs = RoundCosts(passes, self.block_seconds, self.draft_seconds)
        return Measured(costs, tuple(self.conditional), chances)

    @property
    def shape(self) -> str:
        """For people: the tokens of the chain, and the siblings beside its positions where there are any."""
        beside = ",".join(str(count) for count in self.siblings)
        return f"{self.tokens}+({beside})" if beside else str(self.tokens)


def choose_block(
    arm: Arm,
    prompts: list[ScorePrompt],
    *,
    longest: int,
    siblings: int = 0,
    settings: list[SamplingSettings],
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    pass_seconds: Callable[[int], float],
    seed: int,
) -> BlockChoice:
    """Decode validation prompts with the longest block and take what has the best expected tokens per second.

    A round that proposed n tokens would have proposed m = min(n, l) of them with a block of l. Its expected tokens are
    1 + sum_{k<=m} r_k a_k, where r_k is the share of rounds that came to position k and a_k the conditional acceptance
    there, smoothed towards its neighbour by one pseudo-count; its cost is t_block + m * t_draft + t_verify(1 + m), and
    t_verify(1) where it proposed nothing. A sibling adds the share of rounds in which it stood to the tokens, and one
    token to the pass; for every length siblings are added in the order of their shares. The two drafting costs come
    from a second pass over the prompts with blocks of one token; both are timed at the first setting only, so that like
    is compared with like.

    Args:
        arm: its lookahead is not used.
        prompts: validation prompts, never held-out ones.
        longest: longest block considered.
        siblings: most siblings considered beside one token, at the first few positions.
        settings: decoded under each of these.
        max_new_tokens: per request.
        stop_tokens: end an answer.
        pass_seconds: seconds of a target pass of a given width.
        seed: of the run.
    """
    accepted, proposed = [0.0] * longest, [0.0] * longest
    offered = (siblings if arm.target.takes_siblings else 0,) * min(longest, _SIBLING_POSITIONS)
    beside = [[0.0] * count for count in offered]
    long, short, blocks = _Drafting(), _Drafting(), Counter[int]()
    for prompt in prompts:
        for setting in settings:
            lookahead = FixedLookahead(longest, siblings=offered)
            result = decode_validation(arm, prompt, lookahead, setting, max_new_tokens, stop_tokens, seed)
            blocks.update(result.blocks)
            for k, (a, p) in enumerate(zip(result.accepted, result.proposed, strict=True)):
                accepted[k] += a
                proposed[k] += p
            for k, ranks in enumerate(result.siblings):
                for rank, stood in enumerate(ranks):
                    beside[k][rank] += stood
            if setting is settings[0]:
                long.add(result)
                if longest > 1:
                    short.add(
                        decode_validation(arm, prompt, FixedLookahead(1), setting, max_new_tokens, stop_tokens, seed)
                    )
    # A drafter may be unable to propose that much; what it never proposed is not considered.
    longest = max(blocks, default=0) or longest
    block_seconds, token_seconds = long.costs(short)
    return best_block(
        accepted[:longest],
        proposed[:longest],
        token_seconds,
        block_seconds=block_seconds,
        pass_seconds=pass_seconds,
        blocks=blocks,
        beside=beside,
    )


class _DraftedRequest(NamedTuple):
    """What one request drafted: rounds that proposed something, tokens proposed, seconds of drafting."""

    rounds: int
    tokens: int
    seconds: float


@dataclass
class _Drafting:
    """Requests decoded with one block length: how often, how much and how long they drafted.

    The cost of a round is the median over requests: one that a busy machine held up does not count.

    Attributes:
        requests: those in which something was proposed.
    """

    requests: list[_DraftedRequest] = field(default_factory=list)

    def add(self, result: Decoded) -> None:
        lengths = {length: rounds for length, rounds in result.blocks.items() if length}
        if lengths:
            tokens = sum(length * rounds for length, rounds in lengths.items())
            self.requests.append(_DraftedRequest(sum(lengths.values()), tokens, result.seconds["draft"]))

    @property
    def mean_length(self) -> float:
        """Tokens a round."""
        return sum(r.tokens for r in self.requests) / max(1, sum(r.rounds for r in self.requests))

    @property
    def round_seconds(self) -> float:
        """Seconds of drafting a round."""
        return statistics.median(r.seconds / r.rounds for r in self.requests) if self.requests else 0.0

    def costs(self, short: "_Drafting") -> tuple[float, float]:
        """Seconds a round and seconds a token besides, from rounds of two lengths (a line through two points)."""
        length, here = self.mean_length, self.round_seconds
        if not short.requests or length <= 1.0:
            return 0.0, here / max(length, 1.0)
        slope = min(max(0.0, (here - short.round_seconds) / (length - 1.0)), here / length)
        return here - slope * length, slope


def decode_validation(
    arm: Arm,
    prompt: ScorePrompt,
    lookahead: Lookahead,
    settings: SamplingSettings,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    seed: int,
) -> Decoded:
    """One validation prompt under a policy."""
    return decode(
        arm.target,
        arm.drafter,
        prompt.tokens,
        request=Request(settings=settings, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens),
        lookahead=lookahead,
        generator=TorchSource.seeded(
            request_seed(seed, prompt.id, settings.temperature, arm.name, "block"), device=arm.target.device
        ),
    )


def best_block(
    accepted: list[float],
    proposed: list[float],
    draft_seconds: float,
    *,
    pass_seconds: Callable[[int], float],
    block_seconds: float = 0.0,
    blocks: Mapping[int, int] | None = None,
    beside: Sequence[Sequence[float]] = (),
) -> BlockChoice:
    """The arithmetic of `choose_block`, from counts by position, seconds per proposed token and per round.

    Args:
        accepted: tokens that stood, by position.
        proposed: tokens that were verified, by position: all before them had stood.
        draft_seconds: to propose one token.
        pass_seconds: seconds of a target pass of a given width.
        block_seconds: seconds a round that proposes, besides.
        blocks: rounds by tokens proposed; None for rounds that all proposed as many as they might.
        beside: rounds in which a sibling stood, by position and rank; those that were offered.
    """
    rounds = sum(blocks.values()) if blocks else 0
    counted = {len(accepted): 1} if blocks is None or not rounds else blocks
    total = max(1, sum(counted.values()))
    conditional: list[float] = []
    neighbour = 0.5
    for a, p in zip(accepted, proposed, strict=True):
        neighbour = (a + neighbour) / (p + 1.0)
        conditional.append(neighbour)
    shares = [(stood / total, slot) for slot, ranks in enumerate(beside) for stood in ranks if stood > 0]
    shares.sort(key=lambda share: (-share[0], share[1]))

    def seconds(length: int, siblings: list[int]) -> float:
        drafting = {n: block_seconds + min(n, length) * draft_seconds if n else 0.0 for n in counted}
        widths = {n: 1 + min(n, length) + sum(siblings[:n]) for n in counted}
        return sum(count * (drafting[n] + pass_seconds(widths[n])) for n, count in counted.items()) / total

    expected: list[float] = []
    chosen: list[list[int]] = []
    survival, tokens = 1.0, 1.0
    for length, chance in enumerate(conditional, start=1):
        survival = chance * (proposed[length - 1] / rounds if rounds else survival)
        tokens += survival
        within = [share for share in shares if share[1] < length]
        options: list[tuple[float, list[int]]] = []
        for number in range(len(within) + 1):
            siblings = [sum(slot == own for _, own in within[:number]) for slot in range(length)]
            written = tokens + sum(share for share, _ in within[:number])
            options.append((written * pass_seconds(1) / seconds(length, siblings), siblings))
        best = max(options, key=lambda option: option[0])
        expected.append(best[0])
        chosen.append(best[1])
    index = max(range(len(expected)), key=lambda i: expected[i])
    siblings = chosen[index]
    while siblings and not siblings[-1]:
        siblings.pop()
    return BlockChoice(index + 1, conditional, draft_seconds, expected, block_seconds, siblings)
