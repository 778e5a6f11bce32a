"""Arms that decode one prompt at a time, ours and transformers', and what becomes of their greedy answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from inference.decoder import decode
from inference.drafters import Drafter
from inference.lookahead import Lookahead
from inference.model import CausalModel
from inference.randomness import TorchSource
from inference.request import Decoded, Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import ScorePrompt, explain_mismatch, request_seed
from inference.statistics import Estimate
from inference.target import stop_tokens
from pipelines.bench.bench import Bench
from pipelines.bench.outcome import Figure, Goal
from pipelines.bench.paired import Sample, speed
from pipelines.bench.plain import DTYPES, Plain

OURS, THEIRS, THEIRS_ON_OURS = "dspark", "transformers", "transformers on our model"


@dataclass
class Arms:
    """One way to decode a prompt under each arm, and the answers they gave.

    Attributes:
        bench: of the run.
        temperature: 0 is greedy.
        answers: by arm and prompt, the last ones.
        passes: by arm, target passes that wrote tokens, and tokens.
    """

    bench: Bench
    temperature: float
    answers: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    passes: dict[str, list[int]] = field(default_factory=dict)

    def ours(self, target: CausalModel, drafter: Drafter, lookahead: Lookahead) -> Callable[[ScorePrompt], float]:
        """Our decoder."""
        options = self.bench.options
        request = Request(
            settings=SamplingSettings(temperature=self.temperature),
            max_new_tokens=options.max_new_tokens,
            stop_tokens=stop_tokens(target),
        )

        def run(prompt: ScorePrompt) -> float:
            seed = request_seed(options.seed, prompt.id, self.temperature)
            source = TorchSource.seeded(seed, device=target.device)
            result: Decoded = decode(
                target, drafter, prompt.tokens, request=request, lookahead=lookahead, generator=source
            )
            return self._note(OURS, prompt, result.tokens, result.passes)

        return run

    def theirs(
        self, arm: str, plain: Plain, stops: frozenset[int], *, num_draft_tokens: int = 0
    ) -> Callable[[ScorePrompt], float]:
        """transformers' `generate`, assisted where tokens are drafted."""
        options = self.bench.options

        def run(prompt: ScorePrompt) -> float:
            before = plain.passes
            (answer,) = plain.generate(
                [prompt.tokens.tolist()],
                temperature=self.temperature,
                max_new_tokens=options.max_new_tokens,
                stop_tokens=stops,
                seed=request_seed(options.seed, prompt.id, self.temperature) % 2**32,
                num_draft_tokens=num_draft_tokens,
            )
            return self._note(arm, prompt, answer, plain.passes - before)

        return run

    def _note(self, arm: str, prompt: ScorePrompt, answer: list[int], passes: int) -> float:
        self.answers.setdefault(arm, {})[prompt.id] = answer
        counts = self.passes.setdefault(arm, [0, 0])
        counts[0], counts[1] = counts[0] + passes, counts[1] + len(answer)
        return len(answer)

    def tokens_per_pass(self, arm: str) -> float:
        """Over all that an arm has decoded, what was not counted included."""
        passes, tokens = self.passes[arm]
        return tokens / passes

    def detail(self, samples: list[Sample], *arms: str) -> dict[str, Any]:
        """Tokens per second and per target pass, by arm."""
        return {
            arm: {"tokens_per_s": speed(samples, arm).value, "tokens_per_pass": round(self.tokens_per_pass(arm), 3)}
            for arm in arms
        }

    def differences(self, prompts: list[ScorePrompt], arm: str, target: CausalModel, precision: str) -> dict[str, int]:
        """How many greedy answers of ours are another arm's, and whether rounding explains the others.

        Args:
            prompts: that both have answered.
            arm: the other one.
            target: of ours; margins are its own.
            precision: of the other arm, which says with ours what counts as a near-tie.
        """
        counts = {"same": 0, "near_ties": 0, "unexplained": 0}
        for prompt in prompts:
            found = explain_mismatch(
                target,
                prompt.tokens,
                self.answers[OURS][prompt.id],
                self.answers[arm][prompt.id],
                reference_precision=precision,
            )
            counts["same" if found is None else "near_ties" if found.near_tie else "unexplained"] += 1
        return counts


def answers_figure(name: str, counts: dict[str, int]) -> Figure:
    """Greedy answers that rounding does not explain: there must be none."""
    return Figure(name, Estimate(float(counts["unexplained"]), None, None), "answers", Goal(0, at_least=False), counts)


def plain_precision(plain: Plain, target: CausalModel) -> str:
    """The arithmetic of a transformers arm, by the names that near-ties are known under."""
    return plain.name if plain.name in DTYPES else target.precision
