"""The corpus stage's generation against transformers' `generate` at the same batch sizes, sampled at temperature 1.

The same pools of prompts for all arms. transformers takes them in the order given, padded on the left, and every row of
a batch waits for the last; ours are what the stage does (sorted by length, no padding, the next prompt where an answer
has ended), and the same with the states and features that training needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from inference.batch.responses import Wanted, answer_all
from inference.layers import decoder_layers
from inference.model import CausalModel
from inference.sampling_settings import SamplingSettings
from inference.scoring import ScorePrompt, request_seed
from inference.taps import default_taps
from inference.target import stop_tokens
from pipelines.bench.bench import Bench
from pipelines.bench.outcome import Figure, Goal, Outcome
from pipelines.bench.paired import Sample, interleaved, speed, speed_ratio
from pipelines.bench.plain import Plain, chosen_note, fastest

OURS, KEEPING, THEIRS = "the corpus stage", "the same, states kept", "transformers"
GOAL = Goal(2.0)
_TRIED_TOKENS = 16
"""Of an answer, while the faster dtype is found."""

Pool = Sequence[ScorePrompt]


@dataclass(kw_only=True)
class Config:
    """How much is generated.

    Attributes:
        kind: this row.
        batches: batch sizes, one comparison each.
        pool: prompts of a round, in batches.
        rounds: pools; the interval is over them.
        temperature: of sampling.
    """

    kind: str = "corpus"
    batches: list[int] = field(default_factory=lambda: [8, 32])
    pool: int = 3
    rounds: int = 3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if min(self.batches) < 1 or self.pool < 1 or self.rounds < 1:
            raise ValueError("corpus needs batches, pool and rounds of at least 1")

    def run(self, bench: Bench) -> Outcome:
        """Measure."""
        target = bench.target(bench.generation_precision)
        settings = SamplingSettings(temperature=self.temperature)
        figures: list[Figure] = []
        samples: list[Sample] = []
        notes = [f"ours runs in {target.precision}"]
        for size in self.batches:
            pools = self._pools(bench, size)
            first = pools["round 1"]
            plain, found = fastest(
                lambda dtype: Plain.load(bench.target_folder, dtype, device=bench.device),
                lambda model, first=first, size=size: int(  # type: ignore[misc]
                    _transformers(bench, model, stop_tokens(target), self.temperature, size, _TRIED_TOKENS)(first)
                ),
                clock=bench.clock,
            )
            most = bench.options.max_new_tokens
            arms = {
                OURS: _ours(bench, target, settings, size, most, keep=False),
                KEEPING: _ours(bench, target, settings, size, most, keep=True),
                THEIRS: _transformers(bench, plain, stop_tokens(target), self.temperature, size, most),
            }
            more = interleaved(
                pools,
                arms,
                title=f"{self.kind}, batch {size}",
                unit="rounds",
                seed=bench.options.seed,
                clock=bench.clock,
                warm_up=[first[: min(2, len(first))]],
            )
            detail = {arm: {"tokens_per_s": speed(more, arm).value} for arm in arms}
            figures += [
                Figure(
                    f"batch {size}: {arm} over {THEIRS} ({plain.name}), tokens/s",
                    speed_ratio(more, arm, THEIRS),
                    goal=GOAL,
                    detail=detail if arm == OURS else {},
                )
                for arm in (OURS, KEEPING)
            ]
            samples += [Sample(f"batch {size}, {s.unit}", s.arm, s.order, s.amount, s.seconds) for s in more]
            notes.append(f"batch {size}: {chosen_note(found, plain.name)}")
        return Outcome(figures, samples, notes)

    def _pools(self, bench: Bench, size: int) -> dict[str, Pool]:
        """Prompts of each round; where there are too few, they come again."""
        each = size * self.pool
        prompts = bench.prompts(each * self.rounds)
        chosen = [prompts[index % len(prompts)] for index in range(each * self.rounds)]
        return {f"round {number + 1}": chosen[number * each : (number + 1) * each] for number in range(self.rounds)}


def _cut(pool: Pool, size: int) -> list[Pool]:
    return [pool[start : start + size] for start in range(0, len(pool), size)]


def _ours(
    bench: Bench, target: CausalModel, settings: SamplingSettings, size: int, most: int, *, keep: bool
) -> Callable[[Pool], float]:
    """What the corpus stage does with a pool; `keep` also what training needs of the target."""
    wanted = Wanted(
        settings=settings,
        max_new_tokens=most,
        stop_tokens=stop_tokens(target),
        keep_states=keep,
        keep_prompt_states=keep,
        taps=tuple(default_taps(len(decoder_layers(target.model)))) if keep else (),
    )

    def run(pool: Pool) -> float:
        prompts = sorted((prompt.tokens.tolist() for prompt in pool), key=len)
        responses = answer_all(target, prompts, wanted, max_running=size, seed=bench.options.seed)
        return sum(len(response.tokens) for response in responses)

    return run


def _transformers(
    bench: Bench, plain: Plain, stops: frozenset[int], temperature: float, size: int, most: int
) -> Callable[[Pool], float]:
    """Batches in the order given."""

    def run(pool: Pool) -> float:
        count = 0
        for number, batch in enumerate(_cut(pool, size)):
            answers = plain.generate(
                [prompt.tokens.tolist() for prompt in batch],
                temperature=temperature,
                max_new_tokens=most,
                stop_tokens=stops,
                seed=request_seed(bench.options.seed, number) % 2**32,
            )
            count += sum(len(answer) for answer in answers)
        return count

    return run
