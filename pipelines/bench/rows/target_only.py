"""Target-only decoding of one request at a time against transformers' `generate`, greedy.

transformers runs in the faster of fp32 and bf16; a second figure lets it decode with our own model, packed weights and
attention included, so that the loop alone is compared.
"""

from dataclasses import dataclass

from inference.drafters.none import NoDrafter
from inference.lookahead.fixed import FixedLookahead
from inference.target import stop_tokens
from pipelines.bench.bench import Bench
from pipelines.bench.decoding import OURS, THEIRS, THEIRS_ON_OURS, Arms, answers_figure, plain_precision
from pipelines.bench.outcome import Figure, Goal, Outcome
from pipelines.bench.paired import interleaved, speed_ratio
from pipelines.bench.plain import Plain, chosen_note, fastest

GOAL = Goal(1.2)


@dataclass(kw_only=True)
class Config:
    """No settings of its own.

    Attributes:
        kind: this row.
    """

    kind: str = "target_only"

    def run(self, bench: Bench) -> Outcome:
        """Measure."""
        prompts = bench.prompts()
        target = bench.target(bench.baseline_precision)
        stops = stop_tokens(target)
        arms = Arms(bench, 0.0)
        plain, found = fastest(
            lambda dtype: Plain.load(bench.target_folder, dtype, device=bench.device),
            lambda model: int(arms.theirs(THEIRS, model, stops)(prompts[0])),
            clock=bench.clock,
        )
        own = Plain.of(target)
        samples = interleaved(
            {prompt.id: prompt for prompt in prompts},
            {
                OURS: arms.ours(target, NoDrafter(), FixedLookahead(0)),
                THEIRS: arms.theirs(THEIRS, plain, stops),
                THEIRS_ON_OURS: arms.theirs(THEIRS_ON_OURS, own, stops),
            },
            title=self.kind,
            unit="prompts",
            seed=bench.options.seed,
            clock=bench.clock,
        )
        figures = []
        for arm, model, goal in ((THEIRS, plain, GOAL), (THEIRS_ON_OURS, own, None)):
            ratio, detail = speed_ratio(samples, OURS, arm), arms.detail(samples, OURS, arm)
            figures.append(Figure(f"tokens/s over {arm} ({model.name})", ratio, goal=goal, detail=detail))
            counts = arms.differences(prompts, arm, target, plain_precision(model, target))
            figures.append(answers_figure(f"greedy answers unlike those of {arm} ({model.name})", counts))
        notes = [f"ours runs in {target.precision}", chosen_note(found, plain.name)]
        return Outcome(figures, samples, notes)
