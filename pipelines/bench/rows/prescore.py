"""The pre-score of drafts against decoding with them: the same answers, the same blocks, time and tau of both.

A draft decodes a prompt, and is then rehearsed on the answer it got. So both figures rest on the same answers: at
temperature 0 they must agree, above it they differ by the luck of what was accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inference.decoder import decode
from inference.drafters import Drafter, LoadContext, ReadsFeatures, load_drafter
from inference.drafters.lookup import LookupDrafter
from inference.errors import InputError
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.model import CausalModel
from inference.prescore.rehearsal import FixedResponse, Rehearses
from inference.prescore.responses import fixed_response
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import ScorePrompt, request_seed
from inference.statistics import Array, Bootstrap, Estimate, ratio
from inference.target import stop_tokens
from pipelines.bench.bench import Bench
from pipelines.bench.outcome import Figure, Goal, Outcome
from pipelines.bench.paired import RESAMPLES
from pipelines.progress import tracked

TIME = Goal(1 / 20, at_least=False)
OFF = Goal(0.02, at_least=False)


@dataclass(kw_only=True)
class Config:
    """What is decoded.

    Attributes:
        kind: this row.
        tokens: proposed a round.
        temperatures: 0 is greedy.
        repeats: decodings of a prompt at a temperature above 0, whose luck is what parts the two figures.
    """

    kind: str = "prescore"
    tokens: int = 3
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    repeats: int = 4

    def run(self, bench: Bench) -> Outcome:
        """Measure."""
        target = bench.target(bench.block_precision)
        drafts, notes = _drafts(bench, target)
        taps = sorted({t for draft in drafts.values() if isinstance(draft, ReadsFeatures) for t in draft.taps})
        samples: list[dict[str, Any]] = []
        prompts = bench.prompts()
        self._measured(bench, target, drafts, prompts[0], 0.0, 0, taps)
        for prompt in tracked(prompts, self.kind, unit="prompts"):
            for temperature in self.temperatures:
                for repeat in range(self.repeats if temperature else 1):
                    samples += self._measured(bench, target, drafts, prompt, temperature, repeat, taps)
        figures = []
        for name in drafts:
            for temperature in self.temperatures:
                own = [s for s in samples if s["draft"] == name and s["temperature"] == temperature]
                figures += _figures(own, f"{name}, T={temperature:g}", seed=bench.options.seed)
        shared = _sums(samples, ("rehearsal", "pass"), ("decoding",), share=len(drafts))
        figures.append(Figure(f"seconds over decoding, {len(drafts)} drafts on one pass", shared, goal=TIME))
        return Outcome(figures, samples, notes)

    def _measured(
        self,
        bench: Bench,
        target: CausalModel,
        drafts: dict[str, Drafter],
        prompt: ScorePrompt,
        temperature: float,
        repeat: int,
        taps: list[int],
    ) -> list[dict[str, Any]]:
        """Every draft decodes a prompt and is rehearsed on its answer."""
        options, clock = bench.options, bench.clock
        settings = SamplingSettings(temperature=temperature)
        request = Request(settings=settings, max_new_tokens=options.max_new_tokens, stop_tokens=stop_tokens(target))
        found = []
        for name, drafter in drafts.items():
            source = TorchSource.seeded(
                request_seed(options.seed, prompt.id, temperature, name, repeat), device=target.device
            )
            began = clock()
            decoded = decode(
                target,
                drafter,
                prompt.tokens,
                request=request,
                lookahead=FixedLookahead(self.tokens),
                generator=source,
            )
            answered = clock()
            response = fixed_response(
                target,
                prompt,
                decoded.tokens,
                settings=settings,
                max_new_tokens=options.max_new_tokens,
                taps=tuple(taps),
            )
            passed = clock()
            passes = _expected_passes(drafter, response, self.tokens)
            found.append(
                {
                    "prompt": prompt.id,
                    "draft": name,
                    "temperature": temperature,
                    "tokens": len(decoded.tokens),
                    "passes": decoded.passes,
                    "expected_passes": passes,
                    "decoding": answered - began,
                    "pass": passed - answered,
                    "rehearsal": clock() - passed,
                }
            )
        return found


def _expected_passes(drafter: Drafter, response: FixedResponse, tokens: int) -> float:
    """Of one answer in blocks of one length."""
    rehearsal = drafter.rehearse(response, longest=tokens) if isinstance(drafter, Rehearses) else None
    if rehearsal is None:
        raise InputError("this draft has no pre-score", where="--pair", mend="name another pair")
    return rehearsal.expected(tokens).passes


def _drafts(bench: Bench, target: CausalModel) -> tuple[dict[str, Drafter], list[str]]:
    """The pair's draft or the one that comes with dspark, and look-up."""
    folder = bench.draft_folder
    lookup = LookupDrafter(LookupSettings())
    try:
        context = LoadContext(folder, bench.target_folder, target, target.precision, target.device)
        return {"draft": load_drafter(context), "lookup": lookup}, [f"draft: {folder.parent.name}"]
    except InputError as error:
        if bench.options.pair is not None:
            raise
        return {"lookup": lookup}, [f"the draft that comes with dspark does not fit: {error.what}"]


def _figures(samples: Sequence[dict[str, Any]], label: str, *, seed: int) -> list[Figure]:
    """How far the two taus are apart, and what part of the time the pre-score takes, alone and with its pass."""
    boot = Bootstrap([s["prompt"] for s in samples], seed=seed, resamples=RESAMPLES)
    totals = {key: _weighted(boot, samples, key) for key in ("tokens", "passes", "expected_passes")}
    taus = {key: ratio(totals["tokens"], totals[key]) for key in ("passes", "expected_passes")}
    parted = ratio(taus["expected_passes"], taus["passes"])
    detail = {"pre-scored tau": float(taus["expected_passes"][0]), "decoded tau": float(taus["passes"][0])}
    off = boot.estimate(np.abs(parted - 1.0))
    return [
        Figure(f"tau parts by, {label}", off, unit="of it", goal=OFF, detail=detail),
        Figure(f"rehearsal over decoding, {label}", _sums(samples, ("rehearsal",), ("decoding",)), goal=TIME),
        Figure(f"with the target's pass, {label}", _sums(samples, ("rehearsal", "pass"), ("decoding",))),
    ]


def _weighted(boot: Bootstrap, samples: Sequence[dict[str, Any]], key: str) -> Array:
    """Sum of a number over prompts in every resample."""
    sums = np.zeros(len(boot.index))
    for sample in samples:
        sums[boot.index[sample["prompt"]]] += sample[key]
    total: Array = boot.weights @ sums
    return total


def _sums(samples: Sequence[dict[str, Any]], above: Sequence[str], below: Sequence[str], *, share: int = 1) -> Estimate:
    """Seconds over seconds; a pass is counted once for `share` drafts."""
    boot = Bootstrap([s["prompt"] for s in samples], seed=0, resamples=RESAMPLES)

    def total(keys: Sequence[str]) -> Array:
        parts = [_weighted(boot, samples, key) / (share if key == "pass" else 1) for key in keys]
        summed: Array = np.sum(parts, axis=0)
        return summed

    return boot.estimate(ratio(total(above), total(below)))
