"""How many tokens a draft should propose: decoded on validation prompts, and what its acceptances and costs say.

Writes nothing; the held-out prompts of a score are never looked at.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from inference.costs import RoundCosts, interpolated
from inference.decoder import decode
from inference.graphed.decode import GraphedDecoder
from inference.lookahead import Chances, Lookahead, Measured, RecordingLookahead
from inference.lookahead.fixed import FixedLookahead
from inference.randomness import TorchSource
from inference.request import Decoded, Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import Arm, ScorePrompt, request_seed
from inference.tree_choice import WeighedTree
from inference.trees import Tree

# Later positions are seldom reached by a rejection, so that a sibling there is hardly ever worth its place.
_SIBLING_POSITIONS = 3


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
        tree: what greedy captured rounds propose in place of the chain; None for the chain.
        weighed: the chain and the trees that it was compared with, on the validation prompts; empty where none were.
        tree_when_sampled: whether sampled captured rounds propose the tree too.
        weighed_sampled: the chain and the tree when sampled, decoded on the validation prompts; empty where they were
            not compared.

    Raises:
        ValueError: `tree_when_sampled` without a tree.
    """

    tokens: int
    conditional: list[float]
    draft_seconds: float
    expected: list[float]
    block_seconds: float = 0.0
    siblings: list[int] = field(default_factory=list)
    tree: Tree | None = None
    weighed: list[WeighedTree] = field(default_factory=list)
    tree_when_sampled: bool = False
    weighed_sampled: list[WeighedTree] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.tree_when_sampled and self.tree is None:
            raise ValueError("tree_when_sampled needs a tree")

    def measured(self, passes: Mapping[int, float], chances: Chances) -> Measured:
        """What adaptive policies start from, with the target's passes by width and what signals are worth."""
        costs = RoundCosts(passes, self.block_seconds, self.draft_seconds)
        return Measured(costs, tuple(self.conditional), chances)

    def shaped_as(self, other: "BlockChoice") -> "BlockChoice":
        """The choice with all that another one proposes."""
        return replace(
            self,
            tokens=other.tokens,
            siblings=other.siblings,
            tree=other.tree,
            tree_when_sampled=other.tree_when_sampled,
        )

    @property
    def shape(self) -> str:
        """For people: the tokens of the chain, the siblings beside its positions where there are any, and the nodes of
        the tree."""
        beside = ",".join(str(count) for count in self.siblings)
        chain = f"{self.tokens}+({beside})" if beside else str(self.tokens)
        return chain if self.tree is None else f"{chain} or a tree of {self.tree.size}"

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            **asdict(self),
            "tree": None if self.tree is None else self.tree.to_json(),
            "weighed": [one.to_json() for one in self.weighed],
            "weighed_sampled": [one.to_json() for one in self.weighed_sampled],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], *, where: str) -> "BlockChoice":
        """Read what `to_json` wrote, or wrote before there were trees, or trees when sampled."""
        tree = data.get("tree")
        return cls(
            **{
                **data,
                "tree": None if tree is None else Tree.from_json(tree, where=where),
                **{
                    key: [WeighedTree.from_json(one, where=where) for one in data.get(key, [])]
                    for key in ("weighed", "weighed_sampled")
                },
            }
        )


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
    costs: RoundCosts | None = None,
) -> BlockChoice:
    """Decode validation prompts with the longest block and take what has the best expected tokens per second.

    A round that proposed n tokens would have proposed m = min(n, l) of them with a block of l. Its expected tokens are
    1 + sum_{k<=m} r_k a_k, where r_k is the share of rounds that came to position k and a_k the conditional acceptance
    there, smoothed towards its neighbour by one pseudo-count; its cost is t_block + m * t_draft + t_verify(1 + m), and
    t_verify(1) where it proposed nothing. A sibling adds the share of rounds in which it stood to the tokens, and one
    token to the pass; for every length siblings are added in the order of their shares. The two drafting costs come
    from a second pass over the prompts with blocks of one token; both are timed at the first setting only, so that like
    is compared with like. Of captured rounds all costs are given, and only acceptance is looked at.

    Args:
        arm: its lookahead is not used; captured, it decodes by captured rounds of the longest block.
        prompts: validation prompts, never held-out ones.
        longest: longest block considered.
        siblings: most siblings considered beside one token, at the first few positions.
        settings: decoded under each of these.
        max_new_tokens: per request.
        stop_tokens: end an answer.
        pass_seconds: seconds of a target pass of a given width.
        seed: of the run.
        costs: of rounds of every length up to the longest, in place of `pass_seconds` and of timing the drafting.
    """
    accepted, proposed = [0.0] * longest, [0.0] * longest
    offered = (siblings if arm.target.takes_siblings else 0,) * min(longest, _SIBLING_POSITIONS)
    beside = [[0.0] * count for count in offered]
    long, short, blocks = Drafting(), Drafting(), Counter[int]()
    for prompt in prompts:
        for setting in settings:
            lookahead = FixedLookahead(longest, siblings=offered)
            if arm.captured is None:
                result = decode_validation(arm, prompt, lookahead, setting, max_new_tokens, stop_tokens, seed)
            else:
                result = _decode_captured(arm, arm.captured, prompt, setting, max_new_tokens, stop_tokens, seed)
            blocks.update(result.blocks)
            for k, (a, p) in enumerate(zip(result.accepted, result.proposed, strict=True)):
                accepted[k] += a
                proposed[k] += p
            for k, ranks in enumerate(result.siblings):
                for rank, stood in enumerate(ranks):
                    beside[k][rank] += stood
            if costs is None and setting is settings[0]:
                long.add(result)
                if longest > 1:
                    short.add(
                        decode_validation(arm, prompt, FixedLookahead(1), setting, max_new_tokens, stop_tokens, seed)
                    )
    # A drafter may be unable to propose that much; what it never proposed is not considered.
    longest = max(blocks, default=0) or longest
    known = costs
    block_seconds, token_seconds = long.costs(short) if known is None else (known.block_seconds, known.token_seconds)
    return best_block(
        accepted[:longest],
        proposed[:longest],
        token_seconds,
        block_seconds=block_seconds,
        pass_seconds=pass_seconds if known is None else lambda width: interpolated(known.passes, width),
        blocks=blocks,
        beside=beside,
    )


class DraftedRequest(NamedTuple):
    """What one request drafted: rounds that proposed something, tokens proposed, seconds of drafting."""

    rounds: int
    tokens: int
    seconds: float


@dataclass
class Drafting:
    """Requests decoded with one block length: how often, how much and how long they drafted.

    The cost of a round is the median over requests: one that a busy machine held up does not count.

    Attributes:
        requests: those in which something was proposed.
    """

    requests: list[DraftedRequest] = field(default_factory=list)

    def add(self, result: Decoded) -> None:
        lengths = {length: rounds for length, rounds in result.blocks.items() if length}
        if lengths:
            tokens = sum(length * rounds for length, rounds in lengths.items())
            self.requests.append(DraftedRequest(sum(lengths.values()), tokens, result.seconds["draft"]))

    @property
    def mean_length(self) -> float:
        """Tokens a round."""
        return sum(r.tokens for r in self.requests) / max(1, sum(r.rounds for r in self.requests))

    @property
    def round_seconds(self) -> float:
        """Seconds of drafting a round."""
        return statistics.median(r.seconds / r.rounds for r in self.requests) if self.requests else 0.0

    def costs(self, short: "Drafting") -> tuple[float, float]:
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
        generator=TorchSource.seeded(_seed(arm, prompt, settings, seed), device=arm.target.device),
    )


def record_validation(
    arm: Arm,
    prompt: ScorePrompt,
    *,
    tokens: int,
    settings: SamplingSettings,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    seed: int,
) -> RecordingLookahead:
    """One validation prompt in whole blocks of so many tokens, with what was known of each and became of it; captured
    arms are decoded by captured rounds."""
    recording = RecordingLookahead(tokens)
    if arm.captured is None:
        decode_validation(arm, prompt, recording, settings, max_new_tokens, stop_tokens, seed)
    else:
        decoder = arm.captured.of_block(min(tokens, arm.captured.rounds.block))
        _decode_captured(arm, decoder, prompt, settings, max_new_tokens, stop_tokens, seed, recording)
    return recording


def _decode_captured(
    arm: Arm,
    decoder: GraphedDecoder,
    prompt: ScorePrompt,
    settings: SamplingSettings,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    seed: int,
    recording: RecordingLookahead | None = None,
) -> Decoded:
    request = Request(settings=settings, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
    return decoder.decode(prompt.tokens, request=request, seed=_seed(arm, prompt, settings, seed), recording=recording)


def _seed(arm: Arm, prompt: ScorePrompt, settings: SamplingSettings, seed: int) -> int:
    return request_seed(seed, prompt.id, settings.temperature, arm.name, "block")


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
