"""The corpus stage's generation against transformers' `generate` at the same batch sizes, sampled at temperature 1.

The same pools of prompts for all arms. transformers takes them in the order given, padded on the left, and every row of
a batch waits for the last; ours are what the stage does (sorted by length, ended rows leave the batch), the same with
the states and features that training needs, and the batch engine, which puts the next request where one has ended.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from inference.batch.engine import BatchEngine
from inference.drafters.none import NoDrafter
from inference.generation import generate_batch
from inference.layers import decoder_layers
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import ScorePrompt, request_seed
from inference.taps import default_taps
from inference.target import stop_tokens
from pipelines.bench.bench import Bench
from pipelines.bench.outcome import Figure, Goal, Outcome
from pipelines.bench.paired import Sample, interleaved, speed, speed_ratio
from pipelines.bench.plain import Plain, chosen_note, fastest

SORTED, KEEPING, ENGINE, THEIRS = "sorted batches", "sorted batches, states kept", "batch engine", "transformers"
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
                SORTED: _sorted_batches(bench, target, settings, size, most, keep=False),
                KEEPING: _sorted_batches(bench, target, settings, size, most, keep=True),
                ENGINE: _engine(bench, target, settings, size, most),
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
                    detail=detail if arm == SORTED else {},
                )
                for arm in (SORTED, KEEPING, ENGINE)
            ]
            figures.append(Figure(f"batch {size}: {ENGINE} over {SORTED}, tokens/s", speed_ratio(more, ENGINE, SORTED)))
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


def _sorted_batches(
    bench: Bench, target: CausalModel, settings: SamplingSettings, size: int, most: int, *, keep: bool
) -> Callable[[Pool], float]:
    """What the corpus stage does with a pool; `keep` also what training needs of the target."""
    stops = stop_tokens(target)
    taps = default_taps(len(decoder_layers(target.model))) if keep else []

    def run(pool: Pool) -> float:
        ordered = sorted(pool, key=lambda prompt: len(prompt.tokens))
        count = 0
        for number, batch in enumerate(_cut(ordered, size)):
            responses = generate_batch(
                target,
                [prompt.tokens.tolist() for prompt in batch],
                settings=settings,
                max_new_tokens=most,
                stop_tokens=stops,
                seed=request_seed(bench.options.seed, number),
                keep_states=keep,
                keep_prompt_states=keep,
                taps=taps,
            )
            count += sum(len(response.tokens) for response in responses)
        return count

    return run


def _engine(
    bench: Bench, target: CausalModel, settings: SamplingSettings, size: int, most: int
) -> Callable[[Pool], float]:
    """Continuous batching: all requests at once, as many running as the batch is large."""
    request = Request(settings=settings, max_new_tokens=most, stop_tokens=stop_tokens(target))

    def run(pool: Pool) -> float:
        engine = BatchEngine(target, NoDrafter, FixedLookahead(0), max_requests=size)
        handles = [
            engine.submit(
                prompt.tokens,
                request,
                generator=TorchSource.seeded(request_seed(bench.options.seed, number), device=target.device),
            )
            for number, prompt in enumerate(pool)
        ]
        while not engine.idle:
            engine.step()
        return sum(len(handle.result.tokens) for handle in handles)

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
