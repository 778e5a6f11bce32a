"""Rounds captured as graphs on a GPU: a feature draft against target-only decoding captured with the same care.

Both arms replay one graph a round and look once, at what it emitted. Every block length up to the draft's own is an
arm of its own, so that the table shows which pays; the goal is held against the draft's own length.
"""

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from inference.drafters.feature import FeatureDrafter
from inference.drafters.none import NoDrafter
from inference.feature_networks import FeatureNetwork
from inference.feature_networks._checkpoint import load_network
from inference.graphed.decode import GraphedDecoder
from inference.graphed.rounds import Rounds
from inference.graphed.timing import round_seconds, steady_round
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.records import Record
from inference.scoring import Arm
from inference.statistics import BASELINE, Estimate, find_card, scorecards
from pipelines.bench.bench import Bench
from pipelines.bench.decoding import answers_figure
from pipelines.bench.outcome import Figure, Goal, Outcome
from pipelines.progress import tracked

GOAL = Goal(3.0)


@dataclass(kw_only=True)
class Config:
    """What is decoded.

    Attributes:
        kind: this row.
        temperatures: 0 is greedy.
        blocks: tokens proposed a round, an arm each; 0 for the draft's own length.
        capacity: positions of a request.
        compiled: fuse kernels before they are captured; a minute for each arm and temperature.
        profile: kernels listed of a round, by the time they take; 0 for none.
    """

    kind: str = "captured"
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    blocks: list[int] = field(default_factory=lambda: [2, 3, 0])
    capacity: int = 512
    compiled: bool = False
    profile: int = 3

    def run(self, bench: Bench) -> Outcome:
        """Measure; on a CPU nothing is.

        Raises:
            InputError: a draft that reads no features.
        """
        if bench.device.type != "cuda":
            return Outcome([], notes=["not run: captured rounds are for a GPU"])
        target = bench.target(bench.block_precision)
        network = load_network(bench.options.draft or bench.draft_folder, target, precision=target.precision)
        lengths = sorted({min(length or network.block, network.block) for length in self.blocks})
        arms = [_arm(BASELINE, target, None, self, 0)]
        arms += [_arm(f"draft-{length}", target, network, self, length) for length in lengths]
        prompts = bench.prompts()
        for arm, temperature in itertools.product(arms, self.temperatures):
            assert arm.captured is not None, "all arms are captured"
            arm.captured.rounds.prepare(sampled=temperature > 0.0)
        for prompt in prompts[:2]:
            bench.scored(arms, prompt, self.temperatures)
        records = [
            record
            for prompt in tracked(prompts, self.kind, unit="prompts")
            for record in bench.scored(arms, prompt, self.temperatures)
        ]
        figures = self._speedups(records, arms, seed=bench.options.seed)
        notes = [f"in {target.precision}, {'compiled and ' if self.compiled else ''}captured"]
        for arm in arms:
            seconds, kernels = self._round_seconds(arm)
            figures += [_milliseconds(f"{arm.name}: {part} of a round", value) for part, value in seconds.items()]
            notes.append(f"{arm.name}: {kernels}")
        peak = torch.cuda.max_memory_allocated() / 2**20
        figures.append(Figure("peak memory of the device", Estimate(peak, None, None), unit="MiB"))
        return Outcome(figures, records, notes)

    def _speedups(self, records: list[Record], arms: list[Arm], *, seed: int) -> list[Figure]:
        """Of every block length at every temperature, with what they were by domain; and the greedy answers."""
        cards = scorecards(records, seed=seed)
        domains = sorted({record.domain for record in records})
        figures = []
        for arm, temperature in itertools.product(arms[1:], self.temperatures):
            card = find_card(cards, arm.name, temperature=temperature)
            apart = {d: find_card(cards, arm.name, domain=d, temperature=temperature) for d in domains}
            detail = {
                "macro over domains": statistics.fmean(own.speedup.value for own in apart.values()),
                "tau": str(card.tau),
                "tokens_per_s": str(card.tokens_per_s),
                **{d: f"speedup {own.speedup}, tau {own.tau}" for d, own in apart.items()},
            }
            goal = GOAL if arm is arms[-1] and temperature == 0.0 else None
            name = f"{arm.name} over target-only, T={temperature:g}"
            figures.append(Figure(name, card.speedup, goal=goal, detail=detail))
        mismatches = [record.mismatch for record in records if record.mismatch is not None]
        near = sum(mismatch.near_tie for mismatch in mismatches)
        greedy = sum(record.temperature == 0.0 and record.arm != BASELINE for record in records)
        counts = {"same": greedy - len(mismatches), "near_ties": near, "unexplained": len(mismatches) - near}
        return [*figures, answers_figure("greedy answers unlike target-only's", counts)]

    def _round_seconds(self, arm: Arm) -> tuple[dict[str, float], str]:
        """Seconds of a greedy round and of its parts, captured apart, and its longest kernels in words."""
        assert arm.captured is not None, "all arms are captured"
        rounds = arm.captured.rounds
        context_tokens = self.capacity // 4
        by_part = bool(rounds.block) and not self.compiled
        timed = round_seconds(rounds, length=context_tokens, sampled=False, by_part=by_part)
        seconds = {"whole": timed.whole}
        if by_part:
            rest = timed.whole - timed.draft - timed.verify
            seconds |= {"draft": timed.draft, "verify": timed.verify, "rest": rest}
        whole = steady_round(rounds, length=context_tokens, sampled=False)
        return seconds, _kernels(whole, self.profile) if self.profile else "no profile"


def _arm(name: str, target: CausalModel, network: FeatureNetwork | None, config: Config, block: int) -> Arm:
    """A captured arm; the draft's own drafter gives its name and bytes."""
    rounds = Rounds(target, network, block=block, capacity=config.capacity, compiled=config.compiled)
    drafter = NoDrafter() if network is None else FeatureDrafter(network)
    return Arm(name, target, drafter, FixedLookahead(block), GraphedDecoder(rounds))


def _kernels(work: Callable[[], None], count: int) -> str:
    """The kernels a round spends most on, with their share of all kernels' time."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(5):
            work()
        torch.cuda.synchronize()
    events: list[Any] = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) or 1.0
    named = [
        f"{event.key[:60]} {event.self_device_time_total / total:.0%} ({event.count // 5} a round)"
        for event in events[:count]
    ]
    launched = sum(event.count for event in events) // 5
    return f"{launched} kernels, {total / 5e3:.2f} ms a round; " + ", ".join(named)


def _milliseconds(name: str, seconds: float) -> Figure:
    return Figure(name, Estimate(1e3 * seconds, None, None), unit="ms")
