"""Rounds captured as graphs on a GPU: a feature draft against target-only decoding captured with the same care.

Both arms replay one graph a round and look once, at what it emitted. Every block length is an arm of its own, and so is
every tree, greedy and sampled; trees are chosen on training questions by greedy answers. The goal is held against the
mean over domains of the arm that is fastest by these questions, or of the last arm where there is no tree.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from inference.drafters.feature import FeatureDrafter
from inference.drafters.none import NoDrafter
from inference.feature_networks import FeatureNetwork
from inference.feature_networks._checkpoint import load_network
from inference.graphed.arms import capacity_for
from inference.graphed.decode import GraphedDecoder
from inference.graphed.rounds import Rounds
from inference.graphed.timing import round_seconds, steady_round
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.records import Record
from inference.scoring import Arm, ScorePrompt
from inference.statistics import BASELINE, Estimate, find_card, mean_speedup, scorecards
from inference.target import stop_tokens
from inference.tree_choice import continuations
from inference.trees import Tree
from pipelines.bench.bench import Bench
from pipelines.bench.decoding import answers_figure
from pipelines.bench.outcome import Figure, Goal, Outcome
from pipelines.progress import tracked

GOAL = Goal(3.0)
_CONTEXT_TOKENS = 128  # behind which a round is timed


@dataclass(kw_only=True)
class Config:
    """What is decoded.

    Attributes:
        kind: this row.
        temperatures: 0 is greedy.
        blocks: tokens proposed a round, an arm each; 0 for the draft's own length.
        trees: drafted tokens of a tree, an arm each.
        tree_depth: most drafted tokens of a path of it.
        tree_lookup: tokens that it copies from the text beside them; 0 for none.
        tree_prompts: training questions whose answers choose the trees.
        capacity: positions of a request; 0 for as many as the prompts want.
        compiled: fuse kernels before they are captured; a minute for each arm and temperature.
        profile: kernels listed of a round, by the time they take; 0 for none.
        uncaptured: run on a CPU too, where nothing is captured: for tests.
        optional_lists: settings that may be empty, but not both of them.
    """

    kind: str = "captured"
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    blocks: list[int] = field(default_factory=lambda: [2, 3, 0])
    trees: list[int] = field(default_factory=lambda: [32, 64, 128])
    tree_depth: int = 6
    tree_lookup: int = 16
    tree_prompts: int = 48
    capacity: int = 0
    compiled: bool = False
    profile: int = 3
    uncaptured: bool = False
    optional_lists: ClassVar[tuple[str, ...]] = ("blocks", "trees")

    def __post_init__(self) -> None:
        if not self.blocks and not self.trees:
            raise ValueError("captured needs blocks or trees")
        if min([self.tree_depth, *self.trees]) < 1 or self.tree_lookup < 0:
            raise ValueError("captured needs trees and tree_depth of at least 1, and tree_lookup of 0 or more")

    def run(self, bench: Bench) -> Outcome:
        """Measure; on a CPU nothing is.

        Raises:
            InputError: a draft that reads no features.
        """
        if bench.device.type != "cuda" and not self.uncaptured:
            return Outcome([], notes=["not run: captured rounds are for a GPU"])
        target = bench.target(bench.block_precision)
        network = load_network(bench.options.draft or bench.draft_folder, target, precision=target.precision)
        lengths = sorted({min(length or network.block, network.block) for length in self.blocks})
        prompts, questions = bench.prompts(), self._questions(bench)
        longest_prompt = max(prompt.tokens.shape[0] for prompt in [*prompts, *questions])
        longest = longest_prompt + bench.options.max_new_tokens
        most = max([network.block, *(size + self.tree_lookup for size in self.trees)])
        capacity = self.capacity or capacity_for(target, longest, block=most)

        arm_of = functools.partial(self._arm, target, network, capacity)
        arms = [arm_of(BASELINE, 0), *(arm_of(f"draft-{length}", length) for length in lengths)]
        notes = [f"in {target.precision}, {'compiled and ' if self.compiled else ''}captured"]
        taus = {}
        for tree, expected in self._trees(bench, questions, arms[0], network):
            arms.append(arm_of(f"tree-{tree.size}", 0, tree))
            taus[arms[-1].name] = expected
            notes.append(
                f"{arms[-1].name}: {tree.drafted_depth} levels and {tree.lookup} tokens copied, tau {expected:.2f} on "
                "training questions"
            )
        records = self._records(bench, arms, prompts, longest_prompt)
        rounds = {arm.name: self._round_seconds(arm) for arm in arms}
        fastest = max(taus, key=lambda name: taus[name] / rounds[name][0]["whole"], default=arms[-1].name)
        figures = self._speedups(records, arms, fastest, seed=bench.options.seed)
        notes += self._mismatches(records)
        for name, (seconds, kernels) in rounds.items():
            figures += [_milliseconds(f"{name}: {part} of a round", value) for part, value in seconds.items()]
            notes.append(f"{name}: {kernels}")
        peak = torch.cuda.max_memory_allocated() / 2**20
        figures.append(Figure("peak memory of the device", Estimate(peak, None, None), unit="MiB"))
        return Outcome(figures, records, notes)

    def _arm(
        self,
        target: CausalModel,
        network: FeatureNetwork,
        capacity: int,
        name: str,
        block: int,
        tree: Tree | None = None,
    ) -> Arm:
        """Captured; the draft's own drafter gives its name and bytes."""
        own = network if block or tree else None
        rounds = Rounds(
            target, own, block=block, capacity=capacity, compiled=self.compiled, tree=tree, tree_when_sampled=True
        )
        drafter = NoDrafter() if own is None else FeatureDrafter(own)
        return Arm(name, target, drafter, FixedLookahead(block), GraphedDecoder(rounds))

    def _records(self, bench: Bench, arms: list[Arm], prompts: list[ScorePrompt], longest_prompt: int) -> list[Record]:
        """Of every arm on every prompt, after all is captured that they may come to."""
        for temperature in self.temperatures:
            for arm in arms:
                assert arm.captured is not None, "all arms are captured"
                arm.captured.prepare(longest_prompt=longest_prompt, sampled=[temperature > 0.0])
        for prompt in prompts[:2]:
            bench.scored(arms, prompt, self.temperatures)
        return [
            record
            for prompt in tracked(prompts, self.kind, unit="prompts")
            for record in bench.scored(arms, prompt, self.temperatures)
        ]

    def _questions(self, bench: Bench) -> list[ScorePrompt]:
        """What trees are chosen on; none where no tree is wanted."""
        return bench.training_prompts(self.tree_prompts) if self.trees else []

    def _trees(
        self, bench: Bench, questions: list[ScorePrompt], baseline: Arm, network: FeatureNetwork
    ) -> list[tuple[Tree, float]]:
        """The trees, and the tau each has on the questions that it was chosen on."""
        if not questions:
            return []
        assert baseline.captured is not None, "all arms are captured"
        depth = min(self.tree_depth, network.deepest)
        known = continuations(
            baseline.captured,
            FeatureDrafter(network),
            questions,
            depth=depth,
            lookup=self.tree_lookup,
            max_new_tokens=bench.options.max_new_tokens,
            stop_tokens=stop_tokens(baseline.target),
        )
        trees = [known.best(size, depth=depth, lookup=self.tree_lookup) for size in sorted(self.trees)]
        return [(tree, known.tau(tree)) for tree in dict.fromkeys(trees)]

    def _speedups(self, records: list[Record], arms: list[Arm], fastest: str, *, seed: int) -> list[Figure]:
        """Of every block length and tree at every temperature, over all prompts, and as the mean over domains with what
        it was in each; and the greedy answers."""
        cards = scorecards(records, seed=seed)
        domains = sorted({record.domain for record in records})
        figures = []
        for arm, temperature in itertools.product(arms[1:], self.temperatures):
            card = find_card(cards, arm.name, temperature=temperature)
            apart = {d: find_card(cards, arm.name, domain=d, temperature=temperature) for d in domains}
            name = f"{arm.name} over target-only, T={temperature:g}"
            detail = {"tau": str(card.tau), "tokens_per_s": str(card.tokens_per_s)}
            figures.append(Figure(name, card.speedup, detail=detail))
            mean = mean_speedup(records, arm.name, temperature=temperature, seed=seed)
            goal = GOAL if arm.name == fastest and temperature == 0.0 else None
            by_domain = {d: f"speedup {own.speedup}, tau {own.tau}" for d, own in apart.items()}
            figures.append(Figure(f"{name}, mean of the domains", mean, goal=goal, detail=by_domain))
        mismatches = [record.mismatch for record in records if record.mismatch is not None]
        near = sum(mismatch.near_tie for mismatch in mismatches)
        greedy = sum(record.temperature == 0.0 and record.arm != BASELINE for record in records)
        counts = {"same": greedy - len(mismatches), "near_ties": near, "unexplained": len(mismatches) - near}
        return [*figures, answers_figure("greedy answers unlike target-only's", counts)]

    @staticmethod
    def _mismatches(records: list[Record]) -> list[str]:
        """Where greedy answers left target-only's, in words: how close the tokens were, and what closeness does not
        explain."""
        left = [(record, record.mismatch) for record in records if record.mismatch is not None]
        if not left:
            return []
        ties = [mismatch.margin for _, mismatch in left if mismatch.near_tie]
        widest = f"near-ties are {max(ties):.3f} apart at most" if ties else "no near-ties"
        others = [
            f"{record.arm} left target-only's answer to {record.prompt_id} at token {mismatch.position}, where the two "
            f"are {mismatch.margin:.3f} apart"
            for record, mismatch in left
            if not mismatch.near_tie
        ]
        return [widest, *others]

    def _round_seconds(self, arm: Arm) -> tuple[dict[str, float], str]:
        """Seconds of a greedy round and of its parts, captured apart, and its longest kernels in words."""
        assert arm.captured is not None, "all arms are captured"
        rounds = arm.captured.rounds
        context_tokens = min(_CONTEXT_TOKENS, rounds.capacity // 2)
        by_part = bool(rounds.width) and not self.compiled
        timed = round_seconds(rounds, length=context_tokens, sampled=False, by_part=by_part)
        seconds = {"whole": timed.whole}
        if by_part:
            rest = timed.whole - timed.draft - timed.verify
            seconds |= {"draft": timed.draft, "verify": timed.verify, "rest": rest}
        whole = steady_round(rounds, length=context_tokens, sampled=False)
        return seconds, _kernels(whole, self.profile) if self.profile else "no profile"


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
