"""What the decoder itself costs: measured speedup over the one expected from its parts, for a pair or the seed draft.

Expected is tau times the seconds of a target-only pass over those of a round, all measured in the same run, prompts
left out. The measured one has the prompts' passes in it, under both arms alike, so answers should be long enough to
outweigh them. What a round spends outside the passes of draft and target is shown besides.
"""

from dataclasses import dataclass, field

from inference.drafters import Drafter, LoadContext, load_drafter
from inference.drafters.lookup import LookupDrafter
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.graphed.asked import CAPTURED_OFF
from inference.lookahead import Lookahead
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.model import CausalModel
from inference.pair import load_pair
from inference.records import Record
from inference.scoring import Arm
from inference.statistics import BASELINE, Bootstrap, find_card, ratio, scorecards
from pipelines.bench.bench import Bench
from pipelines.bench.outcome import Figure, Goal, Outcome
from pipelines.bench.paired import RESAMPLES
from pipelines.progress import tracked

GOAL = Goal(0.95)
_DRAFT = "draft"


@dataclass(kw_only=True)
class Config:
    """What is decoded.

    Attributes:
        kind: this row.
        tokens: proposed a round where no pair says it.
        temperatures: 0 is greedy.
    """

    kind: str = "overhead"
    tokens: int = 2
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])

    def run(self, bench: Bench) -> Outcome:
        """Measure."""
        target, drafter, lookahead, note = self._loaded(bench)
        same = bench.baseline_precision == target.precision
        baseline = target if same else bench.target(bench.baseline_precision)
        arms = [Arm(BASELINE, baseline, NoDrafter(), FixedLookahead(0)), Arm(_DRAFT, target, drafter, lookahead)]
        prompts = bench.prompts()
        bench.scored(arms, prompts[0], self.temperatures)
        records = [
            record
            for prompt in tracked(prompts, self.kind, unit="prompts")
            for record in bench.scored(arms, prompt, self.temperatures)
        ]
        cards = scorecards(records, seed=bench.options.seed)
        figures = []
        for temperature in [None, *self.temperatures]:
            card = find_card(cards, _DRAFT, temperature=temperature)
            label = "all temperatures" if temperature is None else f"T={temperature:g}"
            detail = {
                "speedup": str(card.speedup),
                "expected": str(card.expected_speedup),
                "tau": str(card.tau),
                "ms_per_round": {part: 1e3 * seconds for part, seconds in card.seconds.items()},
            }
            goal = GOAL if temperature is None else None
            figures.append(
                Figure(f"measured over expected speedup, {label}", card.efficiency, goal=goal, detail=detail)
            )
        mine = [record for record in records if record.arm == _DRAFT]
        figures += [
            _share(mine, "of a round outside the passes of draft and target", ("accept", "cache", "other"), bench),
            _share(mine, "of all seconds in the passes of prompts", ("prefill",), bench),
        ]
        notes = [note, f"target-only in {baseline.precision}, with the draft in {target.precision}"]
        return Outcome(figures, records, notes)

    def _loaded(self, bench: Bench) -> tuple[CausalModel, Drafter, Lookahead, str]:
        """Target, draft, policy, and a sentence on them."""
        options = bench.options
        if options.pair is not None:
            pair = load_pair(
                options.pair,
                target=options.target,
                device=options.device,
                cache=options.cache,
                captured=CAPTURED_OFF,
            )
            return pair.target, pair.drafter, pair.lookahead, f"the pair {options.pair}"
        target = bench.target(bench.block_precision)
        policy = FixedLookahead(self.tokens)
        context = LoadContext(bench.draft_folder, bench.target_folder, target, target.precision, target.device)
        try:
            return target, load_drafter(context), policy, f"the draft that comes with dspark, {self.tokens} tokens"
        except InputError as error:
            lookup = LookupDrafter(LookupSettings())
            return target, lookup, policy, f"look-up, since the draft that comes with dspark does not fit: {error.what}"


def _share(records: list[Record], name: str, parts: tuple[str, ...], bench: Bench) -> Figure:
    """Seconds of some parts over those of all; of a round unless the prompts' pass is among them."""
    boot = Bootstrap([record.prompt_id for record in records], seed=bench.options.seed, resamples=RESAMPLES)
    left_out = () if "prefill" in parts else ("prefill",)
    some = boot.sums(records, lambda r: sum(r.seconds[part] for part in parts))
    whole = boot.sums(records, lambda r: r.total_seconds - sum(r.seconds[part] for part in left_out))
    return Figure(f"share {name}", boot.estimate(100 * ratio(some, whole)), "%")
