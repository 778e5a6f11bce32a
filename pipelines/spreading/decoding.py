"""A spread target against a whole one: single requests with what goes to talking, and loads on the batch engine."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from inference.batch.engine import BatchEngine
from inference.batch.load import Asked
from inference.decoder import decode
from inference.drafters import Drafter
from inference.drafters.lookup import LookupDrafter
from inference.drafters.none import NoDrafter
from inference.driving import closed_loop
from inference.lookahead import Lookahead
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.model import CausalModel
from inference.processes import Group
from inference.randomness import TorchSource
from inference.request import Decoded, Request
from inference.sampling_settings import SamplingSettings
from pipelines.bench.paired import Sample, device_clock, interleaved, median_seconds, speed, speed_ratio
from pipelines.spreading.talk import Collectives, announcements, collective_seconds

NONE, LOOKUP = "target-only", "look-up"
ONE, ALL = "one process", "spread"


@dataclass(frozen=True, kw_only=True)
class Both:
    """The same target twice.

    Attributes:
        whole: on the first process.
        spread: over all of them.
        block: tokens that look-up proposes at most.
    """

    whole: CausalModel
    spread: CausalModel
    block: int

    def arms(self) -> dict[str, tuple[CausalModel, Callable[[], Drafter], Lookahead]]:
        """Every way to decode, by name."""
        drafts: dict[str, tuple[Callable[[], Drafter], Lookahead]] = {
            NONE: (NoDrafter, FixedLookahead(0)),
            LOOKUP: (lambda: LookupDrafter(LookupSettings()), FixedLookahead(self.block)),
        }
        targets = {ONE: self.whole, ALL: self.spread}
        return {
            f"{where}, {name}": (target, *draft) for where, target in targets.items() for name, draft in drafts.items()
        }


def measure_passes(
    both: Both, group: Group, prompts: Sequence[torch.Tensor], *, tokens: int, rounds: int, seed: int
) -> dict[str, Any]:
    """Single requests, greedy, every prompt in every round by every arm.

    Args:
        both: the targets.
        group: the processes.
        prompts: int64 `[T]` each.
        tokens: of each answer.
        rounds: how often; the first prompt warms up.
        seed: of the orders.

    Returns:
        Requests whose tokens are the whole target's own, seconds a round, speed ratios, and the talking of a round.
    """
    request, arms, found = _request(tokens), both.arms(), dict[tuple[str, str], Decoded]()

    def run(arm: str) -> Callable[[tuple[str, torch.Tensor]], float]:
        def decoded(unit: tuple[str, torch.Tensor]) -> float:
            found[unit[0], arm] = _decoded(arms[arm], unit[1], request)
            return len(found[unit[0], arm].tokens)

        return decoded

    units = {f"{number}/{index}": prompt for number in range(rounds) for index, prompt in enumerate(prompts)}
    samples = interleaved(
        {name: (name, prompt) for name, prompt in units.items()},
        {arm: run(arm) for arm in arms},
        title="passes",
        unit="requests",
        seed=seed,
        clock=device_clock(both.whole.device),
    )
    a_round = [
        Sample(unit, arm, 0, 1.0, (one.total_seconds - one.seconds["prefill"]) / one.passes)
        for (unit, arm), one in found.items()
    ]
    reference = f"{ONE}, {NONE}"
    return {
        "requests": len(prompts),
        "same_tokens": {
            arm: sum(found[f"0/{i}", arm].tokens == found[f"0/{i}", reference].tokens for i in range(len(prompts)))
            for arm in arms
        },
        "agreeing_tokens": {
            arm: sum(
                _agreeing(found[f"0/{i}", arm].tokens, found[f"0/{i}", reference].tokens) for i in range(len(prompts))
            )
            / len(prompts)
            for arm in arms
        },
        "tau": {
            arm: sum(len(one.tokens) for (_, own), one in found.items() if own == arm)
            / sum(one.passes for (_, own), one in found.items() if own == arm)
            for arm in arms
        },
        "round_seconds": {arm: asdict(median_seconds(a_round, arm)) for arm in arms},
        "tokens_per_s": {arm: asdict(speed(samples, arm)) for arm in arms},
        **_ratios(samples),
        "talk": {name: _talk(group, arms[f"{ALL}, {name}"], prompts[0], request) for name in (NONE, LOOKUP)},
    }


def measure_batch(
    both: Both, prompts: Sequence[torch.Tensor], *, loads: Sequence[int], tokens: int, rounds: int, seed: int
) -> dict[str, Any]:
    """The batch engine with so many requests running, greedy, in a closed loop over twice as many.

    Args:
        both: the targets.
        prompts: int64 `[T]` each, taken in turns.
        loads: numbers of requests.
        tokens: of each answer.
        rounds: how often, after one that warms up.
        seed: of the orders.

    Returns:
        By load: requests whose tokens are those of the whole target decoding alone, tokens/s, and ratios.
    """
    request, arms = _request(tokens), both.arms()
    alone = [_decoded(arms[f"{ONE}, {NONE}"], prompt, request).tokens for prompt in prompts]
    results: dict[str, Any] = {}
    for load in loads:
        asked = [_asked(number, prompts, request) for number in range(2 * load)]
        answers: dict[str, list[list[int]]] = {}

        def run(arm: str, load: int, asked: list[Asked], answers: dict[str, list[list[int]]]) -> Callable[[int], float]:
            def served(_: int) -> float:
                target, make, lookahead = arms[arm]
                engine = BatchEngine(target, make, lookahead, max_requests=load)
                trace, answers[arm] = closed_loop(engine, asked, concurrency=load)
                return sum(one.tokens for one in trace.served)

            return served

        samples = interleaved(
            {str(number): number for number in range(rounds)},
            {arm: run(arm, load, asked, answers) for arm in arms},
            title=f"batch engine, {load} requests",
            unit="rounds",
            seed=seed,
            clock=device_clock(both.whole.device),
        )
        results[str(load)] = {
            "requests": len(asked),
            "same_tokens": {
                arm: sum(row == alone[number % len(prompts)] for number, row in enumerate(rows))
                for arm, rows in answers.items()
            },
            "tokens_per_s": {arm: asdict(speed(samples, arm)) for arm in arms},
            **_ratios(samples),
        }
    return results


def _ratios(samples: Sequence[Sample]) -> dict[str, Any]:
    """What spreading gives, and what the draft gives, in tokens/s."""
    return {
        "spread_over_one": {n: asdict(speed_ratio(samples, f"{ALL}, {n}", f"{ONE}, {n}")) for n in (NONE, LOOKUP)},
        "draft_over_none": {
            where: asdict(speed_ratio(samples, f"{where}, {LOOKUP}", f"{where}, {NONE}")) for where in (ONE, ALL)
        },
    }


def _agreeing(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    same = zip(tokens, others, strict=False)
    return next((i for i, (one, other) in enumerate(same) if one != other), min(len(tokens), len(others)))


def _request(tokens: int) -> Request:
    """Greedy and of one length: random weights have no end."""
    return Request(settings=SamplingSettings(), max_new_tokens=tokens)


def _asked(number: int, prompts: Sequence[torch.Tensor], request: Request) -> Asked:
    prompt = prompts[number % len(prompts)]
    return Asked(prompt_id=str(number), domain="any", prompt=prompt, request=request, seed=number)


def _decoded(
    arm: tuple[CausalModel, Callable[[], Drafter], Lookahead], prompt: torch.Tensor, request: Request
) -> Decoded:
    target, make, lookahead = arm
    generator = TorchSource.seeded(0, device=target.device)
    return decode(target, make(), prompt, request=request, lookahead=lookahead, generator=generator)


def _talk(
    group: Group,
    arm: tuple[CausalModel, Callable[[], Drafter], Lookahead],
    prompt: torch.Tensor,
    request: Request,
) -> dict[str, float]:
    """What one round costs in talking, over one request, its prefill counted in."""
    with announcements(group) as announced:
        rounds = _decoded(arm, prompt, request).passes
    with Collectives() as collectives:
        _decoded(arm, prompt, request)
    seconds = collective_seconds(lambda: _decoded(arm, prompt, request))
    return {
        "announcements": announced.count / rounds,
        "announce_seconds": announced.seconds / rounds,
        "announced_bytes": announced.nbytes / rounds,
        "collectives": collectives.count / rounds,
        "collective_seconds": seconds / rounds,
        "collective_bytes": collectives.nbytes / rounds,
    }
