"""Captured rounds of many requests on a GPU: a feature draft, its blocks of fixed and scheduled length, against none.

A closed loop: as many requests as the concurrency says are kept running, each that ends is replaced by the next, and
what counts is what was emitted until a place stays empty. All arms get the same held-out prompts and seeds, in turns.
Besides, the target's own answers for a corpus, by captured rounds and by `generate_batch`, without and with the states
and features that training needs.
"""

import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from inference.feature_networks import FeatureNetwork
from inference.feature_networks._checkpoint import load_network
from inference.generation import generate_batch
from inference.graphed.depths import Depths, FixedDepth, ScheduledDepth, load_seconds
from inference.graphed.engine import GraphedEngine, GraphedHandle
from inference.graphed.responses import CapturedAnswers
from inference.graphed.rounds import Rounds
from inference.graphed.target import ALIGNMENT
from inference.layers import decoder_layers
from inference.model import CausalModel
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import request_seed
from inference.statistics import BASELINE, Estimate
from inference.taps import default_taps
from inference.target import stop_tokens
from pipelines.bench.bench import Bench
from pipelines.bench.outcome import Figure, Outcome
from pipelines.bench.paired import Sample, interleaved, speed, speed_ratio
from pipelines.progress import tracked

SCHEDULED = "scheduled"
CAPTURED, CAPTURED_KEEPING = "captured", "captured, states kept"
BATCHES, BATCHES_KEEPING = "generate_batch", "generate_batch, states kept"
# A request that has ended is in one round more.
_SPARE_ROUNDS = 2

Prompt = list[int]


@dataclass(kw_only=True)
class Config:
    """What is served.

    Attributes:
        kind: this row.
        concurrency: requests kept running.
        temperatures: 0 is greedy.
        blocks: tokens proposed a round, an arm each; 0 for the draft's own length. The scheduled arm has none to all.
        turns: requests of a block for each place, from the first on.
        fewest: requests of a block at least.
        rounds: blocks of requests; intervals are over them.
        corpus: answers at once of the corpus; 0 leaves it out.
        corpus_pool: prompts of a corpus, in such batches.
        corpus_rounds: corpora.
        uncaptured: run on a CPU too, where nothing is captured: for tests.
    """

    kind: str = "captured_load"
    concurrency: list[int] = field(default_factory=lambda: [1, 4, 16, 64, 256])
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    blocks: list[int] = field(default_factory=lambda: [2, 0])
    turns: int = 3
    fewest: int = 12
    rounds: int = 4
    corpus: int = 256
    corpus_pool: int = 2
    corpus_rounds: int = 2
    uncaptured: bool = False

    def __post_init__(self) -> None:
        if min(*self.concurrency, self.turns, self.fewest, self.rounds, self.corpus_pool, self.corpus_rounds) < 1:
            raise ValueError("captured_load needs concurrency, turns, fewest, rounds and corpora of at least 1")

    def run(self, bench: Bench) -> Outcome:
        """Measure; on a CPU nothing is.

        Raises:
            InputError: a draft that reads no features, or a target that cannot be captured.
        """
        if bench.device.type != "cuda" and not self.uncaptured:
            return Outcome([], notes=["not run: captured rounds are for a GPU"])
        target = bench.target(bench.block_precision)
        network = load_network(bench.options.draft or bench.draft_folder, target, precision=target.precision)
        prompts = [prompt.tokens.tolist() for prompt in bench.prompts(self.num_prompts)]
        load = Load(
            target, network, prompts, self, max_new_tokens=bench.options.max_new_tokens, seed=bench.options.seed
        )
        served = load.served()
        written = load.written() if self.corpus else Outcome([])
        figures = [*served.figures, *written.figures]
        if bench.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
            figures.append(Figure("peak memory of the device", Estimate(peak, None, None), unit="MiB"))
        notes = [f"in {target.precision}, {len(prompts)} different prompts", *served.notes, *written.notes]
        return Outcome(figures, [*served.samples, *written.samples], notes)

    def block_requests(self, concurrency: int) -> int:
        """Requests of a block."""
        return max(self.turns * concurrency, self.fewest)

    @property
    def num_prompts(self) -> int:
        """Different prompts wanted."""
        return max(self.rounds * self.block_requests(max(self.concurrency)), self.corpus * self.corpus_pool)


@dataclass(frozen=True)
class _Block:
    """What one arm did with a block of requests while all places were taken.

    Attributes:
        tokens: emitted.
        seconds: of it.
        handles: of all requests, in order.
        gaps: seconds from token to token, of each request that has ended, the first round's left out.
    """

    tokens: int
    seconds: float
    handles: list[GraphedHandle]
    gaps: list[float]


class Load:
    """A target and its draft under load.

    Args:
        target: of lean layers.
        network: drafts.
        prompts: token ids; where there are too few, they come again.
        config: of the row.
        max_new_tokens: of every answer.
        seed: of all draws and orders.
    """

    def __init__(
        self,
        target: CausalModel,
        network: FeatureNetwork,
        prompts: Sequence[Prompt],
        config: Config,
        *,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self._target, self._network, self._config = target, network, config
        self._prompts, self._max_new_tokens, self._seed = prompts, max_new_tokens, seed
        self._stops = stop_tokens(target)
        self._longest_prompt = max(len(prompt) for prompt in prompts)
        needed = self._longest_prompt + max_new_tokens + _SPARE_ROUNDS * (network.block + 1)
        self._capacity = -(-needed // ALIGNMENT) * ALIGNMENT

    # Requests in a closed loop

    def served(self) -> Outcome:
        """Speedups over target-only decoding by concurrency and temperature."""
        config, network = self._config, self._network
        places = max(config.concurrency)
        alone = Rounds(self._target, None, block=0, batch=places, capacity=self._capacity)
        drafted = Rounds(self._target, network, block=network.block, batch=places, capacity=self._capacity)
        fixed = sorted({min(length or network.block, network.block) for length in config.blocks})
        figures: list[Figure] = []
        samples: list[Sample] = []
        notes: list[str] = []
        cells = list(itertools.product(config.concurrency, config.temperatures))
        for count, temperature in tracked(cells, config.kind, unit="loads"):
            seconds = load_seconds(
                drafted,
                places=[count],
                lengths=range(network.block + 1),
                context=min(128, self._capacity // 2),
                sampled=temperature > 0.0,
            )
            arms: dict[str, tuple[Rounds, Depths]] = {BASELINE: (alone, FixedDepth(0))}
            arms |= {f"draft-{length}": (drafted, FixedDepth(length)) for length in fixed}
            arms[SCHEDULED] = (drafted, ScheduledDepth(seconds))
            blocks = self._blocks(arms, count, temperature)
            label = f"{count} requests, T={temperature:g}"
            own = [
                Sample(f"{label}, block {number + 1}", arm, order, float(block.tokens), block.seconds)
                for arm, done in blocks.items()
                for number, (order, block) in enumerate(done)
            ]
            samples += sorted(own, key=lambda sample: (sample.unit, sample.order))
            figures += self._figures(own, blocks, label, greedy=temperature == 0.0)
            told = ", ".join(f"{length}: {1e3 * taken:.2f}" for length, taken in seconds[count].items())
            notes.append(f"{label}: ms of a round by tokens proposed {told}")
        return Outcome(figures, samples, notes)

    def _blocks(
        self, arms: dict[str, tuple[Rounds, Depths]], count: int, temperature: float
    ) -> dict[str, list[tuple[int, _Block]]]:
        """Every arm on every block of requests, with its place among the arms of the block."""
        config = self._config
        each = config.block_requests(count)
        for rounds, depths in arms.values():
            engine = GraphedEngine(rounds, depths, max_requests=count)
            engine.prepare(sampled=temperature > 0.0, sizes=[count], longest_prompt=self._longest_prompt)
            self._block(rounds, depths, count, temperature, range(min(each, 2 * count)))
        draw = random.Random(self._seed)
        found: dict[str, list[tuple[int, _Block]]] = {arm: [] for arm in arms}
        for number in range(config.rounds):
            order = list(arms)
            draw.shuffle(order)
            for place, arm in enumerate(order):
                gc.collect()
                asked = range(number * each, (number + 1) * each)
                found[arm].append((place, self._block(*arms[arm], count, temperature, asked)))
        return found

    def _block(self, rounds: Rounds, depths: Depths, count: int, temperature: float, asked: range) -> _Block:
        """Serve requests until one of `count` places stays empty."""
        engine = GraphedEngine(rounds, depths, max_requests=count)
        request = Request(
            settings=SamplingSettings(temperature=temperature),
            max_new_tokens=self._max_new_tokens,
            stop_tokens=self._stops,
        )
        moments: list[list[tuple[float, int]]] = [[] for _ in asked]

        def noting(own: list[tuple[float, int]]) -> Callable[[list[int]], None]:
            return lambda tokens: own.append((time.perf_counter(), len(tokens)))

        handles = [
            engine.submit(
                self._prompts[index % len(self._prompts)],
                request,
                seed=request_seed(self._seed, "load", index),
                on_tokens=noting(own),
            )
            for index, own in zip(asked, moments, strict=True)
        ]
        if rounds.anchors.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        while engine.num_held >= count:
            engine.step()
        seconds = time.perf_counter() - began
        ended = [handle.ended for handle in handles]
        engine.abandon()
        gaps = [
            (own[-1][0] - own[0][0]) / (sum(tokens for _, tokens in own) - own[0][1])
            for own, done in zip(moments, ended, strict=True)
            if done and len(own) > 1
        ]
        return _Block(sum(len(handle.result.tokens) for handle in handles), seconds, handles, gaps)

    def _figures(
        self, samples: Sequence[Sample], blocks: dict[str, list[tuple[int, _Block]]], label: str, *, greedy: bool
    ) -> list[Figure]:
        """Of one load: a speedup of each arm with a draft, with what it is made of, and the greedy answers."""
        done = {arm: [block for _, block in own] for arm, own in blocks.items()}
        detail = {arm: self._detail(samples, arm, own) for arm, own in done.items()}
        figures = [
            Figure(
                f"{label}: {arm} over target-only, tokens/s",
                speed_ratio(samples, arm, BASELINE),
                detail={BASELINE: detail[BASELINE], arm: detail[arm]},
            )
            for arm in done
            if arm != BASELINE
        ]
        if greedy:
            same: list[bool] = []
            for arm in done:
                for mine, theirs in zip(done[arm], done[BASELINE], strict=True):
                    for one, other in zip(mine.handles, theirs.handles, strict=True):
                        both = min(len(one.result.tokens), len(other.result.tokens))
                        if arm != BASELINE and both:
                            same.append(one.result.tokens[:both] == other.result.tokens[:both])
            share = Estimate(100 * statistics.fmean(same), None, None)
            figures.append(Figure(f"{label}: greedy answers like target-only's, as far as both go", share, unit="%"))
        return figures

    @staticmethod
    def _detail(samples: Sequence[Sample], arm: str, blocks: Sequence[_Block]) -> dict[str, Any]:
        """An arm's tokens a second, tokens a round of a request, seconds from token to token, and depths."""
        results = [handle.result for block in blocks for handle in block.handles]
        gaps = [gap for block in blocks for gap in block.gaps]
        passes = sum(result.passes for result in results)
        depths: dict[int, int] = {}
        for result in results:
            for length, rounds in result.blocks.items():
                depths[length] = depths.get(length, 0) + rounds
        return {
            "tokens_per_s": str(speed(samples, arm)),
            "tau": sum(len(result.tokens) for result in results) / passes,
            "ms_per_token": {
                name: 1e3 * float(np.quantile(gaps, share)) for name, share in (("median", 0.5), ("p90", 0.9)) if gaps
            },
            "depths": {str(length): rounds / passes for length, rounds in sorted(depths.items())},
        }

    # Answers for a corpus

    def written(self) -> Outcome:
        """Tokens a second of the target's own answers, captured and not, without and with what training needs."""
        config, target = self._config, self._target
        taps = default_taps(len(decoder_layers(target.model)))
        settings = SamplingSettings(temperature=1.0)
        size, each = config.corpus, config.corpus * config.corpus_pool
        longest = self._longest_prompt + self._max_new_tokens
        arms: dict[str, Callable[[list[Prompt]], float]] = {}
        began = time.perf_counter()
        for name, kept in ((CAPTURED, False), (CAPTURED_KEEPING, True)):
            answers = CapturedAnswers(
                target,
                longest=longest,
                settings=settings,
                max_requests=size,
                keep_states=kept,
                keep_prompt_states=kept,
                taps=taps if kept else (),
            )
            answers.prepare(longest_prompt=self._longest_prompt)
            arms[name] = self._captured(answers)
        prepared = time.perf_counter() - began
        arms[BATCHES] = self._batches(settings, size, ())
        arms[BATCHES_KEEPING] = self._batches(settings, size, taps)
        pools = {
            f"corpus {number + 1}": [self._prompts[(number * each + n) % len(self._prompts)] for n in range(each)]
            for number in range(config.corpus_rounds)
        }
        [first, *_] = pools.values()
        samples = interleaved(
            pools, arms, title=f"{config.kind}, corpora", unit="corpora", seed=self._seed, warm_up=[first[:size]]
        )
        detail = {arm: {"tokens_per_s": str(speed(samples, arm))} for arm in arms}
        pairs = ((CAPTURED, BATCHES), (CAPTURED_KEEPING, BATCHES_KEEPING), (CAPTURED_KEEPING, CAPTURED))
        figures = [
            Figure(
                f"corpus, {size} at once: {mine} over {theirs}, tokens/s",
                speed_ratio(samples, mine, theirs),
                detail={arm: detail[arm] for arm in (mine, theirs)},
            )
            for mine, theirs in pairs
        ]
        return Outcome(figures, samples, [f"corpora: capturing took {prepared:.1f} s, not counted"])

    def _captured(self, answers: CapturedAnswers) -> Callable[[list[Prompt]], float]:
        def run(pool: list[Prompt]) -> float:
            given = answers.answer(pool, max_new_tokens=self._max_new_tokens, stop_tokens=self._stops, seed=self._seed)
            return sum(len(response.tokens) for response in given)

        return run

    def _batches(self, settings: SamplingSettings, size: int, taps: Sequence[int]) -> Callable[[list[Prompt]], float]:
        """Sorted batches; with taps, states are kept too."""

        def run(pool: list[Prompt]) -> float:
            ordered = sorted(pool, key=len)
            count = 0
            for start in range(0, len(ordered), size):
                given = generate_batch(
                    self._target,
                    ordered[start : start + size],
                    settings=settings,
                    max_new_tokens=self._max_new_tokens,
                    stop_tokens=self._stops,
                    seed=request_seed(self._seed, "corpus", start),
                    keep_states=bool(taps),
                    keep_prompt_states=bool(taps),
                    taps=taps,
                )
                count += sum(len(response.tokens) for response in given)
            return count

        return run
